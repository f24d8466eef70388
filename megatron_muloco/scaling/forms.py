"""`Form`: the shape of a law, with its parameters, its residuals and their gradient.

Every law here is a sum of positive terms, and every term is the exponential of something linear in
the parameters once coefficients are stored as logarithms::

    A N^(α + β M) + C  =  exp(ln A + α ln N + β M ln N)  +  exp(ln C)
                          term 0: features 1, ln N, M ln N  term 1: feature 1

So a form is declared by naming, for each term, the feature that multiplies each parameter. Values,
residuals ``ln prediction - ln y``, and their gradient follow (`log_sum`), and so does the split
into coefficients and exponents that variable projection uses. A new form is a function in this file
and a line in `FORMS`.

Sources: "DiLoCo" is arXiv 2503.09799v1, "MuLoCo" arXiv 2505.23725, "Chinchilla" arXiv 2203.15556.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.observations import FloatArray, Observations

__all__ = ["FORMS", "Form", "Parameter", "log_sum", "make_form"]

Feature: TypeAlias = Callable[[Observations], FloatArray]

_EXPONENTS = ("alpha", "beta", "gamma", "delta")


@dataclass(frozen=True)
class Parameter:
    """One number of a law.

    Attributes:
        name: Name in the formula.
        meaning: A phrase for reports.
        unit: The unit; empty for a pure number.
        is_exponent: Whether it is an exponent. Otherwise it is a positive coefficient, which fits
            store as its logarithm.
    """

    name: str
    meaning: str
    unit: str = ""
    is_exponent: bool = False


@dataclass(frozen=True)
class Form:
    """Shape of a law ``y = Σ terms``.

    Attributes:
        name: Key in `FORMS`.
        formula: The law as text, with the names of the variables.
        variables: Variables that it needs.
        parameters: Its p parameters, in the order of every vector of parameters.
        terms: For each term: parameter -> feature that multiplies it. Others are absent.
        source: Paper and table or equation.
    """

    name: str
    formula: str
    variables: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    terms: tuple[Mapping[str, Feature], ...]
    source: str

    @property
    def names(self) -> list[str]:
        """Names of the parameters."""
        return [parameter.name for parameter in self.parameters]

    @property
    def exponents(self) -> list[int]:
        """Indices of the exponents."""
        return [i for i, parameter in enumerate(self.parameters) if parameter.is_exponent]

    @property
    def coefficients(self) -> list[int]:
        """Indices of the coefficients."""
        return [i for i, parameter in enumerate(self.parameters) if not parameter.is_exponent]

    def design(self, points: Observations) -> FloatArray:
        """Return the features, shape (terms, n, p).

        A term without features is a row of zeros, which `log_sum` reads as the number 1:
        `power_unit_offset` uses that.
        """
        design = np.zeros((len(self.terms), len(points), len(self.parameters)))
        for term, features in enumerate(self.terms):
            for name, feature in features.items():
                design[term, :, self.names.index(name)] = feature(points)
        return design

    def natural(self, theta: FloatArray) -> dict[str, float]:
        """Return parameter -> its value, coefficients no longer as logarithms."""
        return {
            parameter.name: float(value if parameter.is_exponent else np.exp(value))
            for parameter, value in zip(self.parameters, theta, strict=True)
        }

    def theta(self, values: Mapping[str, float]) -> FloatArray:
        """Return the vector of parameters with given natural values; inverse of `natural`."""
        return np.array(
            [values[p.name] if p.is_exponent else np.log(values[p.name]) for p in self.parameters]
        )

    def residuals(self, points: Observations, theta: FloatArray) -> FloatArray:
        """Return ``ln prediction - ln y``, shape (n,)."""
        return log_sum(self.design(points), theta)[0] - points.log_values

    def gradient(self, points: Observations, theta: FloatArray) -> FloatArray:
        """Return the derivatives of `residuals` by the parameters, shape (n, p)."""
        return log_sum(self.design(points), theta)[1]

    def with_offset(self, name: str, source: str) -> "Form":
        """Return this form plus a positive constant C, the irreducible term."""
        offset = Parameter("C", "irreducible term", "unit of the response")
        return replace(
            self,
            name=name,
            formula=f"{self.formula} + C",
            parameters=(*self.parameters, offset),
            terms=(*self.terms, {"C": _one}),
            source=source,
        )


def log_sum(design: FloatArray, theta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the logarithm of a sum of terms, shape (n,), and its gradient, shape (n, p).

    Args:
        design: Features, shape (terms, n, p).
        theta: Parameters, shape (p,).
    """
    exponent = design @ theta
    highest = exponent.max(axis=0)
    terms = np.exp(exponent - highest)
    total = terms.sum(axis=0)
    return highest + np.log(total), np.einsum("tn,tnp->np", terms / total, design)


