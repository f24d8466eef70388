"""Rows of the result table, computed from readings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .compose import Costs, Timing, floor_seconds, step_seconds, steps_to
from .readings import Reading

__all__ = ["Row", "markdown", "methods_table", "row", "time_to_loss"]


@dataclass(frozen=True, slots=True)
class Row:
    """One method at one rate.

    Attributes:
        name: Name of the method.
        title: Title of the method.
        mbit: Rate.
        timing: Times of an inner step.
        planned_bytes: Bytes that a rank sends in a step, by the planner.
        counted_bytes: Bytes by the kernel: frames with headers, acknowledgements and repeats; the
            mean over ranks.
        unshaped: Seconds of a step on links as fast as the machine.
        exposed_share: Exposed share of the wall-clock of a round; ``None`` for data parallelism.
        steps: Steps to the target; ``None`` where it is not reached or the method was not trained.
    """

    name: str
    title: str
    mbit: float
    timing: Timing
    planned_bytes: float
    counted_bytes: float
    unshaped: float
    exposed_share: float | None
    steps: int | None

    @property
    def seconds_to_target(self) -> float | None:
        """Composed wall-clock."""
        return time_to_loss(self.steps, self.timing.wall)


def time_to_loss(steps: int | None, seconds_per_step: float) -> float | None:
    """Return the seconds of so many steps, ``None`` for ``None``."""
    return None if steps is None else steps * seconds_per_step


def row(
    title: str,
    reading: Reading,
    unshaped: Reading,
    *,
    cost: Costs,
    compute: float,
    validation: list[tuple[int, float]],
    target: float | None,
    link_alone: bool = False,
) -> Row:
    """Return the row of a reading on shaped links.

    Args:
        title: Title of the method.
        reading: Reading of the method.
        unshaped: Reading of the same run on unshaped links.
        cost: Bytes by the planner.
        compute: Seconds of a step without the network.
        validation: Held-out loss against steps of the method's training.
        target: Loss to reach.
        link_alone: Count a step as ``compute`` plus what the link adds to the unshaped step, where
            this machine's arithmetic must not enter the comparison.
    """
    assert reading.mbit is not None
    wall = step_seconds(reading, cost.steps_per_round)
    free = step_seconds(unshaped, cost.steps_per_round)
    if link_alone:
        wall += compute - free
    steps = reading.window.last - reading.window.first
    is_dp = cost.steps_per_round == 1
    exposed = sum(ms for _, ms in reading.within("exposed_ms")) / 1e3
    return Row(
        name=reading.method,
        title=title,
        mbit=reading.mbit,
        timing=Timing(compute, wall, floor_seconds(compute, cost.bytes_per_step, reading.mbit)),
        planned_bytes=cost.bytes_per_step,
        counted_bytes=sum(reading.sent) / len(reading.sent) / steps,
        unshaped=free,
        exposed_share=None if is_dp else exposed / (wall * steps),
        steps=None if target is None else steps_to(validation, target),
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "method": lambda r: r.title,
    "planned kB": lambda r: f"{r.planned_bytes / 1e3:,.1f}",
    "counted kB": lambda r: f"{r.counted_bytes / 1e3:,.1f}",
    "compute": lambda r: f"{r.timing.compute * 1e3:,.0f}",
    "unshaped": lambda r: f"{r.unshaped * 1e3:,.0f}",
    "floor": lambda r: f"{r.timing.floor * 1e3:,.0f}",
    "step": lambda r: f"{r.timing.wall * 1e3:,.0f}",
    "of floor": lambda r: f"{r.timing.of_floor:.2f}",
    "used": lambda r: f"{r.timing.utilisation:.1%}",
    "exposed": lambda r: "" if r.exposed_share is None else f"{r.exposed_share:.1%}",
}
_TARGET_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "steps": lambda r: "n/a" if r.steps is None else str(r.steps),
    "min": lambda r: "n/a" if r.seconds_to_target is None else f"{r.seconds_to_target / 60:,.1f}",
}


def methods_table(rows: Sequence[Row], *, with_target: bool) -> str:
    """Return the table of one rate, with the way to a held-out loss or without."""
    columns = {**_COLUMNS, **(_TARGET_COLUMNS if with_target else {})}
    return markdown(list(columns), [[cell(r) for cell in columns.values()] for r in rows])
