"""Arithmetic of the comparison: from readings to step times, floors and time to a loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from .readings import Points, Reading

__all__ = [
    "Costs",
    "Timing",
    "exposed_per_round",
    "floor_seconds",
    "relative_difference",
    "step_seconds",
    "steps_to",
]


@dataclass(frozen=True, slots=True)
class Costs:
    """Quantities of a method that the byte model needs.

    Attributes:
        bytes_per_step: Bytes that the busiest rank sends, by the planner; a round's mean for
            replicas.
        steps_per_round: H, 1 for data parallelism.
    """

    bytes_per_step: float
    steps_per_round: int


@dataclass(frozen=True, slots=True)
class Timing:
    """An inner step at one rate, outer steps included.

    Attributes:
        compute: Seconds without the network.
        wall: Seconds as measured.
        floor: Smallest number of seconds that the byte model allows.
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
        compute: Seconds without the network.
        bytes_per_step: Bytes sent by one rank.
        mbit: Rate of its link; ``None`` sends in no time.
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
