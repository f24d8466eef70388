"""Plots of critical batches: loss against batch, steps to a target, and branches."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_muloco.scaling.critical import Largest
from tools.scaling.branches import Branch
from tools.scaling.critical_runs import Cell, Target, TokenLaw
from tools.scaling.drawing import pyplot, save

__all__ = ["draw_branches", "draw_cells", "draw_steps"]

_MARKERS = ("o", "s", "^", "D", "v")


def draw_cells(cells: Sequence[Cell], laws: Sequence[TokenLaw], path: Path) -> None:
    """Write a PNG: loss above the best against batch, and the critical batch against tokens.

    The band is what is within the factor of the best loss. Arrows are bounds beyond the grid.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
    for index, cell in enumerate(cells):
        curve, found = cell.curve, cell.found
        colour, marker = _colour(index), _MARKERS[index % len(_MARKERS)]
        excess = 100 * (curve.losses / curve.losses.min() - 1)
        left.plot(curve.batches, excess, marker=marker, color=colour, label=cell.name, lw=1.2)
        if not found.beyond:
            limit = 100 * (found.limit / curve.losses.min() - 1)
            left.plot(found.value, limit, "|", color=colour, markersize=16)
            left.axhspan(0, limit, color="grey", alpha=0.15 / len(cells))
    left.set(xscale="log", xlabel="batch, tokens", ylabel="loss above the best of the curve, %")
    left.set_title("The mark is the critical batch")
    left.legend(fontsize=7)
    labels = list(dict.fromkeys([*(law.label for law in laws), *(cell.label for cell in cells)]))
    colours = {label: _colour(index) for index, label in enumerate(labels)}
    markers = dict(zip(labels, itertools.cycle(_MARKERS), strict=False))
    for cell in cells if not _shows_points(laws) else ():
        _draw_critical(right, cell, colours[cell.label])
    for law in laws:
        points = law.law.points
        tokens, order = points.variables["tokens"], np.argsort(points.variables["tokens"])
        alpha = law.law.values["alpha"]
        colour, title = colours[law.label], f"{law.label}: tokens^{alpha:.3f}"
        right.plot(tokens, points.values, markers[law.label], color=colour, alpha=0.7)
        right.plot(tokens[order], law.law.predict_rows(points)[order], color=colour, label=title)
    right.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="critical batch, tokens")
    right.legend(fontsize=7)
    save(figure, path)


def _colour(index: int) -> Any:
    """Return one of 20 colours, dark ones first."""
    return pyplot().get_cmap("tab20")((2 * index) % 20 + index // 10 % 2)


def _shows_points(laws: Sequence[TokenLaw]) -> bool:
    """Return whether the laws are of a published table, whose points are not those of the cells."""
    return any(law.printed is not None for law in laws)


def _draw_critical(panel: Any, cell: Cell, colour: str) -> None:
    found = cell.found
    if found.beyond:
        panel.plot(cell.tokens, found.grid, "^", color=colour, label=f"{cell.label}: at least")
        return
    panel.plot(cell.tokens, found.value, "o", color=colour, label=cell.label)
    if np.isfinite(cell.low) and np.isfinite(cell.high):
        panel.plot([cell.tokens] * 2, [cell.low, cell.high], color=colour, lw=1)


def draw_steps(found: Sequence[Target], path: Path) -> None:
    """Write a PNG: steps and tokens that reach each target against batch, with the laws."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for index, target in enumerate(found):
        colour, batches = f"C{index}", np.asarray(target.batches)
        steps, grid = np.asarray(target.steps), np.geomspace(batches.min(), batches.max(), 100)
        left.plot(batches, steps, "o", color=colour)
        left.plot(grid, target.law.steps(grid), color=colour, label=f"loss {target.target:g}")
        right.plot(batches, steps * batches, "o", color=colour)
        right.plot(grid, target.law.steps(grid) * grid, color=colour, label=f"{target.target:g}")
        critical = target.law.critical(target.overhead)
        if grid[0] <= critical <= grid[-1]:
            for panel in (left, right):
                panel.axvline(critical, color=colour, linestyle=":", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="batch, tokens", ylabel="steps to the target")
    right.set(xscale="log", yscale="log", xlabel="batch, tokens", ylabel="tokens to the target")
    left.set_title("S_min (1 + B_noise / B); dotted: critical batch")
    left.legend(fontsize=8)
    save(figure, path)


def draw_branches(branches: Sequence[Branch], found: Largest, path: Path) -> None:
    """Write a PNG: loss of each branch against its batch, with the tolerance."""
    figure, panel = pyplot().subplots(figsize=(6.5, 4.5), layout="constrained")
    base = branches[0].loss
    panel.plot([b.batch for b in branches], [b.loss for b in branches], "o-", label="branches")
    panel.axhspan(base, found.limit, color="grey", alpha=0.15, label="tolerance")
    if not found.beyond:
        panel.axvline(found.value, color="grey", linestyle=":", label="critical batch")
    panel.set(xscale="log", xlabel="batch, tokens", ylabel="held-out loss, nats per token")
    panel.set_title(f"{branches[0].tokens:.3g} tokens after one checkpoint")
    panel.legend(fontsize=8)
    save(figure, path)