# ---- features -----------------------------------------------------------------------------------


def _one(points: Observations) -> FloatArray:
    return np.ones(len(points))


def _log(variable: str) -> Feature:
    return lambda points: points.log(variable)


def _coefficient(name: str, variables: Sequence[str]) -> Parameter:
    at = " and ".join(f"{variable} = 1" for variable in variables)
    return Parameter(name, f"value of its term at {at}", "unit of the response")


def _exponent(name: str, meaning: str) -> Parameter:
    return Parameter(name, meaning, is_exponent=True)


# ---- forms --------------------------------------------------------------------------------------


def constant(variables: Sequence[str]) -> Form:
    """Return ``A``, the geometric mean: DiLoCo's choice for the outer lr at each M (Figure 7)."""
    return Form(
        "constant",
        "A",
        tuple(variables),
        (Parameter("A", "value everywhere", "unit of the response"),),
        ({"A": _one},),
        "DiLoCo, section 6.3: outer lr per M",
    )


def power(variables: Sequence[str]) -> Form:
    """Return ``A Π x^α``: DiLoCo's laws for loss, inner lr and batch, per M and joint."""
    if len(variables) > len(_EXPONENTS):
        raise ConfigError(
            f"a power law takes at most {len(_EXPONENTS)} variables; given: {', '.join(variables)}."
        )
    names = _EXPONENTS[: len(variables)]
    powers = [f"{variable}^{name}" for variable, name in zip(variables, names, strict=True)]
    return Form(
        "power",
        " · ".join(["A", *powers]),
        tuple(variables),
        (
            _coefficient("A", variables),
            *(_exponent(n, f"power of {v}") for v, n in zip(variables, names, strict=True)),
        ),
        ({"A": _one, **{n: _log(v) for v, n in zip(variables, names, strict=True)}},),
        "DiLoCo, Tables 7 to 10",
    )


def power_offset(variables: Sequence[str]) -> Form:
    """Return ``A Π x^α + C``: a power law with an irreducible term."""
    return power(variables).with_offset("power_offset", "DiLoCo, Table 13, row 2")


def power_unit_offset(variables: Sequence[str]) -> Form:
    """Return ``A Π x^α + 1``: for a response in units of an irreducible term that is known."""
    form = power(variables)
    return replace(
        form,
        name="power_unit_offset",
        formula=f"{form.formula} + 1",
        terms=(*form.terms, {}),
        source="MuLoCo, loss / 1.7105 against compute",
    )


def exponent_linear(variables: Sequence[str]) -> Form:
    """Return ``A x^(α + β z)``: an exponent that is linear in the second variable."""
    x, z = _two("exponent_linear", variables)
    return Form(
        "exponent_linear",
        f"A · {x}^(alpha + beta·{z})",
        (x, z),
        (
            _coefficient("A", (x,)),
            _exponent("alpha", f"power of {x} at {z} = 0"),
            _exponent("beta", f"change of that power per unit of {z}"),
        ),
        ({"A": _one, "alpha": _log(x), "beta": lambda p: p.variables[z] * p.log(x)},),
        "DiLoCo, Table 13, row 3 without C",
    )


def exponent_linear_offset(variables: Sequence[str]) -> Form:
    """Return ``A x^(α + β z) + C``: the best of DiLoCo's parametric forms."""
    form = exponent_linear(variables)
    return form.with_offset("exponent_linear_offset", "DiLoCo, Table 13, row 3")


