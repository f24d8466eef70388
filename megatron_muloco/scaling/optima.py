"""`optima`: the best learning rate and batch of every cell of a sweep, their laws, and the regret.

A *cell* is the runs of a sweep that share size, tokens and what else tells cells apart. Its optimum
is found as in DiLoCo (arXiv 2503.09799v1, section 6.2): for every batch the lowest loss over
learning rates, then a parabola in log2 batch through the lowest points, whose minimum is the
optimal batch. The learning rate is found alike, with the roles exchanged. Only a window around the
best point enters the parabola, because losses rise faster than a parabola towards divergence.

An optimum whose best run is at the end of a grid is only a bound. Such a cell is named and takes no
part in the laws of either knob.

The *regret* of a law in a cell it did not see: how much more the run nearest to the law's learning
rate and batch lost than the best run of the cell, as a fraction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.forms import make_form
from megatron_muloco.scaling.observations import FloatArray, Observations

__all__ = [
    "KNOBS", "Cell", "Optimum", "Regret", "cells_of", "interior", "law_variables", "optimum_laws",
    "parabola_minimum", "regrets",
]  # fmt: skip

KNOBS = ("lr", "batch")

_WINDOW = 2  # grid points on each side of the best one that enter the parabola


@dataclass(frozen=True)
class Optimum:
    """Where the loss is lowest along one knob of a cell, minimised over the other.

    Attributes:
        knob: ``lr`` or ``batch``.
        value: Minimum of the parabola; the best grid point where it is at an edge.
        loss: Loss of the parabola there.
        best: The best grid point.
        edge: Why it is only a bound; empty for an interior optimum.
    """

    knob: str
    value: float
    loss: float
    best: float
    edge: str = ""


@dataclass(frozen=True)
class Cell:
    """Runs that share their keys.

    Attributes:
        keys: Column -> value.
        runs: Variables lr, batch in tokens; response loss.
    """

    keys: Mapping[str, float]
    runs: Observations

    @property
    def name(self) -> str:
        """The keys as text."""
        return ", ".join(f"{column} = {value:.4g}" for column, value in self.keys.items())

    @property
    def best_loss(self) -> float:
        """Loss of the best run."""
        return float(self.runs.values.min())

    def optimum(self, knob: str) -> Optimum:
        """Return the optimum along one knob."""
        grid, losses = self._lowest(knob)
        best = int(losses.argmin())
        edge = ""
        if len(grid) < 3:
            edge = f"{len(grid)} values of {knob}; a parabola needs 3"
        elif best in (0, len(grid) - 1):
            side = "smallest" if best == 0 else "largest"
            edge = f"the best {knob}, {grid[best]:.4g}, is the {side} that was tried"
        if edge:
            return Optimum(knob, float(grid[best]), float(losses[best]), float(grid[best]), edge)
        window = slice(max(0, best - _WINDOW), best + _WINDOW + 1)
        minimum = parabola_minimum(np.log2(grid[window]), losses[window])
        low, high = np.log2(grid[best - 1]), np.log2(grid[best + 1])
        if minimum is None or not low <= minimum[0] <= high:
            # An outlier bends the parabola away; the three lowest points always hold the minimum.
            near = slice(best - 1, best + 2)
            minimum = parabola_minimum(np.log2(grid[near]), losses[near])
        if minimum is None:
            flat = f"the loss does not depend on {knob} around {grid[best]:.4g}"
            return Optimum(knob, float(grid[best]), float(losses[best]), float(grid[best]), flat)
        return Optimum(knob, float(2 ** minimum[0]), minimum[1], float(grid[best]))

    def _lowest(self, knob: str) -> tuple[FloatArray, FloatArray]:
        """Return the grid of a knob and the lowest loss at each of its points."""
        values = self.runs.variables[knob]
        grid = np.unique(np.round(np.log2(values), 6), return_inverse=True)
        losses = np.full(len(grid[0]), np.inf)
        np.minimum.at(losses, grid[1], self.runs.values)
        firsts = [float(values[np.argmax(grid[1] == i)]) for i in range(len(grid[0]))]
        return np.array(firsts), losses


@dataclass(frozen=True)
class Regret:
    """What the laws of the other cells cost in a cell that they did not see.

    Attributes:
        cell: The cell.
        predicted: Knob -> value of the laws.
        row: Name of the run nearest to them in log2 lr and log2 batch.
        loss: Loss of that run.
        outside: Knobs whose prediction is outside the cell's grid.
    """

    cell: Cell
    predicted: Mapping[str, float]
    row: str
    loss: float
    outside: tuple[str, ...]

    @property
    def value(self) -> float:
        """(loss - best loss) / best loss."""
        return self.loss / self.cell.best_loss - 1


def cells_of(runs: Observations, keys: Sequence[str]) -> list[Cell]:
    """Return the cells of a sweep, in the order of their keys."""
    columns = np.stack([runs.variables[name] for name in keys], axis=1)
    cells = []
    for row in np.unique(columns, axis=0):
        members = runs.where((columns == row).all(axis=1))
        knobs = {knob: members.variables[knob] for knob in KNOBS}
        values = {name: float(value) for name, value in zip(keys, row, strict=True)}
        cells.append(Cell(values, Observations(knobs, members.values, runs.response, members.rows)))
    return cells


def interior(cells: Sequence[Cell], knob: str) -> list[tuple[Cell, Optimum]]:
    """Return the cells whose optimum along a knob is interior, with it."""
    found = [(cell, cell.optimum(knob)) for cell in cells]
    return [(cell, optimum) for cell, optimum in found if not optimum.edge]


def law_variables(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Return the keys that a law can use, and those left out with the reason.

    A key with one value everywhere tells nothing, and one that is a power of the keys before it
    (tokens = 20 x size) cannot be told from them.
    """
    used: list[str] = []
    reasons: list[str] = []
    basis = np.ones((len(cells), 1))
    for name in cells[0].keys if cells else ():
        column = np.log([cell.keys[name] for cell in cells])
        rest = column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0]
        if np.ptp(column) < 1e-9:
            reasons.append(f"{name} has one value")
        elif rest.std() < 0.02 * column.std():
            reasons.append(f"{name} changes together with {', '.join(used)}")
        else:
            used.append(name)
            basis = np.column_stack([basis, column])
    return used, reasons


