"""Tables of an analysis: one CSV row a matrix or round, and a Markdown section with the figures."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean

from tools.pseudogradient.drawing import Panel, Whisker
from tools.pseudogradient.layers import LayerMeasures
from tools.pseudogradient.measures import OuterRound

__all__ = ["MEASURES", "panels", "section", "summary", "write_layers", "write_rounds"]

MEASURES = {
    "cosine": "cosine to K = 1",
    "pairwise_mean": "cosine of two replicas",
    "top_gap": "top-5 % interference gap, %",
    "nuclear_mean": "nuclear norm of the mean",
    "alignment": "alignment rho of steps",
}
"""Measure -> its title in figures and tables."""

Layers = Sequence[LayerMeasures]


def write_layers(path: Path, keys: Sequence[str], layers: Mapping[tuple[str, ...], Layers]) -> None:
    """Write one CSV row for each matrix of each entry; the entry's key fills the first columns."""
    names = [field.name for field in fields(LayerMeasures)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*keys, *names])
        for key, measured in layers.items():
            for each in measured:
                values = asdict(each)
                writer.writerow([*key, *(_cell(values[name]) for name in names)])


def write_rounds(path: Path, rounds: Sequence[OuterRound]) -> None:
    """Write one CSV row for each round of the outer optimizer."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["round", "aligned_gain", "transverse_ratio"])
        for each in rounds:
            row = [each.round_index, f"{each.aligned_gain:.6g}", f"{each.transverse_ratio:.6g}"]
            writer.writerow(row)


def summary(layers: Layers, measure: str) -> Whisker | None:
    """Return mean, lowest and highest value over the matrices; ``None`` if it is not known."""
    found = [getattr(each, measure) for each in layers]
    known = [value for value in found if value is not None and not math.isnan(value)]
    return (fmean(known), min(known), max(known)) if known else None


def panels(by_series: Mapping[str, Mapping[int, Layers]]) -> list[Panel]:
    """Return a panel for each measure that is known, over K.

    Args:
        by_series: Label -> K -> measures by matrix.
    """
    found = []
    for measure, title in MEASURES.items():
        series = {
            label: {
                K: whisker for K, layers in by_K.items() if (whisker := summary(layers, measure))
            }
            for label, by_K in by_series.items()
        }
        series = {label: values for label, values in series.items() if values}
        if series:
            found.append(Panel(title, series))
    return found


def section(title: str, rows: Mapping[str, Layers], figures: Sequence[str], note: str) -> str:
    """Return a Markdown section: a row an entry, ``mean (lowest to highest)`` over matrices."""
    lines = [f"## {title}", "", note, ""] if note else [f"## {title}", ""]
    lines += ["| | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for label, layers in rows.items():
        cells = [_range(summary(layers, measure)) for measure in MEASURES]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "Mean over the matrices, and in brackets the lowest and the highest.", ""]
    lines += [f"![{figure}]({figure})\n" for figure in figures]
    return "\n".join(lines).rstrip() + "\n"


def _range(whisker: Whisker | None) -> str:
    if whisker is None:
        return "n/a"
    mean, lowest, highest = whisker
    return f"{mean:.3g} ({lowest:.3g} to {highest:.3g})"


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
