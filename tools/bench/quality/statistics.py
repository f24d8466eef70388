"""Paired differences over seeds, their intervals, and the verdicts on claims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from tools.bench.quality.grid import Rule

CONFIDENCE = 0.95
EQUAL_PERCENT = 0.5
"""Mean differences up to this, in percent of the loss, count as none."""

Losses = Mapping[str, Mapping[int, float]]
"""Variant -> seed -> held-out loss, nats per token."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its t-interval, in the unit of the samples.

    Attributes:
        mean: Mean of the samples.
        half_width: Half width at `CONFIDENCE`; ``nan`` with fewer than two samples.
        count: Number of samples.
    """

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width


def interval(samples: Sequence[float]) -> Interval:
    """Return the mean of the samples with Student's interval for it."""
    count = len(samples)
    if count < 2:
        return Interval(float(np.mean(samples)), float("nan"), count)
    error = float(np.std(samples, ddof=1)) / count**0.5
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Interval(float(np.mean(samples)), quantile * error, count)


def percent_differences(losses: Losses, variant: str, baseline: str) -> dict[int, float]:
    """Return 100 x (variant - baseline) / baseline per seed that both have."""
    ours, theirs = losses.get(variant, {}), losses.get(baseline, {})
    return {
        seed: 100 * (ours[seed] - theirs[seed]) / theirs[seed]
        for seed in sorted(set(ours) & set(theirs))
    }


def verdict(rule: Rule, difference: Interval) -> str:
    """Return the verdict on a claim, ``-`` where there was none.

    ``equal`` and ``no worse`` go by the mean alone, against `EQUAL_PERCENT`; ``better`` is shown
    only where the whole interval is below zero.
    """
    if rule is Rule.SHOWN:
        return "-"
    if rule is Rule.EQUAL:
        return _shown(abs(difference.mean) <= EQUAL_PERCENT)
    if rule is Rule.NO_WORSE:
        return _shown(difference.mean <= EQUAL_PERCENT)
    if difference.high < 0:
        return "shown"
    return "in the mean only" if difference.mean < 0 else "not shown"


def rise(losses: Losses, names: Sequence[str]) -> dict[int, float]:
    """Return by how many percent the last variant's loss is above the first's, per seed."""
    return percent_differences(losses, names[-1], names[0])


def does_not_fall(losses: Losses, names: Sequence[str]) -> bool | None:
    """Return whether the mean loss falls by no more than `EQUAL_PERCENT` from one to the next.

    ``None`` where two neighbours have no seed in common.
    """
    steps = [percent_differences(losses, later, earlier) for earlier, later in pairwise(names)]
    if not all(steps):
        return None
    return all(interval(list(step.values())).mean >= -EQUAL_PERCENT for step in steps)


def rises_less(losses: Losses, ours: Sequence[str], theirs: Sequence[str]) -> Interval | None:
    """Return our rise minus theirs in percentage points, paired; ``None`` without a seed."""
    left, right = rise(losses, ours), rise(losses, theirs)
    seeds = sorted(set(left) & set(right))
    return interval([left[seed] - right[seed] for seed in seeds]) if seeds else None


def _shown(holds: bool) -> str:
    return "shown" if holds else "not shown"
