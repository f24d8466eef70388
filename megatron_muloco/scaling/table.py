"""`read_table`: any CSV of runs, checked, as columns; `points_of` makes observations of it.

The reader knows nothing about names: `Columns` says which column is the size, the loss and so on.
Lines that begin with ``#`` are comments; the separator may be a comma, semicolon or tab. Numbers
may end in K, M, B, G or T (``350M``, ``1.3B``). A row is named ``file.csv:12`` in messages.

Batches are tokens inside. A table in sequences is converted with its sequence length, so laws of
different tables can be compared.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.observations import BoolArray, FloatArray, Observations, listed

__all__ = [
    "BATCH_UNITS", "REPEATS", "Columns", "Table", "check_repeats", "drop_non_finite",
    "mean_of_repeats", "points_of", "read_batches", "read_runs", "read_table", "without_repeats",
]  # fmt: skip

BATCH_UNITS = ("tokens", "sequences")
REPEATS = ("refuse", "mean")

_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# More than this between the smallest and the largest size, token count or batch of one table is a
# mixture of units: sweeps reach three decades, and units differ by at least six.
_LARGEST_SPAN = 3e5
# A hole of this size in the grid of batches: sequences below it and tokens above. Grids are powers
# of 2 or 4.
_LARGEST_GAP = 32.0


@dataclass(frozen=True)
class Table:
    """Rows of a CSV file as text.

    Attributes:
        path: The file, for messages.
        columns: Name of a column -> its cells, one a row.
        lines: Line number of each row in the file.
    """

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]

    @property
    def rows(self) -> list[str]:
        """Name of each row."""
        return [f"{self.path.name}:{line}" for line in self.lines]

    def column(self, name: str) -> Sequence[str]:
        """Return a column.

        Raises:
            ConfigError: There is no such column.
        """
        if name not in self.columns:
            raise ConfigError(
                f"{self.path} has no column {name}; its columns are {', '.join(self.columns)}."
            )
        return self.columns[name]

    def numbers(self, name: str) -> FloatArray:
        """Return a column as numbers; ``nan`` and ``inf`` are numbers, an empty cell is nan.

        Raises:
            ConfigError: A cell is no number, or only some cells have a suffix; rows are named.
        """
        cells = [cell.strip() for cell in self.column(name)]
        numbers, bad, suffixed = np.full(len(cells), np.nan), [], np.zeros(len(cells), bool)
        for index, cell in enumerate(cells):
            try:
                numbers[index], suffixed[index] = _number(cell)
            except ValueError:
                bad.append(f"{self.rows[index]} ({cell!r})")
        if bad:
            raise ConfigError(
                f"{name} is no number at {listed(bad)}. Write a number, such as 1.3e9 or 1.3B."
            )
        small = ~suffixed & (numbers < 1e5)
        if suffixed.any() and small.any():
            raise ConfigError(
                f"{name} mixes units: {self.rows[int(suffixed.argmax())]} has a suffix "
                f"({cells[int(suffixed.argmax())]}) and {self.rows[int(small.argmax())]} has not "
                f"({cells[int(small.argmax())]}). Write all of them in one unit."
            )
        return numbers

    def where(self, chosen: BoolArray) -> "Table":
        """Return the rows that a mask chooses."""
        index = np.flatnonzero(chosen).tolist()
        columns = {name: [cells[i] for i in index] for name, cells in self.columns.items()}
        return Table(self.path, columns, [self.lines[i] for i in index])

    def only(self, column: str, value: str) -> "Table":
        """Return the rows whose cell has a value, compared as numbers where both are.

        Raises:
            ConfigError: No row has it.
        """
        cells = self.column(column)
        chosen = np.array([_same(cell, value) for cell in cells], bool)
        if not chosen.any():
            found = ", ".join(dict.fromkeys(cells))
            raise ConfigError(f"{self.path}: no row has {column} = {value}; it has {found}.")
        return self.where(chosen)


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a sweep, and the unit of its batches.

    Attributes:
        loss: Final loss, nats per token.
        lr: Inner learning rate.
        batch: Global batch.
        size: Parameters, N; empty where the table has none.
        tokens: Training tokens, D; empty where the table has none.
        others: Further columns that tell cells apart, such as replicas or H.
        batch_unit: One of `BATCH_UNITS`.
        seq_length: Tokens per sequence; needed where the unit is sequences.
    """

    loss: str
    lr: str
    batch: str
    size: str = ""
    tokens: str = ""
    others: tuple[str, ...] = ()
    batch_unit: str = "tokens"
    seq_length: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns that tell cells apart."""
        return tuple(name for name in (self.size, self.tokens, *self.others) if name)

    def __post_init__(self) -> None:
        problems = []
        if self.batch_unit not in BATCH_UNITS:
            problems.append(
                f"batch unit {self.batch_unit} is unknown; choose one of {', '.join(BATCH_UNITS)}."
            )
        if self.batch_unit == "sequences" and not self.seq_length:
            problems.append(_no_length(self.batch))
        if not self.keys:
            problems.append("no column tells cells apart; name the column of the size or tokens.")
        if problems:
            raise ConfigError(problems)


def read_table(path: Path) -> Table:
    """Read a CSV file.

    Raises:
        ConfigError: The file cannot be read, is empty, or a row has another number of cells.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a table: {error}.") from error
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    if len(lines) < 2:
        raise ConfigError(f"{path} has no rows; a table has a line of names and one row a run.")
    separator = max(",;\t", key=lines[0][1].count)
    names, *rows = csv.reader((line for _, line in lines), delimiter=separator)
    names = [name.strip() for name in names]
    numbers = [number for number, _ in lines[1:]]
    wrong = [
        f"{path.name}:{number} ({len(row)})"
        for number, row in zip(numbers, rows, strict=True)
        if len(row) != len(names)
    ]
    if wrong or len(set(names)) < len(names):
        reason = f"rows with another number of cells: {listed(wrong)}" if wrong else "a name twice"
        raise ConfigError(f"{path} has {len(names)} columns ({', '.join(names)}) and {reason}.")
    columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
    return Table(path, columns, numbers)