def optimum_laws(cells: Sequence[Cell], variables: Sequence[str]) -> dict[str, Fit]:
    """Return the power law of each knob, over the cells where both optima are interior.

    Where one knob ends at an edge, the best value of the other is not that of the optimum either.

    Raises:
        ConfigError: Too few cells have interior optima; edges are named.
    """
    edges = {cell.name: [o.edge for k in KNOBS if (o := cell.optimum(k)).edge] for cell in cells}
    usable = [cell for cell in cells if not edges[cell.name]]
    needed = len(variables) + 2
    if len(usable) < needed:
        named = "; ".join(f"{name}: {', '.join(why)}" for name, why in edges.items() if why)
        raise ConfigError(
            f"{len(usable)} of {len(cells)} cells have interior optima of {' and '.join(KNOBS)}; a "
            f"law in {', '.join(variables) or 'nothing'} needs {needed}. "
            + (f"Extend the grids: {named}" if named else "Add cells.")
        )
    laws = {}
    for knob in KNOBS:
        points = _points([(cell, cell.optimum(knob)) for cell in usable], knob, variables)
        laws[knob] = fit(make_form("power", points), points)
    return laws


def regrets(cells: Sequence[Cell], variables: Sequence[str]) -> list[Regret]:
    """Return the regret of each cell under laws that were fitted without it."""
    return [
        _regret(cell, optimum_laws([other for other in cells if other is not cell], variables))
        for cell in cells
    ]


def _regret(cell: Cell, laws: Mapping[str, Fit]) -> Regret:
    predicted = {
        knob: float(law.predict({n: [cell.keys[n]] for n in law.points.variables})[0])
        for knob, law in laws.items()
    }
    distances = sum(
        (np.log2(cell.runs.variables[knob]) - np.log2(value)) ** 2
        for knob, value in predicted.items()
    )
    nearest = int(np.argmin(distances))
    outside = tuple(
        knob
        for knob, value in predicted.items()
        if not cell.runs.variables[knob].min() <= value <= cell.runs.variables[knob].max()
    )
    return Regret(
        cell, predicted, cell.runs.rows[nearest], float(cell.runs.values[nearest]), outside
    )


def _points(
    found: Sequence[tuple[Cell, Optimum]], knob: str, variables: Sequence[str]
) -> Observations:
    columns = {name: np.array([cell.keys[name] for cell, _ in found]) for name in variables}
    values = np.array([optimum.value for _, optimum in found])
    return Observations(columns, values, knob, [cell.name for cell, _ in found])


def parabola_minimum(x: FloatArray, losses: FloatArray) -> tuple[float, float] | None:
    """Return where a least-squares parabola is lowest, and its value there.

    Returns:
        None where the parabola has no minimum.

    Args:
        x: log2 of a knob, at least three values.
        losses: Loss at each.
    """
    centre = x.mean()
    a, b, c = np.polyfit(x - centre, losses, 2)
    if a <= 1e-12 * max(1.0, abs(c)):
        return None
    return float(centre - b / (2 * a)), float(c - b**2 / (4 * a))
