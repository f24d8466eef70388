"""`Comparison`: the losses of runs at equal tokens, equal time and equal bytes, as a table."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tools.comparing.courses import Course

__all__ = ["Comparison", "Row", "bytes_text", "seconds_text", "tokens_text"]

Row = tuple[str, list[str]]
"""Name of a quantity, and its text for every run."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    The amounts are the largest that every run has reached with an evaluation.

    Attributes:
        courses: The runs, in the order given.
    """

    courses: Sequence[Course]

    @cached_property
    def tokens(self) -> float:
        """Tokens at which losses are compared."""
        return self._reached_by_all(lambda course: course.tokens)

    @cached_property
    def seconds(self) -> float:
        """Training time at which losses are compared; nan where a run did not write it."""
        return self._reached_by_all(lambda course: course.seconds)

    @cached_property
    def bytes(self) -> float:
        """Bytes sent at which losses are compared; nan where a run sent or planned none."""
        least = self._reached_by_all(lambda course: course.bytes_sent)
        return least if least > 0 else math.nan

    def _reached_by_all(self, axis: Callable[[Course], Callable[[float], float]]) -> float:
        ends = [axis(course)(course.losses[-1][0]) for course in self.courses]
        return math.nan if any(map(math.isnan, ends)) else min(ends)

    def baseline(self, course: Course) -> Course | None:
        """Return the data-parallel run with the same inner optimizer, if there is one."""
        kind = course.config.inner.kind
        for other in self.courses:
            if other.is_data_parallel and other.config.inner.kind == kind:
                return other if other is not course else None
        return None

    def above_baseline(self, course: Course) -> float | None:
        """Return how far a run's loss is above its baseline's at equal tokens, in percent."""
        baseline = self.baseline(course)
        if baseline is None:
            return None
        losses = [each.loss_at(self.tokens, each.tokens) for each in (course, baseline)]
        if losses[0] is None or losses[1] is None:
            return None
        return 100 * (losses[0] / losses[1] - 1)

    def rows(self) -> Iterator[Row]:
        """Yield every quantity with its text for every run."""
        at_tokens, at_seconds, at_bytes = (
            f"held-out loss at {text}"
            for text in (
                f"{tokens_text(self.tokens)} tokens",
                f"{seconds_text(self.seconds)} of training",
                f"{bytes_text(self.bytes)} sent",
            )
        )
        yield "method", self._each(lambda c: c.method)
        yield "steps of a round, H", self._each(_interval)
        yield "ranks", self._each(lambda c: str(c.world_size))
        yield at_tokens, self._each(lambda c: _loss(c.loss_at(self.tokens, c.tokens)))
        yield (
            "  above its data-parallel run",
            self._each(lambda c: _percent(self.above_baseline(c))),
        )
        if not math.isnan(self.seconds):  # a run may have no times
            yield at_seconds, self._each(lambda c: _loss(c.loss_at(self.seconds, c.seconds)))
        yield at_bytes, self._each(lambda c: _loss(c.loss_at(self.bytes, c.bytes_sent)))
        yield "last held-out loss", self._each(lambda c: _loss(c.losses[-1][1]))
        yield "tokens", self._each(lambda c: tokens_text(c.tokens(c.last_step)))
        yield "training time", self._each(lambda c: seconds_text(c.seconds(c.last_step)))
        yield "tokens per second", self._each(lambda c: _speed(c.tokens_per_s))
        yield "bytes sent per rank", self._each(lambda c: bytes_text(c.bytes_sent(c.last_step)))
        yield "  between replicas", self._each(lambda c: bytes_text(c.outer_bytes(c.last_step)))
        yield "DP would have sent", self._each(lambda c: bytes_text(_dp_total(c)))
        yield "  times as much", self._each(_times_as_much)

    def _each(self, text: Callable[[Course], str]) -> list[str]:
        return [text(course) for course in self.courses]

    def __str__(self) -> str:
        rows = [("", [course.name for course in self.courses]), *self.rows()]
        label = max(len(name) for name, _ in rows)
        widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(self.courses))]
        return "\n".join(
            f"{name:{label}s}"
            + "".join(f"  {text:>{width}s}" for text, width in zip(cells, widths, strict=True))
            for name, cells in rows
        )


def _dp_total(course: Course) -> float:
    """Return the bytes that data parallelism would have sent per rank in the run's steps."""
    return course.last_step * course.data_parallel_bytes


def _times_as_much(course: Course) -> str:
    sent, instead = course.bytes_sent(course.last_step), _dp_total(course)
    if math.isnan(sent) or math.isnan(instead) or sent == 0:
        return "n/a"
    return f"{instead / sent:.1f}"


def _interval(course: Course) -> str:
    if course.is_data_parallel:
        return "-"
    return str(course.config.model_dump(mode="json")["outer"]["sync_interval"])


# ---- numbers -------------------------------------------------------------------------------------


def _loss(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} %"


def _speed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    if math.isnan(value):
        return "n/a"
    for size, unit in units:
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}{units[-1][1].replace('k', '')}"


def tokens_text(value: float) -> str:
    """Return a number of tokens: 2.048M."""
    return _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")))


def bytes_text(value: float) -> str:
    """Return a number of bytes in decimal units: 69.92 MB."""
    return _scaled(value, ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")))


def seconds_text(value: float) -> str:
    """Return a duration: 93 s, 12.3 min, 4.1 h."""
    if math.isnan(value):
        return "n/a"
    if value >= 2 * 3600:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.1f} s"