def read_runs(table: Table, columns: Columns) -> Observations:
    """Return the runs of a sweep: response loss, variables lr, batch in tokens, and the keys.

    Losses may be nan or inf here only if the caller has dropped them: `drop_non_finite`.

    Raises:
        ConfigError: A column is missing, a value is no positive number, or units are mixed.
    """
    variables = {name: table.numbers(name) for name in columns.keys}
    variables["lr"] = table.numbers(columns.lr)
    for name in columns.keys:
        _check_one_unit(table, name, variables[name])
    variables["batch"] = read_batches(table, columns.batch, columns.batch_unit, columns.seq_length)
    return Observations(variables, table.numbers(columns.loss), columns.loss, table.rows)


def read_batches(
    table: Table, column: str, batch_unit: str = BATCH_UNITS[0], seq_length: int | None = None
) -> FloatArray:
    """Return a column of batches, in tokens.

    Raises:
        ConfigError: The column is missing or mixes units, a batch is less than a sequence, or the
            length of sequences is not given.
    """
    batches = table.numbers(column)
    _check_one_unit(table, column, batches)
    _check_no_hole(column, batches)
    if batch_unit == "sequences":
        if not seq_length:
            raise ConfigError(_no_length(column))
        return batches * seq_length
    if seq_length and (batches < seq_length).any():
        row = int(np.argmax(batches < seq_length))
        raise ConfigError(
            f"{table.rows[row]}: a batch of {batches[row]:g} tokens is less than one sequence of "
            f"{seq_length}. If column {column} counts sequences, say so."
        )
    return batches


def points_of(
    table: Table,
    response: str,
    variables: Sequence[str],
    series: str = "",
    repeats: str = "refuse",
) -> Observations:
    """Return columns of a table as observations.

    Args:
        table: The table.
        response: Column of the response.
        variables: Columns of the variables.
        series: Column of the series; empty where there is one.
        repeats: One of `REPEATS`: rows that agree in all variables and differ in the response are
            refused, or become one with their mean.

    Raises:
        ConfigError: A column is missing, units are mixed, a value is not positive and finite, or
            two rows agree in all variables and differ in the response.
    """
    columns = {name: table.numbers(name) for name in variables}
    for name, column in columns.items():
        _check_one_unit(table, name, column)
    labels = table.column(series) if series else ()
    points = Observations(columns, table.numbers(response), response, table.rows, labels)
    return without_repeats(points, repeats)


