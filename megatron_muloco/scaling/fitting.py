"""`fit`: the parameters of a form, by least squares or a Huber loss on logarithms.

The objective is ``Σ ρ(ln prediction - ln y)`` with ``ρ(r) = r²/2``, or Huber's, which is linear
beyond δ. Three steps find its minimum:

1. *Starts.* A form of one term is linear in its parameters and needs none. Otherwise each of at
   least 100 deterministic starts (a Halton sequence over the exponents, and log-linear fits after
   subtracting fractions of the smallest value) gets its coefficients by variable projection: with
   the exponents fixed, the law is linear in its coefficients, and non-negative least squares on
   relative residuals gives them.
2. *Descent.* Huber: L-BFGS from every start, in coordinates that make the features orthonormal
   (untransformed, ln A and α are so correlated that L-BFGS stops far from the minimum). Least
   squares: only the starts with the lowest objective go on.
3. *Polish.* Levenberg-Marquardt (`minimise`) from the best points, to rounding.

Sources: DiLoCo (arXiv 2503.09799v1), section 6: least squares on logarithms for power laws, Huber
with L-BFGS and 256 starts for other forms; Chinchilla (arXiv 2203.15556), section D.2, δ = 1e-3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.stats import qmc

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.forms import Form, log_sum, make_form
from megatron_muloco.scaling.observations import FloatArray, Observations

__all__ = [
    "HUBER_DELTA", "METHODS", "NEGLIGIBLE", "Fit", "endpoints", "fit", "minimise", "off_zero",
    "refit",
]  # fmt: skip

HUBER_DELTA = 1e-3  # Chinchilla, section D.2; DiLoCo does not print its own
METHODS = ("least_squares", "huber")
STARTS = 128
NEGLIGIBLE = 1e-3  # largest share in a prediction of a term that the points do not show

_POLISHED = 6  # of the starts, for least squares
_FLOOR = 1e-6  # of the smallest response: a coefficient that is projected to zero starts here
_OFFSETS = (0.0, 0.25, 0.5, 0.75, 0.9)  # fractions of the smallest response


@dataclass(frozen=True)
class Fit:
    """A form with the parameters that fit some points best.

    Attributes:
        form: The form.
        points: What it was fitted to.
        theta: Parameters, shape (p,); coefficients as logarithms.
        delta: Huber's δ in units of the logarithm; infinite for least squares.
        starts: Number of starts; 1 where the minimum has a closed form.
        followed: How many starts were followed to a minimum.
        agreeing: How many of those ended within 1 % of the best objective.
    """

    form: Form
    points: Observations
    theta: FloatArray
    delta: float = np.inf
    starts: int = 1
    followed: int = 1
    agreeing: int = 1

    @property
    def method(self) -> str:
        """``least_squares`` or ``huber``."""
        return "least_squares" if np.isinf(self.delta) else "huber"

    @property
    def values(self) -> dict[str, float]:
        """Parameter -> value, coefficients no longer as logarithms."""
        return self.form.natural(self.theta)

    @cached_property
    def design(self) -> FloatArray:
        """Features at the points, shape (terms, n, p)."""
        return self.form.design(self.points)

    @cached_property
    def residuals(self) -> FloatArray:
        """``ln prediction - ln y``, shape (n,)."""
        return log_sum(self.design, self.theta)[0] - self.points.log_values

    @property
    def freedom(self) -> int:
        """Degrees of freedom, n - p."""
        return len(self.points) - len(self.theta)

    @property
    def sigma(self) -> float:
        """Standard deviation of the residuals, sqrt(RSS / (n - p)); relative, as ln y is fitted."""
        return float(np.sqrt(self.residuals @ self.residuals / self.freedom))

    @property
    def objective(self) -> float:
        """``Σ ρ(residual)``."""
        return float(_rho(self.residuals, self.delta).sum())

    @cached_property
    def condition(self) -> float:
        """Condition number of the Jacobian after scaling its columns to length 1.

        1 means that the parameters act independently; 1e6 means that some combination of them
        changes predictions by only a millionth.
        """
        jacobian = log_sum(self.design, self.theta)[1]
        lengths = np.linalg.norm(jacobian, axis=0)
        if not lengths.all():
            return float("inf")
        return float(np.linalg.cond(jacobian / lengths))

    def predict(self, points: Mapping[str, FloatArray | Sequence[float]]) -> FloatArray:
        """Return the response at points, variable -> values of shape (k,); shape (k,)."""
        return np.exp(log_sum(self.form.design(self.points.at(points)), self.theta)[0])

    def predict_rows(self, points: Observations) -> FloatArray:
        """Return the response at the points of another table, which has the same series."""
        return np.exp(log_sum(self.form.design(points), self.theta)[0])


def fit(
    form: Form | str,
    points: Observations,
    *,
    method: str = "least_squares",
    delta: float = HUBER_DELTA,
    starts: int = STARTS,
) -> Fit:
    """Fit a form to points.

    Args:
        form: A form, or the name of one over all variables of the points.
        points: The points; at least one more than the form has parameters.
        method: One of `METHODS`.
        delta: Huber's δ on the residual of ln y; without effect on least squares.
        starts: Number of starts, at least 100.

    Raises:
        ConfigError: Too few points, or points that cannot tell the parameters apart.
    """
    form = make_form(form, points) if isinstance(form, str) else form
    if method not in METHODS:
        raise ConfigError(f"there is no method {method}; choose one of {', '.join(METHODS)}.")
    if starts < 100:
        raise ConfigError(f"{starts} starts may miss the minimum; use at least 100.")
    _check_identifiable(form, points)
    width = np.inf if method == "least_squares" else delta
    design, target = form.design(points), points.log_values
    if len(form.terms) == 1:
        theta = np.linalg.lstsq(design[0], target, rcond=None)[0]
        theta = theta if np.isinf(width) else minimise(design, target, theta, width)
        return Fit(form, points, theta, width)
    ends = endpoints(form, points, width, starts)
    best = min(ends, key=lambda end: end[0])
    agreeing = sum(objective <= 1.01 * best[0] for objective, _ in ends)
    theta = minimise(design, target, best[1], width)
    return Fit(form, points, theta, width, starts, len(ends), agreeing)


def refit(found: Fit, points: Observations) -> Fit:
    """Fit the form of a fit to other points by its method, starting from its parameters.

    For points that differ a little, such as those of a bootstrap or of leaving one out.
    """
    theta = minimise(found.form.design(points), points.log_values, off_zero(found), found.delta)
    return Fit(found.form, points, theta, found.delta)


def off_zero(found: Fit) -> FloatArray:
    """Return a fit's parameters with vanished coefficients raised to where they have an effect.

    Coefficients are logarithms, so a descent cannot leave zero: the gradient vanishes there.
    """
    shares = log_sum(found.design, found.theta)[1].max(axis=0)
    raised = [index for index in found.form.coefficients if shares[index] < NEGLIGIBLE]
    if not raised:
        return found.theta
    target = found.points.log_values
    theta = found.theta.copy()
    theta[raised] = target.min() + np.log(NEGLIGIBLE)
    others = [index for index in range(len(theta)) if index not in raised]
    return minimise(found.design, target, theta, found.delta, others)


def endpoints(
    form: Form, points: Observations, delta: float, starts: int = STARTS
) -> list[tuple[float, FloatArray]]:
    """Return the objective and the parameters where each descent ends.

    With a finite δ there is one L-BFGS descent a start. With an infinite one only the starts with
    the lowest objective descend.
    """
    design, target = form.design(points), points.log_values
    begins = [
        _project(form, design, np.exp(target), exponents)
        for exponents in _exponent_starts(form, design, target, starts)
    ]
    if np.isinf(delta):
        begins.sort(key=lambda theta: _objective(design, target, theta, delta))
        ends = [minimise(design, target, theta, delta) for theta in begins[:_POLISHED]]
    else:
        ends = _lbfgs(design, target, begins, delta)
    return [(_objective(design, target, theta, delta), theta) for theta in ends]


def minimise(
    design: FloatArray,
    target: FloatArray,
    theta: FloatArray,
    delta: float = np.inf,
    free: Sequence[int] | None = None,
) -> FloatArray:
    """Return the parameters of the nearest minimum, by Levenberg-Marquardt.

    Args:
        design: Features, shape (terms, n, p).
        target: ln y, shape (n,).
        theta: Where to start, shape (p,).
        delta: Huber's δ; handled by weights min(1, δ/|r|) that are renewed every step.
        free: Indices of the parameters that may move; all by default.
    """
    free = list(range(len(theta)) if free is None else free)
    theta, damping = theta.copy(), 1e-3
    values, jacobian = log_sum(design, theta)
    residuals = values - target
    objective = _rho(residuals, delta).sum()
    for _ in range(200):
        weights = np.sqrt(np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300)))
        scaled = jacobian[:, free] * weights[:, None]
        lengths = np.linalg.norm(scaled, axis=0) + 1e-300
        # Stacking the damping below the Jacobian keeps its condition number; the normal equations
        # would square it, and ln A and α are correlated to four digits and more.
        left = np.vstack([scaled / lengths, np.sqrt(damping) * np.eye(len(free))])
        right = np.concatenate([-residuals * weights, np.zeros(len(free))])
        trial = theta.copy()
        trial[free] += np.linalg.lstsq(left, right, rcond=None)[0] / lengths
        with np.errstate(over="ignore", invalid="ignore"):
            values, trial_jacobian = log_sum(design, trial)
            lower = _rho(values - target, delta).sum()
        if np.isfinite(lower) and lower < objective:
            done = objective - lower <= 1e-13 * objective
            theta, residuals, jacobian, objective = trial, values - target, trial_jacobian, lower
            damping = max(damping / 10, 1e-15)
            if done:
                break
        elif damping > 1e6:
            break
        else:
            damping *= 10
    return theta


def _rho(residuals: FloatArray, delta: float) -> FloatArray:
    size = np.abs(residuals)
    if np.isinf(delta):
        return residuals**2 / 2
    return np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))


def _objective(design: FloatArray, target: FloatArray, theta: FloatArray, delta: float) -> float:
    return float(_rho(log_sum(design, theta)[0] - target, delta).sum())


# ---- starts -------------------------------------------------------------------------------------


def _exponent_starts(
    form: Form, design: FloatArray, target: FloatArray, count: int
) -> list[FloatArray]:
    """Return exponents to start from, each of shape (number of exponents,).

    The scale of an exponent is the spread of ln y over the spread of its feature: with it alone the
    term would explain all of the response.
    """
    exponents = form.exponents
    spreads = np.ptp(design, axis=1).max(axis=0)[exponents]
    scale = np.ptp(target) / np.maximum(spreads, 1e-12)
    first = design[0]
    starts = []
    for fraction in _OFFSETS:
        rest = np.log(np.exp(target) - fraction * np.exp(target.min()))
        starts.append(np.linalg.lstsq(first, rest, rcond=None)[0][exponents])
    uniform = 2 * qmc.Halton(len(exponents), scramble=False).random(count + 1)[1:] - 1
    # Squared, so that half of the starts are within one scale and the farthest at four.
    starts += list(4 * scale * uniform * np.abs(uniform))
    return starts[:count]


def _project(
    form: Form, design: FloatArray, values: FloatArray, exponents: FloatArray
) -> FloatArray:
    """Return parameters with given exponents and the coefficients that fit best, shape (p,).

    Minimises Σ (prediction / y - 1)² over coefficients that are not negative. Terms without a
    coefficient are known once the exponents are.
    """
    theta = np.zeros(len(form.parameters))
    theta[form.exponents] = exponents
    powers = np.exp(np.clip(design @ theta, -500, 500))
    columns = (design[:, :, form.coefficients] * powers[:, :, None]).sum(axis=0) / values[:, None]
    known = powers[~design[:, :, form.coefficients].any(axis=(1, 2))].sum(axis=0) / values
    sizes = np.maximum(columns.max(axis=0), 1e-300)
    found, _ = nnls(columns / sizes, 1 - known)
    theta[form.coefficients] = np.log(np.maximum(found, _FLOOR) / sizes)
    return theta


# ---- descent ------------------------------------------------------------------------------------


def _lbfgs(
    design: FloatArray, target: FloatArray, begins: Sequence[FloatArray], delta: float
) -> list[FloatArray]:
    stacked = design.reshape(-1, design.shape[2])
    _, singular, right = np.linalg.svd(stacked, full_matrices=False)
    to_theta = right.T / singular * np.sqrt(len(stacked))
    to_whitened = np.linalg.inv(to_theta)

    def objective(whitened: FloatArray) -> tuple[float, FloatArray]:
        values, jacobian = log_sum(design, to_theta @ whitened)
        residuals = values - target
        slope = jacobian.T @ np.clip(residuals, -delta, delta)
        # In units of δ²: the tolerances of L-BFGS are absolute where the gradient is concerned.
        return float(_rho(residuals, delta).sum()) / delta**2, to_theta.T @ slope / delta**2

    options = {"maxiter": 1000, "ftol": 1e-10, "gtol": 1e-6}
    return [
        to_theta
        @ minimize(objective, to_whitened @ begin, jac=True, method="L-BFGS-B", options=options).x
        for begin in begins
    ]


# ---- refusals -----------------------------------------------------------------------------------


def _check_identifiable(form: Form, points: Observations) -> None:
    """Refuse points that are too few for a form, or that cannot tell its parameters apart."""
    count, needed = len(points), len(form.parameters) + 1
    if count < needed:
        raise ConfigError(
            f"{form.name} ({form.formula}) has {needed - 1} parameters and needs at least {needed} "
            f"points of {points.response}, but there are {count}. With fewer it passes through "
            f"every point and its error is unknown. Add points or choose a form with fewer "
            f"parameters."
        )
    if not np.isfinite(form.design(points)).all():
        raise ConfigError(f"{form.name}: a feature of {form.formula} is not finite at some point.")
    constant = [v for v in form.variables if np.ptp(points.log(v)) == 0]
    if constant and form.exponents:
        raise ConfigError(
            f"{' and '.join(constant)} has one value in all {count} points, so {form.formula} "
            f"cannot be fitted: its power of {' and '.join(constant)} could be anything. Leave the "
            f"variable out or add points with another value."
        )
    stacked = form.design(points)[0] if len(form.terms) == 1 else _stacked(form, points)
    lengths = np.maximum(np.linalg.norm(stacked, axis=0), 1e-300)
    if np.linalg.matrix_rank(stacked / lengths, tol=1e-7 * np.sqrt(len(stacked))) < needed - 1:
        raise ConfigError(
            f"the points cannot tell the parameters of {form.formula} apart: "
            f"{' and '.join(form.variables)} change together in all {count} points (tokens = 20 x "
            f"size is such a case). Fit one of them, or add points where only one changes."
        )


def _stacked(form: Form, points: Observations) -> FloatArray:
    return form.design(points).reshape(-1, len(form.parameters))
