"""Plots of fits, of the optima of a sweep, and of the published laws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.optima import KNOBS, Cell
from tools.scaling.published import diloco_losses, muloco_fit, muloco_losses

__all__ = ["draw_cells", "draw_fit", "draw_published", "pyplot", "save"]

_MULOCO_SHOWN = ("dp_adamw", "dp_muon", "diloco_k1", "muloco_k1", "diloco_k16", "muloco_k16")


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure to a file, whose directory is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)


def draw_fit(found: Fit, path: Path) -> None:
    """Write a PNG: the points with their law against the first variable, and the residuals.

    A curve is drawn for every combination of the other variables.
    """
    figure, (law, rest) = pyplot().subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    points = found.points
    first, *others = points.variables
    series = points.series or [""] * len(points)
    labels = list(zip(*(points.variables[name] for name in others), series, strict=True))
    for index, label in enumerate(dict.fromkeys(labels)):
        members = points.where(np.array([each == label for each in labels]))
        x = members.variables[first]
        parts = [f"{n} = {v:.4g}" for n, v in zip(others, label, strict=False)]
        colour, title = f"C{index % 10}", ", ".join([*parts, *filter(None, label[-1:])])
        order = np.argsort(x)
        law.plot(x, members.values, "o", color=colour, label=title or points.response)
        law.plot(x[order], found.predict_rows(members)[order], color=colour)
        errors = 100 * (members.values / found.predict_rows(members) - 1)
        rest.plot(x[order], errors[order], "o-", color=colour)
    law.set(xscale="log", yscale="log", xlabel=first, ylabel=points.response)
    law.set_title(f"{points.response} = {found.form.formula}")
    law.legend(fontsize=7)
    rest.set(xscale="log", xlabel=first, ylabel="observed above the law, %")
    rest.axhline(0, color="grey", linewidth=0.8)
    save(figure, path)


def draw_cells(cells: Sequence[Cell], laws: dict[str, Fit], path: Path) -> None:
    """Write a PNG: the optimum of each cell against the law's value, one panel a knob."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for panel, knob in zip(panels, KNOBS, strict=True):
        for edge in (False, True):
            chosen = [cell for cell in cells if bool(cell.optimum(knob).edge) == edge]
            predicted = [
                laws[knob].predict({n: [cell.keys[n]] for n in laws[knob].points.variables})[0]
                for cell in chosen
            ]
            values = [cell.optimum(knob).value for cell in chosen]
            label = "at an edge of its grid" if edge else "interior"
            panel.plot(predicted, values, "x" if edge else "o", label=label)
        ends = panel.get_xlim()
        panel.plot(ends, ends, color="grey", linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel="law", ylabel="optimum of the cell")
        panel.set_title(f"{knob} = {laws[knob].form.formula}")
        panel.legend(fontsize=7)
    save(figure, path)


def draw_published(path: Path) -> None:
    """Write a PNG: losses of both papers with the refitted laws."""
    figure, (diloco, muloco) = pyplot().subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    grid = np.geomspace(3e7, 1.2e10, 60)
    points = diloco_losses()
    joint, offset = fit("power", points), fit("exponent_linear_offset", points)
    for index, count in enumerate((1, 2, 4, 8)):
        at = {"params": grid, "replicas": np.full_like(grid, count)}
        members = points.where(points.variables["replicas"] == count)
        colour = f"C{index}"
        diloco.plot(
            members.variables["params"], members.values, "o", color=colour, label=f"M = {count}"
        )
        diloco.plot(grid, joint.predict(at), color=colour, linestyle=":")
        diloco.plot(grid, offset.predict(at), color=colour)
    diloco.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="loss, nats per token")
    diloco.set_title("DiLoCo: A N^α M^β (dotted), A N^(α + βM) + C")
    diloco.legend(fontsize=7)
    losses = muloco_losses()
    for index, series in enumerate(_MULOCO_SHOWN):
        members = losses.where(np.array([name == series for name in losses.series]))
        flops, law = members.variables["flops"], muloco_fit(series)
        colour = f"C{index}"
        muloco.plot(flops, members.values, "o", color=colour, label=series)
        muloco.plot(flops, 1.7105 * law.predict({"flops": flops}), color=colour)
    muloco.set(xscale="log", yscale="log", xlabel="6 N D, FLOPs", ylabel="loss, nats per token")
    muloco.set_title("MuLoCo: A C^α + 1.7105")
    muloco.legend(fontsize=7)
    save(figure, path)