def drop_non_finite(table: Table, loss: str) -> tuple[Table, list[str]]:
    """Return the rows with a finite loss, and the names of the others."""
    finite = np.isfinite(table.numbers(loss))
    return table.where(finite), [table.rows[i] for i in np.flatnonzero(~finite).tolist()]


def without_repeats(points: Observations, repeats: str) -> Observations:
    """Return points with repeats refused or averaged, as one of `REPEATS` says."""
    if repeats == "mean":
        return mean_of_repeats(points)
    check_repeats(points)
    return points


def check_repeats(points: Observations) -> None:
    """Refuse rows that agree in every variable and differ in the response.

    Raises:
        ConfigError: Names each pair.
    """
    seen: dict[tuple[object, ...], int] = {}
    problems = []
    for index, key in enumerate(_keys(points)):
        first = seen.setdefault(key, index)
        if points.values[first] != points.values[index]:
            problems.append(
                f"{points.rows[first]} and {points.rows[index]} are the same point "
                f"({_described(points, index)}) with {points.response} {points.values[first]:g} "
                f"and {points.values[index]:g}. Name the column that tells them apart, average "
                f"them, or leave one out."
            )
    if problems:
        raise ConfigError(problems)


def mean_of_repeats(points: Observations) -> Observations:
    """Return points in which rows that agree in every variable are one, with the mean response."""
    places: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(_keys(points)):
        places.setdefault(key, []).append(index)
    firsts = np.zeros(len(points), bool)
    firsts[[group[0] for group in places.values()]] = True
    means = [float(np.mean(points.values[group])) for group in places.values()]
    return points.where(firsts).with_values(np.array(means))


def _keys(points: Observations) -> list[tuple[object, ...]]:
    columns = [np.round(points.log(name), 9).tolist() for name in points.variables]
    columns += [list(points.series)] if points.series else []
    return list(zip(*columns, strict=True))


def _described(points: Observations, index: int) -> str:
    parts = [f"{name} = {column[index]:g}" for name, column in points.variables.items()]
    return ", ".join(parts)


def _no_length(column: str) -> str:
    return (
        f"column {column} counts sequences, and their length is not given: batches in tokens are "
        f"unknown. Give the sequence length."
    )


def _check_one_unit(table: Table, name: str, column: FloatArray) -> None:
    positive = np.where(np.isfinite(column) & (column > 0), column, np.nan)
    if np.isnan(positive).all():
        return
    low, high = int(np.nanargmin(positive)), int(np.nanargmax(positive))
    if positive[high] / positive[low] > _LARGEST_SPAN:
        raise ConfigError(
            f"{name} mixes units: {positive[low]:g} at {table.rows[low]} and {positive[high]:g} at "
            f"{table.rows[high]}. Write all rows in one unit."
        )


def _check_no_hole(name: str, batches: FloatArray) -> None:
    grid = np.unique(batches[batches > 0])
    steps = grid[1:] / grid[:-1]
    if len(steps) and steps.max() >= _LARGEST_GAP:
        hole = int(steps.argmax())
        raise ConfigError(
            f"column {name} mixes units: no batch is between {grid[hole]:g} and "
            f"{grid[hole + 1]:g}. Write all rows in tokens, or all in sequences."
        )


def _number(cell: str) -> tuple[float, bool]:
    """Return a cell's number, and whether it has a suffix."""
    if not cell:
        return float("nan"), False
    factor = _SUFFIXES.get(cell[-1].upper()) if cell[-1].isalpha() else None
    if factor is None or cell[:-1].lower() in ("", "na"):
        return float(cell), False
    return float(cell[:-1]) * factor, True


def _same(cell: str, value: str) -> bool:
    try:
        return _number(cell.strip())[0] == _number(value)[0]
    except ValueError:
        return cell.strip() == value
