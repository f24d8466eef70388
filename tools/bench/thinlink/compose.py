"""Arithmetic of the comparison: from readings to step times, floors and time to a loss."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from .readings import Points, Reading

__all__ = [
    "Costs",
    "Timing",
    "compute_seconds",
    "disturbed_steps",
    "exposed_per_round",
    "floor_seconds",
    "relative_difference",
    "step_seconds",
    "steps_to",
]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the byte model needs to know of a method.

    Attributes:
        bytes_per_step: That the busiest rank sends, by the planner; over a round for replicas.
        steps_per_round: H, 1 for data parallelism.
    """

    bytes_per_step: float
    steps_per_round: int


@dataclass(frozen=True, slots=True)
class Timing:
    """An inner step at one rate, outer steps included.

    Attributes:
        compute: Seconds of it without the network.
        wall: Seconds of it as measured.
        floor: Seconds that the byte model allows at best.
    """

    compute: float
    wall: float
    floor: float

    @property
    def utilisation(self) -> float:
        """Share of the time in which a rank computes."""
        return self.compute / self.wall

    @property
    def of_floor(self) -> float:
        """Floor over measurement: 1 is all that the byte model allows."""
        return self.floor / self.wall


def floor_seconds(compute: float, bytes_per_step: float, mbit: float | None) -> float:
    """Return the byte model's step time: compute, then its bytes at the nominal rate, no headers.

    Args:
        compute: Seconds.
        bytes_per_step: Sent by one rank.
        mbit: Of its link; ``None`` sends in no time.
    """
    return compute + (0.0 if mbit is None else bytes_per_step * 8e-6 / mbit)


def step_seconds(reading: Reading, steps_per_round: int) -> float:
    """Return the mean seconds of an inner step in the window, outer steps included.

    Raises:
        ValueError: Nothing was measured in the window.
    """
    if steps_per_round == 1:
        return _mean(reading.within("step_s"))
    return _mean(reading.within("round_ms")) / 1e3 / steps_per_round


def compute_seconds(reading: Reading, disturbed: Collection[int]) -> float:
    """Return the mean seconds of the window's inner steps in which no outer step takes part.

    Args:
        reading: Of a method with replicas.
        disturbed: Steps that are left out.

    Raises:
        ValueError: None is left.
    """
    return _mean([point for point in reading.within("step_s") if point[0] not in disturbed])


def disturbed_steps(
    events: Collection[int], in_flight: Collection[int], steps: Collection[int]
) -> set[int]:
    """Return those of ``steps`` whose time holds something of an outer step.

    The time of an outer step belongs to the line of the inner step after it.

    Args:
        events: Steps after which something is launched or applied.
        in_flight: Steps after which something is under way; the next one computes beside it.
        steps: Inner steps that are measured.
    """
    beside = {step for step in steps if step - 1 in in_flight}
    following = {step for step in steps if step - 1 in events}
    # With an overlap that fills the round there is always something under way.
    return following | beside if len(following | beside) < len(steps) else following


def exposed_per_round(reading: Reading, steps_per_round: int) -> float:
    """Return the mean milliseconds of a round that training waited for outer steps."""
    rounds = (reading.window.last - reading.window.first) / steps_per_round
    return sum(value for _, value in reading.within("exposed_ms")) / rounds


def steps_to(validation: Points, target: float) -> int | None:
    """Return the first evaluated step with a loss of at most ``target``, ``None`` if none."""
    return next((step for step, loss in validation if loss <= target), None)


def relative_difference(
    ours: Sequence[float], theirs: Sequence[float]
) -> tuple[float, float | None]:
    """Return the mean of paired differences, ours - theirs, over the mean of theirs.

    Returns:
        It, and half of its 95 % interval by Student's t, ``None`` for a single pair.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    scale, pairs = fmean(theirs), len(ours)
    differences = [(a - b) / scale for a, b in zip(ours, theirs, strict=True)]
    if pairs == 1:
        return differences[0], None
    half = float(t.ppf(0.975, pairs - 1)) * stdev(differences) / sqrt(pairs)
    return fmean(differences), half


def _mean(points: Points) -> float:
    if not points:
        raise ValueError("no point lies within the window")
    return fmean(value for _, value in points)
