"""Shared parts of the one-rank benchmarks: the demo as one rank, and median intervals."""

import numpy as np

__all__ = ["ALONE", "median_interval"]

# The demo's config as one rank without an outer step, files or evaluations.
ALONE = (
    "parallel.num_replicas=1",
    "training.eval_interval=0",
    "outer.kind=none",
    "outer.lr=null",
    "outer.momentum=null",
    "outer.sync_interval=null",
    "checkpoint.dir=null",
    "checkpoint.save_interval=0",
    "monitor.dir=null",
    "monitor.sample_tokens=0",
)
_RESAMPLES = 10_000  # chosen: the interval then hardly depends on the draws


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median of ``values`` and its bootstrap 95 % interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)
