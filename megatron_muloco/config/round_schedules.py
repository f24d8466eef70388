"""Numbers of the outer step that may change from round to round, as functions of the round.

A plain number is constant. A schedule is an object with a ``kind``, which the outer step calls with
a round, counted from 1; so resuming needs no state::

    sync_interval: {kind: steps, values: [[1, 30], [200, 60]]}    # 60 steps from round 200 on
    lr: {kind: cosine, start: 0.9, end: 0.7, rounds: 500}         # 0.7 from round 500 on
    momentum: {kind: linear, start: 0.7, end: 0.8, rounds: 500}

The bounds of a key hold for every value of its schedule; `outer_checks` looks at the rounds.
"""

import math
from bisect import bisect_right
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

from megatron_muloco.config.section import PositiveInt, Section

__all__ = [
    "CosineRamp",
    "Interval",
    "LearningRate",
    "LinearRamp",
    "Momentum",
    "Steps",
    "interval_at",
    "interval_values",
    "interval_words",
    "rate_words",
]

Value = TypeVar("Value", int, float)


class Steps(Section, Generic[Value]):
    """One value after the other, each constant."""

    kind: Literal["steps"] = Field(description="Kind of schedule, where one is given.")
    values: tuple[Annotated[tuple[PositiveInt, Value], Field(strict=False)], ...] = Field(
        strict=False,
        min_length=1,
        description="Pairs [round, value]: the value from that round on. The first round is 1.",
    )

    def __call__(self, round_index: int) -> Value:
        """Return the value of a round."""
        begun = bisect_right(self.values, round_index, key=lambda pair: pair[0])
        return self.values[max(begun, 1) - 1][1]


class _Ramp(Section, Generic[Value]):
    """From one value to another in so many rounds, and constant from then on."""

    start: Value = Field(description="Value of round 1.")
    end: Value = Field(description="Value from round `rounds` on.")
    rounds: int = Field(ge=2, description="Round that is the first with the value `end`.")

    def _between(self, remaining: float) -> float:
        return self.start * remaining + self.end * (1.0 - remaining)  # exact at both ends

    def _progress(self, round_index: int) -> float:
        return min(1.0, (round_index - 1) / (self.rounds - 1))


class LinearRamp(_Ramp[Value], Generic[Value]):
    """The same change from every round to the next."""

    kind: Literal["linear"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(1.0 - self._progress(round_index))


class CosineRamp(_Ramp[Value], Generic[Value]):
    """Half a cosine: slow at both ends."""

    kind: Literal["cosine"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(0.5 * (1.0 + math.cos(math.pi * self._progress(round_index))))


def _tag(value: Any) -> str | None:
    """Return the kind of a schedule, given as keys or as an object; all else has to be a number."""
    if isinstance(value, dict):
        kind = value.get("kind")
        return None if kind is None else str(kind)
    return getattr(value, "kind", "number")


_PositiveRate = Annotated[float, Field(gt=0)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]

Interval = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Steps[PositiveInt], Tag("steps")],
    Discriminator(_tag),
]
LearningRate = Annotated[
    Annotated[_PositiveRate, Tag("number")]
    | Annotated[Steps[_PositiveRate], Tag("steps")]
    | Annotated[LinearRamp[_PositiveRate], Tag("linear")]
    | Annotated[CosineRamp[_PositiveRate], Tag("cosine")],
    Discriminator(_tag),
]
Momentum = Annotated[
    Annotated[_Momentum, Tag("number")]
    | Annotated[Steps[_Momentum], Tag("steps")]
    | Annotated[LinearRamp[_Momentum], Tag("linear")]
    | Annotated[CosineRamp[_Momentum], Tag("cosine")],
    Discriminator(_tag),
]


def interval_at(interval: Interval, round_index: int) -> int:
    """Return the inner steps of a round."""
    return interval if isinstance(interval, int) else interval(round_index)


def interval_values(interval: Interval) -> tuple[int, ...]:
    """Return the lengths that rounds may have, in the order in which they are listed."""
    return (interval,) if isinstance(interval, int) else tuple(v for _, v in interval.values)


def interval_words(interval: Interval, unit: str) -> str:
    """Return, for instance, ``30 steps, 60 from round 200`` for the unit ``step``."""
    first = interval_at(interval, 1)
    words = f"{first} {unit}{'' if first == 1 else 's'}"
    return words if isinstance(interval, int) else words + _later(interval)


def rate_words(rate: LearningRate | Momentum) -> str:
    """Return, for instance, ``0.9``, or ``0.9 to 0.7 over 500 rounds (cosine)``."""
    if isinstance(rate, Steps):
        return f"{rate(1):g}{_later(rate)}"
    if isinstance(rate, _Ramp):
        return f"{rate.start:g} to {rate.end:g} over {rate.rounds:,} rounds ({rate.kind})"
    return f"{rate:g}"


def _later(steps: Steps[Any]) -> str:
    return "".join(f", {value:g} from round {first:,}" for first, value in steps.values[1:])
