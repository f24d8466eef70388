"""Text and JSON of fits, optima and refits of published tables."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_muloco.scaling.fitting import Fit
from megatron_muloco.scaling.intervals import Estimate, LeftOut
from megatron_muloco.scaling.optima import KNOBS, Cell, Regret
from tools.scaling.published import Comparison, groups

__all__ = [
    "cells_json", "cells_text", "comparisons_json", "comparisons_text", "fit_json", "fit_text",
    "law_text", "markdown", "regrets_json", "regrets_text", "text_table",
]  # fmt: skip


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns of text; the first is aligned to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def fit_text(found: Fit, estimates: Sequence[Estimate], left_out: Sequence[LeftOut]) -> str:
    """Return a fit as text: law, parameters with intervals, what is not determined, left out."""
    how = found.method if math.isinf(found.delta) else f"Huber, delta {found.delta:g}"
    lines = [
        f"{found.points.response} = {found.form.formula}",
        f"{len(found.points)} points, {how}, "
        + (
            "closed form"
            if found.starts == 1
            else f"{found.starts} starts, {found.agreeing} of {found.followed} that were followed "
            f"reached the best minimum"
        ),
        f"sigma of ln {found.points.response} {found.sigma:.2g}, condition number "
        f"{found.condition:.2g}",
        "",
        text_table(
            ("parameter", "value", "95 % from", "to", "meaning"),
            [
                (e.name, f"{e.value:.5g}", f"{e.low:.5g}", f"{e.high:.5g}", e.meaning)
                for e in estimates
            ],
        ),
    ]
    lines += [f"! {e.name}: {e.problem}" for e in estimates if e.problem]
    if left_out:
        lines += ["", _left_out_text(left_out)]
    return "\n".join(lines)


def _left_out_text(left_out: Sequence[LeftOut]) -> str:
    rows = [
        (f"{out.variable} = {out.value:.5g}", str(len(out.actual)), f"{out.mean:.4f}")
        for out in left_out
    ]
    return text_table(("left out", "points", "mean |ln y - ln prediction|"), rows)


def fit_json(
    found: Fit, estimates: Sequence[Estimate], left_out: Sequence[LeftOut]
) -> dict[str, Any]:
    """Return a fit as JSON; an end that does not exist is null."""
    return {
        "form": found.form.name,
        "formula": found.form.formula,
        "source": found.form.source,
        "response": found.points.response,
        "points": len(found.points),
        "method": found.method,
        "delta": _finite(found.delta),
        "starts": found.starts,
        "followed_starts": found.followed,
        "agreeing_starts": found.agreeing,
        "sigma": found.sigma,
        "condition": _finite(found.condition),
        "parameters": [
            {
                "name": e.name,
                "meaning": e.meaning,
                "value": e.value,
                "low": _finite(e.low),
                "high": _finite(e.high),
                "problem": e.problem,
            }
            for e in estimates
        ],
        "left_out": [
            {
                "variable": out.variable,
                "value": out.value,
                "rows": list(out.rows),
                "actual": out.actual.tolist(),
                "predicted": out.predicted.tolist(),
                "mean_residual": out.mean,
            }
            for out in left_out
        ],
    }


def cells_text(cells: Sequence[Cell]) -> str:
    """Return the optimum of every cell along both knobs, and the cells at an edge."""
    rows, edges = [], []
    for cell in cells:
        row = [cell.name, str(len(cell.runs)), f"{cell.best_loss:.4f}"]
        for knob in KNOBS:
            optimum = cell.optimum(knob)
            row.append(f"{optimum.value:.4g}" + ("  edge" if optimum.edge else ""))
            edges += [f"! {cell.name}: {optimum.edge}"] if optimum.edge else []
        rows.append(row)
    table = text_table(("cell", "runs", "best loss", "lr", "batch, tokens"), rows)
    return "\n".join([table, *edges])


def cells_json(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return the optimum of every cell as JSON."""
    found = []
    for cell in cells:
        entry: dict[str, Any] = {"keys": dict(cell.keys), "runs": len(cell.runs)}
        entry["best_loss"] = cell.best_loss
        for knob in KNOBS:
            optimum = cell.optimum(knob)
            entry[knob] = {
                "value": optimum.value,
                "best_run": optimum.best,
                "loss": optimum.loss,
                "edge": optimum.edge,
            }
        found.append(entry)
    return found


def law_text(law: Fit, estimates: Sequence[Estimate]) -> str:
    """Return a law of an optimum on one line, and what it does not determine below."""
    parts = [f"{e.name} {e.value:.4g} ({e.low:.4g} to {e.high:.4g})" for e in estimates]
    line = f"{law.points.response} = {law.form.formula}: " + ", ".join(parts)
    cells = f"; {len(law.points)} cells, sigma {law.sigma:.2g}"
    return "\n".join([line + cells, *(f"! {e.name}: {e.problem}" for e in estimates if e.problem)])


def regrets_text(regrets: Sequence[Regret]) -> str:
    """Return what laws without a cell cost in it."""
    rows = [
        (
            regret.cell.name,
            f"{regret.predicted['lr']:.4g}",
            f"{regret.predicted['batch']:.4g}",
            regret.row,
            f"{100 * regret.value:.2f}",
            ", ".join(regret.outside),
        )
        for regret in regrets
    ]
    header = ("left-out cell", "lr", "batch", "nearest run", "regret, % of loss", "outside grid")
    return text_table(header, rows)


def regrets_json(regrets: Sequence[Regret]) -> list[dict[str, Any]]:
    """Return what laws without a cell cost in it, as JSON."""
    return [
        {
            "keys": dict(regret.cell.keys),
            "predicted": dict(regret.predicted),
            "nearest_run": regret.row,
            "loss": regret.loss,
            "best_loss": regret.cell.best_loss,
            "regret": regret.value,
            "outside_grid": list(regret.outside),
        }
        for regret in regrets
    ]


def comparisons_text(comparisons: Sequence[Comparison]) -> str:
    """Return published and refitted numbers, a block a table."""
    blocks = []
    for group, members in groups(comparisons).items():
        table = text_table(("", "published", "refitted", "difference", ""), _cells(members))
        blocks.append(f"{group}\n{table}")
    return "\n\n".join(blocks)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """Return published and refitted numbers as Markdown tables."""
    blocks = []
    for group, members in groups(comparisons).items():
        lines = ["| | published | refitted | difference | |", "|---|---|---|---|---|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in _cells(members)]
        blocks.append(f"### {group}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def comparisons_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return published and refitted numbers as JSON."""
    return [
        {
            "group": c.group,
            "quantity": c.quantity,
            "published": c.published,
            "refitted": c.refitted,
            "relative_difference": c.difference,
            "note": c.note,
        }
        for c in comparisons
    ]


def _cells(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [
        (c.quantity, f"{c.published:.6g}", f"{c.refitted:.5g}", f"{c.difference:+.2%}", c.note)
        for c in comparisons
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
