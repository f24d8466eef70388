"""Fits find known laws, their intervals cover them, and what cannot be fitted is refused."""

import itertools

import numpy as np
import pytest

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.fitting import Fit, fit, minimise
from megatron_muloco.scaling.forms import FORMS, Form, make_form
from megatron_muloco.scaling.intervals import bootstrap, estimates, leave_out, profile
from megatron_muloco.scaling.observations import Observations

SIZES = np.geomspace(35e6, 2.4e9, 7)
REPLICAS = np.array([1.0, 2.0, 4.0, 8.0])
TRUE = {
    "constant": {"A": 0.6},
    "power": {"A": 19.2, "alpha": -0.0985, "beta": 0.0116},
    "power_offset": {"A": 36.0, "alpha": -0.155, "beta": 0.019, "C": 1.0},
    "power_unit_offset": {"A": 36.0, "alpha": -0.155, "beta": 0.019},
    "exponent_linear": {"A": 19.2, "alpha": -0.0985, "beta": 0.0006},
    "exponent_linear_offset": {"A": 36.0, "alpha": -0.155, "beta": 0.0003, "C": 1.0},
    "exponent_log": {"A": 19.2, "alpha": -0.0985, "beta": 0.001},
    "exponent_log_offset": {"A": 36.0, "alpha": -0.155, "beta": 0.001, "C": 1.0},
    "sum_offset": {"A": 36.0, "alpha": -0.155, "B": 0.06, "beta": 0.6, "C": 1.0},
    "shared_offset": {
        "A[dp]": 36.0, "alpha[dp]": -0.155, "A[muon]": 40.0, "alpha[muon]": -0.162, "C": 1.0,
    },
}  # fmt: skip


def grid(name: str) -> Observations:
    if name == "shared_offset":
        series = ["dp"] * len(SIZES) + ["muon"] * len(SIZES)
        return Observations({"N": np.tile(SIZES, 2)}, np.ones(2 * len(SIZES)), "loss", (), series)
    sizes, replicas = (axis.ravel() for axis in np.meshgrid(SIZES, REPLICAS))
    return Observations({"N": sizes, "M": replicas}, np.ones(len(sizes)), "loss")


def drawn(name: str, noise: float, seed: int = 0) -> tuple[Form, Observations]:
    """Return a form and points of its true law with relative noise."""
    points = grid(name)
    form = make_form(name, points)
    clean = -form.residuals(points, form.theta(TRUE[name]))  # of y = 1: minus ln prediction
    errors = noise * np.random.default_rng(seed).standard_normal(len(points))
    return form, points.with_values(np.exp(errors - clean))


def test_every_form_is_tested() -> None:
    assert set(TRUE) == {*FORMS, "shared_offset"}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("least_squares", name) for name in TRUE),
        ("huber", "power"),  # one term
        ("huber", "power_offset"),  # several
    ],
)
def test_a_law_without_noise_is_found(method: str, name: str) -> None:
    form, points = drawn(name, noise=0)
    assert fit(form, points, method=method).values == pytest.approx(TRUE[name], rel=1e-4)


@pytest.mark.parametrize("name", TRUE)
def test_gradients_are_those_of_the_residuals(name: str) -> None:
    form, points = drawn(name, noise=0.01)
    theta = form.theta(TRUE[name])
    for index, step in enumerate(1e-6 * np.eye(len(theta))):
        ahead, behind = form.residuals(points, theta + step), form.residuals(points, theta - step)
        slope = form.gradient(points, theta)[:, index]
        assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-6)


def coverage(name: str, draws: int) -> dict[str, float]:
    """Return parameter -> share of draws whose 95 % interval covers the true value."""
    covered = dict.fromkeys(TRUE[name], 0)
    for seed in range(draws):
        form, points = drawn(name, noise=0.003, seed=seed)
        for found in estimates(fit(form, points)):
            covered[found.name] += found.low <= TRUE[name][found.name] <= found.high
    return {parameter: count / draws for parameter, count in covered.items()}


@pytest.mark.parametrize("name", [name for name in TRUE if not name.endswith("offset")])
def test_intervals_cover_the_truth(name: str) -> None:
    assert min(coverage(name, draws=200).values()) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRUE if name.endswith("offset")])
def test_intervals_of_laws_with_an_offset_cover_the_truth(name: str) -> None:
    shares = coverage(name, draws=200)
    print(name, shares)
    assert min(shares.values()) >= 0.9


def test_profile_ends_raise_the_sum_of_squares_alike() -> None:
    form, points = drawn("power_offset", noise=0.003)
    found = fit(form, points)
    design, target = form.design(points), points.log_values
    sums = []
    for index, end in itertools.product(range(4), (0, 1)):
        theta = found.theta.copy()
        theta[index] = profile(found, index)[end]
        free = [i for i in range(4) if i != index]
        residuals = form.residuals(points, minimise(design, target, theta, free=free))
        sums.append(residuals @ residuals)
    assert sums == pytest.approx([sums[0]] * len(sums), rel=0.01)
    assert sums[0] > found.residuals @ found.residuals


def test_profile_of_a_power_law_is_the_interval_of_a_regression() -> None:
    form, points = drawn("power", noise=0.01)
    found = fit(form, points)
    design = form.design(points)[0]
    error = found.sigma * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    low, high = np.array([profile(found, index) for index in range(3)]).T
    assert high - low == pytest.approx(2 * 2.0595 * error, rel=1e-3)  # t of 25 degrees of freedom


