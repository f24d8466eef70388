"""`Search`: which runs a study still needs, given those that are finished.

In each cell the values in ``start`` are tried, then the neighbours of the best point along each
axis, until all of these are worse. So a grid extends itself until its best point is interior, or at
a stated limit. A cell goes on in waves: what comes next is decided when all runs of a wave have
finished. The runs of a study therefore depend on its losses only, and not on the order in which
workers finish or on interruptions.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_muloco.errors import ConfigError
from tools.sweeps.runs import Point, Run, Runs
from tools.sweeps.study import Axis, Cell, Slice, Study

__all__ = ["CellState", "Search"]

Losses = Mapping[str, float]
"""Key of a finished run -> its loss for tuning, ``inf`` where it diverged."""


@dataclass(frozen=True)
class CellState:
    """What is known of a cell.

    Attributes:
        cell: The cell.
        runs: Point -> run of every point that was asked for, with the seed of the search.
        missing: Runs of the present wave that have not finished.
        best: The best point; ``None`` before the first wave has finished.
        at_limit: Axes whose best value is the end of their ladder.
        reports: Runs of the best point with the seeds for reports.
    """

    cell: Cell
    runs: Mapping[Point, Run]
    missing: tuple[Run, ...]
    best: Point | None = None
    at_limit: tuple[str, ...] = ()
    reports: tuple[Run, ...] = ()

    @property
    def searched(self) -> bool:
        """Whether the best point is known."""
        return self.best is not None and not any(r.key in self._search_keys for r in self.missing)

    @property
    def _search_keys(self) -> set[str]:
        return {run.key for run in self.runs.values()}


class Search:
    """Plans the runs of a study.

    Args:
        study: The study.
        runs: Maker of its runs.
    """

    def __init__(self, study: Study, runs: Runs) -> None:
        self._study, self._runs = study, runs

    def check(self) -> None:
        """Make the first run of every cell, with start values in place of best ones.

        Raises:
            ConfigError: A run's config is refused, for instance for an unknown key; all are named.
        """
        problems: list[str] = []
        for part in self._study.slices.values():
            for cell in self._study.cells(part):
                try:
                    self._runs.run(cell, self._first_values(cell), _first(cell), part.seed)
                except ConfigError as error:
                    problems += error.problems
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _first_values(self, cell: Cell) -> dict[str, Any]:
        """Return start values for what a cell takes from earlier slices."""
        taken: dict[str, Any] = {}
        for used in cell.part.use:
            source = self._study.slices[used.slice]
            method = used.methods_as.get(cell.method, cell.method)
            if method in source.methods:
                earlier = Cell(source, cell.size, method, cell.replicas, (), "")
                taken |= {**self._first_values(earlier), **dict(_first(earlier))}
        return taken

    def missing(self, losses: Losses, slices: tuple[str, ...] = ()) -> list[Run]:
        """Return the runs that can start now, in the order of the file, each once.

        Args:
            losses: Finished runs.
            slices: Names of slices; all if empty.
        """
        found: dict[str, Run] = {}
        for state in self.states(losses, slices):
            for run in state.missing:
                found.setdefault(run.key, run)
        return list(found.values())

    def states(self, losses: Losses, slices: tuple[str, ...] = ()) -> Iterator[CellState]:
        """Yield the state of every cell that does not wait for an earlier slice."""
        for part in self._study.slices.values():
            if slices and part.name not in slices:
                continue
            for cell in self._study.cells(part):
                taken = self._taken(cell, losses)
                if taken is not None:
                    yield self.state(cell, taken, losses)

    def waiting(self, losses: Losses, slices: tuple[str, ...] = ()) -> list[Cell]:
        """Return the cells that wait for the best values of an earlier slice."""
        return [
            cell
            for part in self._study.slices.values()
            if not slices or part.name in slices
            for cell in self._study.cells(part)
            if self._taken(cell, losses) is None
        ]

    def state(self, cell: Cell, taken: Mapping[str, Any], losses: Losses) -> CellState:
        """Return what is known of a cell whose taken values are known."""
        part, axes = cell.part, cell.part.axes
        starts = [[(a.key, x) for x in a.start_of(cell.method)] for a in axes]
        asked = {point: self._runs.run(cell, taken, point, part.seed) for point in product(*starts)}
        while True:
            missing = tuple(run for run in asked.values() if run.key not in losses)
            if missing:
                return CellState(cell, asked, missing)
            best = min(asked, key=lambda point: losses[asked[point].key])
            if math.isinf(losses[asked[best].key]):
                raise ConfigError(
                    f"{self._study.path}: slice {cell.name}: every run diverged, so no point is "
                    "best. Start its axes at smaller values."
                )
            around = [p for p in _neighbours(axes, best) if p not in asked]
            if not around:
                break
            asked |= {p: self._runs.run(cell, taken, p, part.seed) for p in around}
        reports = tuple(self._runs.run(cell, taken, best, seed) for seed in part.report_seeds)
        left = tuple(run for run in reports if run.key not in losses)
        values = dict(best)
        at_limit = tuple(a.key for a in axes if values[a.key] in (a.ladder[0], a.ladder[-1]))
        return CellState(cell, asked, left, best, at_limit, reports)

    # ---- values of earlier slices ------------------------------------------------------------

    def _taken(self, cell: Cell, losses: Losses) -> dict[str, Any] | None:
        """Return the best values that a cell takes over; None while they are not known."""
        taken: dict[str, Any] = {}
        for used in cell.part.use:
            source = self._study.slices[used.slice]
            method = used.methods_as.get(cell.method, cell.method)
            if method not in source.methods:
                continue
            size = cell.size if cell.size in source.sizes else source.sizes[0]
            replicas = used.replicas_as.get(cell.replicas, cell.replicas)
            best = self._best(source, size, method, replicas, losses)
            if best is None:
                return None
            taken |= dict(best)
        return taken

    def _best(
        self, source: Slice, size: str, method: str, replicas: int, losses: Losses
    ) -> Point | None:
        cell = Cell(source, size, method, replicas, (), "")
        taken = self._taken(cell, losses)
        if taken is None:
            return None
        return self.state(cell, taken, losses).best


def _first(cell: Cell) -> Point:
    return tuple((axis.key, axis.start_of(cell.method)[0]) for axis in cell.part.axes)


def _neighbours(axes: tuple[Axis, ...], point: Point) -> Iterator[Point]:
    """Yield the points one step of one axis away."""
    for index, axis in enumerate(axes):
        rung = axis.ladder.index(point[index][1])
        for near in (rung - 1, rung + 1):
            if 0 <= near < len(axis.ladder):
                yield (*point[:index], (axis.key, axis.ladder[near]), *point[index + 1 :])
