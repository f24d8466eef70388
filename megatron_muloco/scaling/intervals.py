"""Uncertainty of a fit: profile likelihood, bootstrap, and leaving points out.

`estimates` gives each parameter an interval and says where the points do not determine it.

- *Profile likelihood* (least squares): all values of a parameter at which the best fit of the
  others raises the sum of squares by at most ``σ² t²``, with Student's t at n - p degrees of
  freedom. Exact for power laws, where it is the t interval of a regression; for others it follows
  the curvature and is not symmetric.
- *Bootstrap* (any method): percentiles over fits to ``prediction x exp(resampled residual)``,
  residuals scaled by sqrt(n / (n - p)); seeded.
- *Prediction*: of one new point, scatter included, from the curvature of least squares.
- *Leaving out*: fit without the points that share a value, predict them. `leave_out` gives
  ``|ln y - ln prediction|``, the residual of DiLoCo's Table 11 (arXiv 2503.09799v1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.fitting import NEGLIGIBLE, Fit, fit, minimise, off_zero, refit
from megatron_muloco.scaling.forms import log_sum
from megatron_muloco.scaling.observations import BoolArray, FloatArray, Observations

__all__ = [
    "INTERVALS", "Estimate", "LeftOut", "bootstrap", "estimates", "leave_out",
    "prediction_interval", "profile",
]  # fmt: skip

INTERVALS = ("profile", "bootstrap")

_WIDE_FACTOR = 100.0  # between the ends of a coefficient's interval
_FARTHEST = 60.0  # standard errors that a profile is followed


@dataclass(frozen=True)
class Estimate:
    """A parameter with its interval.

    Attributes:
        name: Name of the parameter.
        meaning: A phrase for reports.
        value: Best value, coefficients no longer as logarithms.
        low: Lower end; 0 or minus infinity where there is none.
        high: Upper end; infinity where there is none.
        problem: Why the points do not determine it; empty when they do.
    """

    name: str
    meaning: str
    value: float
    low: float
    high: float
    problem: str = ""

    @property
    def determined(self) -> bool:
        """Whether the interval is finite and narrow enough to mean something."""
        return not self.problem


@dataclass(frozen=True)
class LeftOut:
    """Points that a fit did not see, and how well it predicts them.

    Attributes:
        variable: Variable whose value they share.
        value: That value.
        rows: Names of their rows.
        actual: Their response, shape (k,).
        predicted: Prediction without them, shape (k,).
    """

    variable: str
    value: float
    rows: tuple[str, ...]
    actual: FloatArray
    predicted: FloatArray

    @property
    def residuals(self) -> FloatArray:
        """``|ln y - ln prediction|``, shape (k,)."""
        return np.asarray(np.abs(np.log(self.actual) - np.log(self.predicted)), dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean of the residuals."""
        return float(self.residuals.mean())


