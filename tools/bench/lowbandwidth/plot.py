"""Plot of a campaign: loss against wall-clock, bytes sent, utilisation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Results
from .table import Row

__all__ = ["draw"]


def draw(found: Results, path: Path) -> None:
    """Write a PNG: a row of three panels for each rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [rate for rate, rows in found.rows.items() if rows]
    if not rates:
        return
    figure, axes = pyplot.subplots(
        len(rates),
        3,
        figsize=(15, 4.2 * len(rates)),
        squeeze=False,
        layout="constrained",
        width_ratios=(2, 1, 1),
    )
    colours = {
        name: f"C{index}"
        for index, name in enumerate(
            dict.fromkeys(r.name for rate in rates for r in found.rows[rate])
        )
    }
    for (loss, sent, used), rate in zip(axes, rates, strict=True):
        rows = found.rows[rate]
        _loss_panel(loss, rows, found, colours, rate)
        bars = [r.counted_bytes / 1e3 for r in rows]
        _bar_panel(sent, rows, bars, colours, "kB sent per rank and step")
        sent.set_xscale("log")
        sent.set_xlim(left=min(bars) / 3)  # a bar of the least is still a bar
        shares = [100 * r.timing.utilisation for r in rows]
        _bar_panel(used, rows, shares, colours, "utilisation, %")
        used.set_xlim(0, 100)
        used.set_yticklabels([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _loss_panel(
    axis: Any, rows: Sequence[Row], found: Results, colours: dict[str, str], rate: float
) -> None:
    for r in rows:
        curve = [(step, value) for step, value in found.curves.get(r.name, []) if step > 0]
        if curve:
            minutes = [step * r.timing.wall / 60 for step, _ in curve]
            losses = [value for _, value in curve]
            axis.plot(minutes, losses, color=colours[r.name], marker=".", label=r.title)
    if found.target is not None:
        axis.axhline(found.target, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    lowest = min((value for curve in found.curves.values() for _, value in curve), default=0.0)
    # The overshoot of the first rounds would leave no room for the rest.
    axis.set_ylim(lowest - 0.2, lowest + 3.0)
    axis.legend(fontsize=7)
    axis.set_xlabel("wall-clock, minutes")
    axis.set_ylabel("held-out loss, nats per token")
    axis.set_title(f"{rate:g} Mbit/s")


def _bar_panel(
    axis: Any, rows: Sequence[Row], values: Sequence[float], colours: dict[str, str], label: str
) -> None:
    titles = [r.title for r in rows]
    axis.barh(titles, values, color=[colours[r.name] for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel(label)
