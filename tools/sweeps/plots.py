"""`draw_slices`: a figure of each slice, loss against every axis, one line a method and K."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.sweeps.search import CellState
from tools.sweeps.table import ResultTable

__all__ = ["draw_slices"]

_MARGIN = 1.15  # of the best loss: what lies above it is cut off, as it says nothing of the optimum


def draw_slices(states: Sequence[CellState], table: ResultTable, directory: Path) -> list[Path]:
    """Write ``SLICE.png`` for every slice with finished runs, and return the files.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    from tools.scaling.drawing import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[CellState]] = {}
    for state in states:
        groups.setdefault(state.cell.part.name, []).append(state)
    files = []
    for name, members in groups.items():
        axes = [axis.key for axis in members[0].cell.part.axes] or list(members[0].cell.part.over)
        if not axes or not any(_points(state, table, axes[0]) for state in members):
            continue
        figure, panels = pyplot().subplots(
            1, len(axes), figsize=(6 * len(axes), 4.5), squeeze=False, layout="constrained"
        )
        for panel, key in zip(panels[0], axes, strict=True):
            _draw(panel, members, table, key)
        figure.suptitle(f"{name}: held-out loss, nats per token")
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=130)
        pyplot().close(figure)
    return files


def _draw(panel: Any, members: Sequence[CellState], table: ResultTable, key: str) -> None:
    """Draw the lowest loss at each value of one axis, a line a cell."""
    lines: dict[str, dict[float, float]] = {}
    for state in members:
        cell = state.cell
        over = [] if key in dict(cell.over) else [f"{v}" for _, v in cell.over]
        label = " ".join([cell.size, cell.method, f"K={cell.replicas}", *over, cell.variant])
        values = lines.setdefault(label.strip(), {})
        for x, loss in _points(state, table, key):
            values[x] = min(loss, values.get(x, loss))
    best = min((loss for line in lines.values() for loss in line.values()), default=1.0)
    for label, line in lines.items():
        xs = sorted(line)
        panel.plot(xs, [line[x] for x in xs], marker="o", markersize=3, label=label)
    if all(x > 0 for line in lines.values() for x in line):
        panel.set_xscale("log", base=2)
    panel.set_ylim(top=best * _MARGIN)
    panel.set_xlabel(key)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def _points(state: CellState, table: ResultTable, key: str) -> list[tuple[float, float]]:
    """Return value of an axis or of an ``over`` key, and loss, of every finished run of a cell."""
    over: Mapping[str, Any] = dict(state.cell.over)
    found = []
    for point, run in state.runs.items():
        row = table.rows.get(run.key)
        if row is not None and row["status"] == "ok":
            value = {**over, **dict(point)}[key]
            if isinstance(value, (int, float)):
                found.append((float(value), float(row["loss"])))
    return found
