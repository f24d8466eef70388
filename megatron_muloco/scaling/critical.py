"""`critical`: three measures of the largest batch that costs no more tokens.

- *Largest batch near the best loss*: of runs with equal tokens, the largest batch whose loss is
  within 1 % of the best one. MuLoCo (arXiv 2505.23725).
- *Steps to a target*: S(B) = S_min (1 + B_noise / B) steps reach a loss (McCandlish et al., arXiv
  1812.06162, equation 2.7, in tokens instead of examples). Training with B then needs
  S_min (B + B_noise) tokens. The critical batch is the one that needs 20 % more tokens than small
  batches do (Zhang et al., arXiv 2410.21676): 0.2 B_noise by the law.
- *Branches*: from one checkpoint, a window of equal tokens with batches k·B. The largest batch
  whose loss stays within a tolerance of that of k = 1 (Merrill et al., arXiv 2505.23971).

All three ask for the largest batch of a curve that stays below a limit: `largest_below`. Batches
are tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.observations import FloatArray, Observations

__all__ = [
    "FACTOR", "OVERHEAD", "Largest", "LossCurve", "StepsLaw", "critical_batch", "first_reach",
    "fit_steps", "interval", "largest_below", "loss_curve", "pooled_spread",
]  # fmt: skip

FACTOR = 1.01  # MuLoCo, figure of critical batches
OVERHEAD = 0.2  # Zhang et al.
_LEAST_BATCHES = 3
_UNDETERMINED = 100.0  # between the ends of an interval
_FARTHEST = 10.0  # between the noise batch and the batches: beyond it, noise passes for curvature


# ---- the largest batch below a limit ------------------------------------------------------------


@dataclass(frozen=True)
class Largest:
    """The largest batch of a curve whose value is at most a limit.

    Attributes:
        limit: The limit.
        best: Batch with the lowest value.
        grid: Largest tried batch at most at the limit.
        value: Where the curve crosses the limit, straight lines between points in log2 batch;
            infinite where the largest batch that was tried is below the limit.
        notes: What makes it doubtful.
    """

    limit: float
    best: float
    grid: float
    value: float
    notes: tuple[str, ...] = ()

    @property
    def beyond(self) -> bool:
        """Whether it lies beyond the batches that were tried, so `grid` is only a bound."""
        return bool(np.isinf(self.value))


def largest_below(batches: Sequence[float], values: Sequence[float], limit: float) -> Largest:
    """Return the largest batch whose value is at most a limit.

    Args:
        batches: Different batches, at least three.
        values: Value at each, such as a loss.
        limit: The limit, not below the lowest value.

    Raises:
        ConfigError: There are fewer batches, or one twice.
    """
    order = np.argsort(batches)
    grid, curve = np.asarray(batches, float)[order], np.asarray(values, float)[order]
    if len(grid) < _LEAST_BATCHES or len(np.unique(grid)) < len(grid):
        raise ConfigError(
            f"a critical batch needs at least {_LEAST_BATCHES} different batches; there are "
            f"{', '.join(f'{batch:g}' for batch in grid)}."
        )
    below, best = curve <= limit, int(curve.argmin())
    last = int(np.flatnonzero(below)[-1])
    notes = []
    if not below[best:last].all():
        first = grid[best:last][~below[best:last]][0]
        notes.append(f"the curve is above the limit at {first:g} and comes back below it")
    if last == len(grid) - 1:
        notes.append(f"beyond the grid: {grid[-1]:g}, the largest batch, is within the limit")
        return Largest(limit, float(grid[best]), float(grid[-1]), np.inf, tuple(notes))
    share = (limit - curve[last]) / (curve[last + 1] - curve[last])
    value = 2 ** (np.log2(grid[last]) + share * np.log2(grid[last + 1] / grid[last]))
    return Largest(limit, float(grid[best]), float(grid[last]), float(value), tuple(notes))


def critical_batch(
    batches: Sequence[float], losses: Sequence[float], factor: float = FACTOR
) -> float:
    """Return the largest tried batch whose loss is within a factor of the best loss.

    Source: MuLoCo (arXiv 2505.23725), figure of critical batches, factor 1.01.

    Raises:
        ConfigError: The largest batch that was tried is within the factor: it is only a bound. Or
            see `largest_below`.
    """
    found = largest_below(batches, losses, factor * min(losses))
    if found.beyond:
        raise ConfigError(
            f"the loss at the largest batch, {found.grid:g}, is within {factor:g} of the best: the "
            f"critical batch lies beyond the grid. Try larger batches."
        )
    return found.grid


# ---- loss against batch -------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCurve:
    """The lowest loss at each batch of a cell, over learning rates and other tuned values.

    Attributes:
        batches: Batches in tokens, ascending, shape (n,).
        losses: Mean over seeds at the best setting, shape (n,).
        lrs: Learning rate of the best setting, shape (n,).
        counts: Seeds at the best setting, shape (n,).
        notes: Batches whose best learning rate is at an end of its grid.
    """

    batches: FloatArray
    losses: FloatArray
    lrs: FloatArray
    counts: FloatArray
    notes: tuple[str, ...]


def loss_curve(runs: Observations) -> LossCurve:
    """Return the loss curve of a cell.

    Args:
        runs: Variables lr and batch; response loss. The series of a run is the text of its other
            tuned values. Runs that agree in all of these are repeats with other seeds.
    """
    best: dict[float, tuple[float, float, int]] = {}
    rates: dict[float, set[float]] = {}
    for (batch, lr, _), losses in _repeats(runs).items():
        mean = float(np.mean(losses))
        rates.setdefault(batch, set()).add(lr)
        if batch not in best or mean < best[batch][0]:
            best[batch] = (mean, lr, len(losses))
    grid = sorted(best)
    ends = [
        f"{batch:g}" for batch in grid if best[batch][1] in (min(rates[batch]), max(rates[batch]))
    ]
    notes = []
    if ends and len(set().union(*rates.values())) > 1:  # with one rate none was tuned
        notes = [f"the best learning rate is at an end of its grid at batch {', '.join(ends)}"]
    columns = np.array([best[batch] for batch in grid], float).T
    return LossCurve(np.array(grid), columns[0], columns[1], columns[2], tuple(notes))


def pooled_spread(cells: Sequence[Observations]) -> float | None:
    """Return the standard deviation of the loss over seeds, relative, pooled over all settings.

    Returns:
        None where no setting was run with two seeds.
    """
    squares, freedom = 0.0, 0
    for runs in cells:
        for losses in _repeats(runs).values():
            logs = np.log(losses)
            squares += float(((logs - logs.mean()) ** 2).sum())
            freedom += len(losses) - 1
    return float(np.sqrt(squares / freedom)) if freedom else None


def interval(
    curve: LossCurve,
    spread: float,
    *,
    factor: float = FACTOR,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval of the critical batch that the spread over seeds gives.

    Percentiles over curves whose losses are redrawn with the standard error of their means. The
    choice of the learning rate is not repeated. An infinite end lies beyond the grid.

    Args:
        curve: The curve.
        spread: Relative standard deviation over seeds, from `pooled_spread`.
        factor: Limit over the best loss.
        level: Coverage.
        draws: Number of curves.
        seed: Seed of the draws.
    """
    noise = np.random.default_rng(seed).standard_normal((draws, len(curve.losses)))
    drawn = curve.losses * np.exp(noise * spread / np.sqrt(curve.counts))
    found = np.sort(
        [largest_below(curve.batches.tolist(), row, factor * row.min()).value for row in drawn]
    )
    # Values of the sample, because between a number and infinity nothing can be interpolated.
    low, high = (round(share * (draws - 1)) for share in ((1 - level) / 2, (1 + level) / 2))
    return float(found[low]), float(found[high])


