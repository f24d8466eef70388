"""`Observations`: the points that a law is fitted to, checked when they are made.

A point has variables (size, tokens, replicas, ...), one response (loss, lr, batch, ...), the name
of the row it comes from, and optionally the series it belongs to. Laws are fitted to logarithms, so
everything is positive and finite here; what is not is refused with the names of its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_muloco.errors import ConfigError

__all__ = ["BoolArray", "FloatArray", "Observations", "listed"]

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

_SHOWN = 5


@dataclass(frozen=True)
class Observations:
    """Points of one table, in the table's order.

    Attributes:
        variables: Name of a variable -> its values, shape (n,), positive; units as in the table.
        values: The response, shape (n,), positive.
        response: Name of the response.
        rows: Name of each point's row, for messages.
        series: Name of each point's series; empty where there is one.

    Raises:
        ConfigError: Lengths differ, or a value is not positive and finite; all rows are named.
    """

    variables: Mapping[str, FloatArray]
    values: FloatArray
    response: str = "y"
    rows: Sequence[str] = ()
    series: Sequence[str] = ()
    _logs: Mapping[str, FloatArray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = {
            **{name: np.asarray(v, dtype=np.float64) for name, v in self.variables.items()},
            self.response: np.asarray(self.values, dtype=np.float64),
        }
        count = len(columns[self.response])
        if not self.rows:
            object.__setattr__(self, "rows", tuple(f"point {i + 1}" for i in range(count)))
        lengths = {name: len(column) for name, column in columns.items()}
        lengths["rows"] = len(self.rows)
        if self.series:
            lengths["series"] = len(self.series)
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"columns have different lengths: {lengths}; give one value a point.")
        problems = [
            f"{name} is not a positive finite number at {listed(bad)}; laws are fitted to "
            f"logarithms. Correct these rows or leave them out."
            for name, column in columns.items()
            if (
                bad := [
                    f"{self.rows[i]} ({column[i]:g})"
                    for i in np.flatnonzero(~(np.isfinite(column) & (column > 0))).tolist()
                ]
            )
        ]
        if problems:
            raise ConfigError(problems)
        values = columns.pop(self.response)
        object.__setattr__(self, "variables", columns)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "_logs", {name: np.log(v) for name, v in columns.items()})

    def __len__(self) -> int:
        return len(self.values)

    @property
    def log_values(self) -> FloatArray:
        """Natural logarithms of the response, shape (n,)."""
        return np.log(self.values)

    @property
    def series_names(self) -> list[str]:
        """Names of the series in the order of their first points."""
        return list(dict.fromkeys(self.series))

    def log(self, variable: str) -> FloatArray:
        """Return the natural logarithms of a variable, shape (n,)."""
        return self._logs[variable]

    def where(self, chosen: BoolArray) -> "Observations":
        """Return the points that a mask of shape (n,) chooses."""
        index = np.flatnonzero(chosen).tolist()
        return Observations(
            {name: column[index] for name, column in self.variables.items()},
            self.values[index],
            self.response,
            [self.rows[i] for i in index],
            [self.series[i] for i in index] if self.series else (),
        )

    def with_values(self, values: FloatArray) -> "Observations":
        """Return the same points with another response, as a bootstrap needs them."""
        return Observations(self.variables, values, self.response, self.rows, self.series)

    def at(self, points: Mapping[str, FloatArray | Sequence[float]]) -> "Observations":
        """Return points with given variables and a response of 1, to predict at.

        Raises:
            ConfigError: A variable of the fit is not given.
        """
        missing = [name for name in self.variables if name not in points]
        if missing:
            raise ConfigError(
                f"a prediction of {self.response} needs {', '.join(self.variables)}; "
                f"{', '.join(missing)} is not given."
            )
        columns = {name: np.atleast_1d(np.asarray(points[name], float)) for name in self.variables}
        return Observations(columns, np.ones(len(next(iter(columns.values())))), self.response)


def listed(names: Sequence[str]) -> str:
    """Return the first names of a long list and how many follow."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