def exponent_log(variables: Sequence[str]) -> Form:
    """Return ``A x^(α + β ln z)``: an exponent that changes with every doubling of z alike."""
    x, z = _two("exponent_log", variables)
    return Form(
        "exponent_log",
        f"A · {x}^(alpha + beta·ln {z})",
        (x, z),
        (
            _coefficient("A", (x,)),
            _exponent("alpha", f"power of {x} at {z} = 1"),
            _exponent("beta", f"change of that power per unit of ln {z}"),
        ),
        ({"A": _one, "alpha": _log(x), "beta": lambda p: p.log(z) * p.log(x)},),
        "own: Table 13 of DiLoCo, row 3, with ln M for M",
    )


def exponent_log_offset(variables: Sequence[str]) -> Form:
    """Return ``A x^(α + β ln z) + C``."""
    form = exponent_log(variables)
    return form.with_offset("exponent_log_offset", form.source)


def sum_offset(variables: Sequence[str]) -> Form:
    """Return ``A x^α + B z^β + C``: DiLoCo's fourth form in (N, M), Chinchilla's law in (N, D)."""
    x, z = _two("sum_offset", variables)
    form = Form(
        "sum",
        f"A · {x}^alpha + B · {z}^beta",
        (x, z),
        (
            _coefficient("A", (x,)),
            _exponent("alpha", f"power of {x}"),
            _coefficient("B", (z,)),
            _exponent("beta", f"power of {z}"),
        ),
        ({"A": _one, "alpha": _log(x)}, {"B": _one, "beta": _log(z)}),
        "",
    )
    return form.with_offset("sum_offset", "DiLoCo, Table 13, row 4; Chinchilla, equation 2")


def shared_offset(variables: Sequence[str], series: Sequence[str]) -> Form:
    """Return ``A_s x^α_s + C``: one power law a series, and one irreducible term for all of them.

    Source: MuLoCo, loss against compute, one C for all methods.
    """
    if len(variables) != 1 or not series:
        raise ConfigError(
            f"shared_offset fits one variable in several series; given: {', '.join(variables)}, "
            f"{len(series)} series. Name the column of the series."
        )
    (x,) = variables
    parameters: list[Parameter] = []
    features: dict[str, Feature] = {}
    for name in series:
        parameters += [
            replace(_coefficient(f"A[{name}]", (x,)), meaning=f"coefficient of {name}"),
            _exponent(f"alpha[{name}]", f"power of {x} of {name}"),
        ]
        features[f"A[{name}]"] = _in_series(name)
        features[f"alpha[{name}]"] = _log_in_series(x, name)
    form = Form("shared", f"A[s] · {x}^alpha[s]", (x,), tuple(parameters), (features,), "")
    return form.with_offset("shared_offset", "MuLoCo, loss against compute")


def _in_series(name: str) -> Feature:
    return lambda points: np.array([float(series == name) for series in points.series])


def _log_in_series(variable: str, name: str) -> Feature:
    return lambda points: _in_series(name)(points) * points.log(variable)


def _two(name: str, variables: Sequence[str]) -> tuple[str, str]:
    if len(variables) != 2:
        raise ConfigError(
            f"form {name} takes two variables, first the one with the power; given: "
            f"{', '.join(variables) or 'none'}."
        )
    return variables[0], variables[1]


FORMS: Mapping[str, Callable[[Sequence[str]], Form]] = {
    "constant": constant,
    "power": power,
    "power_offset": power_offset,
    "power_unit_offset": power_unit_offset,
    "exponent_linear": exponent_linear,
    "exponent_linear_offset": exponent_linear_offset,
    "exponent_log": exponent_log,
    "exponent_log_offset": exponent_log_offset,
    "sum_offset": sum_offset,
}


def make_form(name: str, points: Observations) -> Form:
    """Return a form over the variables of some points, in their order.

    Raises:
        ConfigError: There is no such form, or it takes another number of variables.
    """
    variables = tuple(points.variables)
    if name == "shared_offset":
        return shared_offset(variables, points.series_names)
    if name not in FORMS:
        known = ", ".join([*FORMS, "shared_offset"])
        raise ConfigError(f"there is no form {name}; choose one of {known}.")
    return FORMS[name](variables)