def estimates(
    found: Fit,
    *,
    interval: str = "",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> list[Estimate]:
    """Return every parameter of a fit with its interval.

    Args:
        found: The fit.
        interval: ``profile`` or ``bootstrap``; by default the profile for least squares and the
            bootstrap for Huber, whose objective is no likelihood.
        level: Coverage of the intervals.
        draws: Number of bootstrap fits.
        seed: Seed of the bootstrap.

    Raises:
        ConfigError: There is no such interval, or a profile of a Huber fit is asked for.
    """
    interval = interval or ("profile" if found.method == "least_squares" else "bootstrap")
    if interval not in INTERVALS:
        raise ConfigError(f"there is no interval {interval}; choose {' or '.join(INTERVALS)}.")
    if interval == "profile":
        ends = [profile(found, index, level) for index in range(len(found.theta))]
    else:
        thetas = bootstrap(found, draws, seed)
        tails = (100 * (1 - level) / 2, 100 * (1 + level) / 2)
        ends = [(float(a), float(b)) for a, b in np.percentile(thetas, tails, axis=0).T]
    return [_estimate(found, index, low, high, level) for index, (low, high) in enumerate(ends)]


def profile(found: Fit, index: int, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of one parameter's profile interval; coefficients as logarithms.

    An end is infinite where the sum of squares stays below the limit as far as `_FARTHEST` standard
    errors: the points do not bound the parameter on that side.
    """
    if found.method != "least_squares":
        raise ConfigError(
            "a profile interval needs a least-squares fit; Huber's loss is no likelihood. Use the "
            "bootstrap."
        )
    theta = off_zero(found)
    jacobian = log_sum(found.design, theta)[1]
    quantile = float(student.ppf((1 + level) / 2, found.freedom))
    error = found.sigma * _inverse_length(jacobian, index)
    if len(found.form.terms) == 1:
        centre = theta[index]
        return centre - quantile * error, centre + quantile * error
    if error == 0:
        return float(theta[index]), float(theta[index])
    if not found.form.parameters[index].is_exponent:
        error = min(error, 1.0)  # larger steps of a logarithm overflow
    return (
        _profile_end(found, theta, index, -error, quantile),
        _profile_end(found, theta, index, error, quantile),
    )


def bootstrap(found: Fit, draws: int = 1000, seed: int = 0) -> FloatArray:
    """Return the parameters of fits to resampled residuals, shape (draws, p)."""
    generator = np.random.default_rng(seed)
    points = found.points
    inflated = found.residuals * np.sqrt(len(points) / found.freedom)
    fitted = points.log_values + found.residuals
    thetas = []
    for _ in range(draws):
        noise = generator.choice(inflated, size=len(points))
        thetas.append(refit(found, points.with_values(np.exp(fitted + noise))).theta)
    return np.array(thetas)


def prediction_interval(
    found: Fit, at: Mapping[str, float], level: float = 0.95
) -> tuple[float, float]:
    """Return the interval of one new response at a point, as a law promises it.

    ``prediction x exp(± t σ sqrt(1 + gᵀ (JᵀJ)⁻¹ g))``, g the gradient of ln y at the point: the
    scatter of a new point and the uncertainty of the law. Exact for power laws, where it is that of
    a regression; for other forms it is the linear approximation at the fit.

    Args:
        found: A least-squares fit.
        at: Variable -> value.
        level: Coverage.

    Raises:
        ConfigError: The fit is a Huber fit, whose σ is no standard deviation.
    """
    if found.method != "least_squares":
        raise ConfigError("a prediction interval needs a least-squares fit.")
    point = found.points.at({name: [value] for name, value in at.items()})
    values, gradients = log_sum(found.form.design(point), found.theta)
    jacobian = log_sum(found.design, found.theta)[1]
    # The shortest x with Jᵀx = g has xᵀx = gᵀ (JᵀJ)⁻¹ g; JᵀJ would square the condition of J.
    solved = np.linalg.lstsq(jacobian.T, gradients[0], rcond=None)[0]
    spread = found.sigma * float(np.sqrt(1 + solved @ solved))
    reach = float(student.ppf((1 + level) / 2, found.freedom)) * spread
    return float(np.exp(values[0] - reach)), float(np.exp(values[0] + reach))


def leave_out(found: Fit, by: str, values: Sequence[float] | None = None) -> list[LeftOut]:
    """Return how well each value of a variable is predicted from the points without it.

    Args:
        found: The fit to all points; its form and method are fitted again.
        by: Variable whose values are left out, one at a time.
        values: Values to leave out; all by default. `[max]` is the test of the DiLoCo paper.

    Raises:
        ConfigError: The points without a value are too few for the form.
    """
    column = _column(found.points, by)
    out = []
    for value in np.unique(column).tolist() if values is None else values:
        chosen: BoolArray = np.isclose(column, value, rtol=1e-9)
        if not chosen.any():
            raise ConfigError(f"no point has {by} = {value:g}; it cannot be left out.")
        out.append(_left_out(found, by, value, chosen))
    return out


def _left_out(found: Fit, by: str, value: float, chosen: BoolArray) -> LeftOut:
    hidden, seen = found.points.where(chosen), found.points.where(~chosen)
    # A fresh fit with all starts: the minimum without a point may be another one.
    again = fit(found.form, seen, method=found.method, delta=found.delta)
    return LeftOut(by, float(value), tuple(hidden.rows), hidden.values, again.predict_rows(hidden))


def _column(points: Observations, by: str) -> FloatArray:
    columns: Mapping[str, FloatArray] = points.variables
    if by not in columns:
        raise ConfigError(f"{by} is no variable of this fit; leave out by {', '.join(columns)}.")
    return columns[by]


# ---- profile ------------------------------------------------------------------------------------


def _inverse_length(jacobian: FloatArray, index: int) -> float:
    """Return the square root of one diagonal element of (JᵀJ)⁻¹."""
    column = jacobian[:, index]
    others = np.delete(jacobian, index, axis=1)
    if others.shape[1]:
        column = column - others @ np.linalg.lstsq(others, column, rcond=None)[0]
    length = float(np.linalg.norm(column))
    return 1 / length if length > 0 else float("inf")


def _profile_end(
    found: Fit, centre_theta: FloatArray, index: int, step: float, quantile: float
) -> float:
    """Return where the signed root of the likelihood ratio reaches a quantile, by false position.

    The root is nearly linear in the parameter, so a few refits of the others are enough.
    """
    best = float(found.residuals @ found.residuals)
    free = [i for i in range(len(found.theta)) if i != index]
    target = found.points.log_values
    centre = float(centre_theta[index])

    def root(distance: float, start: FloatArray) -> tuple[float, FloatArray]:
        trial = start.copy()
        trial[index] = centre + distance * step
        ends = [minimise(found.design, target, trial, free=free)]
        shares = log_sum(found.design, ends[0])[1].max(axis=0)
        lost = [i for i in found.form.coefficients if i != index and shares[i] < NEGLIGIBLE]
        if lost:  # a descent does not come back from zero, so try from the other side as well
            trial[lost] = target.min() + np.log(0.5)
            ends.append(minimise(found.design, target, trial, free=free))
        sums = [float(((log_sum(found.design, end)[0] - target) ** 2).sum()) for end in ends]
        lowest = int(np.argmin(sums))
        return float(np.sqrt(max(0.0, sums[lowest] - best))) / found.sigma, ends[lowest]

    # Refits start from the inner end of the bracket. The outer one may lie in a flat valley, from
    # which the way back to the best fit is long.
    inner, inner_root, nearest, outer = 0.0, 0.0, centre_theta, quantile
    while True:
        outer_root, theta = root(outer, nearest)
        if outer_root >= quantile:
            break
        inner, inner_root, nearest, outer = outer, outer_root, theta, 1.7 * outer
        if outer > _FARTHEST:
            return float(np.sign(step) * np.inf)
    for _ in range(40):
        width = outer - inner
        guess = inner + width * (quantile - inner_root) / (outer_root - inner_root)
        # False position may creep from one side; the margin lets the bracket shrink from both.
        distance = float(np.clip(guess, inner + 0.05 * width, outer - 0.05 * width))
        value, theta = root(distance, nearest)
        if abs(value - quantile) < 1e-3 * quantile:
            return centre + distance * step
        if value < quantile:
            inner, inner_root, nearest = distance, value, theta
        else:
            outer, outer_root = distance, value
    return centre + outer * step


# ---- what is not determined ---------------------------------------------------------------------


def _estimate(found: Fit, index: int, low: float, high: float, level: float) -> Estimate:
    parameter = found.form.parameters[index]
    value = float(found.theta[index])
    if parameter.is_exponent:
        problem = _exponent_problem(value, low, high)
        return Estimate(parameter.name, parameter.meaning, value, low, high, problem)
    with np.errstate(over="ignore"):
        ends = float(np.exp(low)), float(np.exp(high))
    problem = _coefficient_problem(found, index, *ends, level)
    return Estimate(parameter.name, parameter.meaning, float(np.exp(value)), *ends, problem)


def _exponent_problem(value: float, low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "ill-conditioned: the points do not bound it"
    if high - low <= max(2 * abs(value), 1e-12):
        return ""
    if low < 0 < high:
        return "its interval includes 0 and is wider than twice its value: no trend is shown"
    return "ill-conditioned: its interval is wider than twice its value"


def _coefficient_problem(found: Fit, index: int, low: float, high: float, level: float) -> str:
    if _share(found, index) < NEGLIGIBLE:
        return "at zero: the points show no such term"
    if low <= 0.0 and not np.isfinite(high):
        return "ill-conditioned: the points do not bound it"
    if low <= 0.0 or not np.isfinite(high):
        side = "from below; it may be 0" if low <= 0.0 else "from above"
        return f"ill-conditioned: the points do not bound it {side}"
    if high / low > _WIDE_FACTOR:
        return f"its {level:.0%} interval spans a factor {high / low:.2g}"
    return ""


def _share(found: Fit, index: int) -> float:
    """Return the largest share of a coefficient's term in a prediction."""
    return float(log_sum(found.design, found.theta)[1][:, index].max())