def _repeats(runs: Observations) -> dict[tuple[float, float, str], list[float]]:
    """Return the losses of each (batch, lr, other settings)."""
    settings = runs.series or [""] * len(runs)
    found: dict[tuple[float, float, str], list[float]] = {}
    columns = (runs.variables["batch"].tolist(), runs.variables["lr"].tolist(), settings)
    for batch, lr, setting, loss in zip(*columns, runs.values.tolist(), strict=True):
        found.setdefault((batch, lr, setting), []).append(loss)
    return found


# ---- steps to a target --------------------------------------------------------------------------


def first_reach(steps: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the step at which a loss first reaches a target; None if it never does.

    A straight line is drawn from the last point above the target to the first one at or below it.

    Raises:
        ConfigError: The first point is at or below the target, so its step is only a bound.
    """
    order = np.argsort(steps)
    at, curve = np.asarray(steps, float)[order], np.asarray(losses, float)[order]
    reached = np.flatnonzero(curve <= target)  # a nan is no loss, and compares as False
    if not len(reached):
        return None
    first = int(reached[0])
    if first == 0:
        raise ConfigError(
            f"the first loss, {curve[0]:g} at step {at[0]:g}, is already at the target {target:g}, "
            f"so the step that reached it is unknown. Use a lower target, or evaluate more often."
        )
    share = (curve[first - 1] - target) / (curve[first - 1] - curve[first])
    return float(at[first - 1] + share * (at[first] - at[first - 1]))


@dataclass(frozen=True)
class StepsLaw:
    """``S(B) = s_min (1 + b_noise / B)``, fitted to steps that reach a target.

    Attributes:
        s_min: Steps that no batch can go below.
        b_noise: Batch that needs twice as many, in tokens; 95 % interval from `low` to `high`.
        low: Lower end.
        high: Upper end; infinite where the points do not bound it.
        sigma: Standard deviation of ln S around the law.
        problem: Why the points do not determine it; empty when they do.
    """

    s_min: float
    b_noise: float
    low: float
    high: float
    sigma: float
    problem: str = ""

    def critical(self, overhead: float = OVERHEAD) -> float:
        """Return the batch that needs a fraction more tokens than the smallest batches, in tokens.

        S(B) B = s_min (B + b_noise) is (1 + B / b_noise) times its value for B -> 0.
        """
        return overhead * self.b_noise

    def steps(self, batch: FloatArray) -> FloatArray:
        """Return S at batches in tokens."""
        return np.asarray(self.s_min * (1 + self.b_noise / batch), dtype=np.float64)


def fit_steps(batches: Sequence[float], steps: Sequence[float]) -> StepsLaw:
    """Fit the law of steps by least squares of ln S.

    Args:
        batches: Batches in tokens, at least three different ones.
        steps: Steps that reached the target with each.

    Raises:
        ConfigError: There are fewer batches.
    """
    grid, counts = np.asarray(batches, float), np.asarray(steps, float)
    if len(np.unique(grid)) < _LEAST_BATCHES:
        raise ConfigError(
            f"a law of steps needs at least {_LEAST_BATCHES} batches that reach the target; there "
            f"are {len(np.unique(grid))}. Add batches, or use a target that more runs reach."
        )

    def residuals(theta: FloatArray) -> FloatArray:
        prediction = np.logaddexp(theta[0], theta[0] + theta[1] - np.log(grid))
        return np.asarray(prediction - np.log(counts), dtype=np.float64)

    # S = a + b / B is linear: with weights 1/S it is close to the fit of ln S.
    design = np.stack([np.ones_like(grid), 1 / grid], axis=1) / counts[:, None]
    a, b = np.linalg.lstsq(design, np.ones_like(grid), rcond=None)[0]
    a, b = max(a, 1e-6 * counts.min()), max(b, 1e-6 * float((counts * grid).min()))
    found = least_squares(residuals, np.log([a, b / a]), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    freedom = len(grid) - 2
    sigma = float(np.sqrt(2 * found.cost / freedom))
    # The residuals' change with theta is (1, weight of the second term).
    precision = found.jac.T @ found.jac
    determinant = float(np.linalg.det(precision))
    if determinant > 1e-14 * float(precision[0, 0]) ** 2:
        error = sigma * float(np.sqrt(np.linalg.inv(precision)[1, 1]))
        reach = min(float(student.ppf(0.975, freedom)) * error, 600.0)
    else:
        reach = np.inf
    b_noise = float(np.exp(found.x[1]))
    low, high = b_noise * np.exp(-reach), b_noise * np.exp(reach)
    problem = ""
    outside = max(b_noise / grid.max(), grid.min() / b_noise) > _FARTHEST
    if outside or not high <= _UNDETERMINED * low:
        problem = (
            "b_noise is not determined: steps fall as 1 / batch everywhere, or not at all. Add "
            "batches at the other end."
        )
    return StepsLaw(float(np.exp(found.x[0])), b_noise, float(low), float(high), sigma, problem)