def test_bootstraps_are_seeded_and_as_wide_as_profiles() -> None:
    found = fit(*drawn("power_offset", noise=0.003))
    assert np.array_equal(bootstrap(found, 20, seed=1), bootstrap(found, 20, seed=1))
    assert not np.array_equal(bootstrap(found, 20, seed=1), bootstrap(found, 20, seed=2))
    wide, exact = (estimates(found, interval=kind, draws=300) for kind in ("bootstrap", "profile"))
    for one, other in zip(wide, exact, strict=True):
        assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.35)


def test_huber_ignores_an_outlier() -> None:
    form, points = drawn("power_offset", noise=1e-4)
    values = points.values.copy()
    values[3] *= 1.2
    robust = fit(form, points.with_values(values), method="huber")
    assert robust.agreeing > robust.starts / 2
    assert robust.values["alpha"] == pytest.approx(-0.155, rel=0.02)
    plain = fit(form, points.with_values(values))
    assert abs(plain.values["alpha"] + 0.155) > 2 * abs(robust.values["alpha"] + 0.155)


def test_leaving_out_predicts_what_was_not_seen() -> None:
    found = fit(*drawn("power_offset", noise=0))
    for left in leave_out(found, "N"):
        assert len(left.rows) == 4
        assert left.mean < 1e-5
    with pytest.raises(ConfigError, match="D is no variable of this fit; leave out by N, M"):
        leave_out(found, "D")


# ---- what the points do not determine -----------------------------------------------------------


def short_span() -> Fit:
    """Return a law with an offset over half an octave of sizes: C could be anything."""
    sizes = np.geomspace(1e9, 1.4e9, 8)
    errors = 0.003 * np.random.default_rng(4).standard_normal(8)
    values = (36 * sizes**-0.155 + 1.0) * np.exp(errors)
    return fit("power_offset", Observations({"N": sizes}, values, "loss"))


def test_an_offset_that_the_points_do_not_show_is_reported() -> None:
    problems = {e.name: e.problem for e in estimates(short_span())}
    assert "ill-conditioned" in problems["C"] or "at zero" in problems["C"]
    found = {e.name: e for e in estimates(short_span())}
    # The truth, C = 1 and alpha = -0.155, is among the many laws that fit.
    assert found["C"].low == 0.0
    assert found["C"].high > 1.0
    assert found["alpha"].low < -0.155
    assert "ill-conditioned" in found["alpha"].problem
    assert short_span().condition > 1e3


def test_a_pure_power_law_shows_no_offset() -> None:
    _, points = drawn("power", noise=0.001)
    found = estimates(fit("power_offset", points))
    assert next(e for e in found if e.name == "C").low == 0.0


# ---- refusals -----------------------------------------------------------------------------------


def points(count: int, **columns: object) -> Observations:
    variables = columns or {"N": np.geomspace(1e8, 1e9, count)}
    return Observations(variables, np.linspace(3, 2, count), "loss")


@pytest.mark.parametrize(
    ("form", "given", "sentence"),
    [
        (
            "power_offset",
            points(3),
            r"power_offset \(A · N\^alpha \+ C\) has 3 parameters and needs at least 4 points of "
            r"loss, but there are 3",
        ),
        ("exponent_linear", points(5), "takes two variables.* given: N"),
        (
            "power",
            points(6, N=np.geomspace(1e8, 1e9, 6), M=np.full(6, 4.0)),
            "M has one value in all 6 points",
        ),
        (
            "power",
            points(6, N=np.geomspace(1e8, 1e9, 6), D=20 * np.geomspace(1e8, 1e9, 6)),
            "cannot tell the parameters of .* apart: N and D change together",
        ),
        ("cubic", points(6), "there is no form cubic; choose one of constant, power"),
        ("shared_offset", points(6), "Name the column of the series"),
    ],
)
def test_what_cannot_be_fitted_is_refused(form: str, given: Observations, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fit(form, given)


def test_values_without_a_logarithm_are_refused_with_their_rows() -> None:
    with pytest.raises(ConfigError) as error:
        Observations({"N": [1e8, -1.0]}, [np.nan, 2.0], "loss", ["a.csv:2", "a.csv:3"])
    assert error.value.problems == (
        "N is not a positive finite number at a.csv:3 (-1); laws are fitted to logarithms. Correct "
        "these rows or leave them out.",
        "loss is not a positive finite number at a.csv:2 (nan); laws are fitted to logarithms. "
        "Correct these rows or leave them out.",
    )


def test_options_are_checked() -> None:
    form, given = drawn("power", noise=0.01)
    with pytest.raises(ConfigError, match="there is no method newton"):
        fit(form, given, method="newton")
    with pytest.raises(ConfigError, match="use at least 100"):
        fit(form, given, starts=10)
    huber = fit(form, given, method="huber")
    with pytest.raises(ConfigError, match="Huber's loss is no likelihood"):
        estimates(huber, interval="profile")
    with pytest.raises(ConfigError, match="M is not given"):
        huber.predict({"N": [1e9]})
    with pytest.raises(ConfigError, match="different lengths"):
        Observations({"N": [1.0]}, np.ones(2))
