"""Drawing of the result page: loss over H, and every comparison with its interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.bench.quality.grid import COMPARISONS, INTERVALS
from tools.bench.quality.page import SWEEPS, losses_of
from tools.bench.quality.runs import Result
from tools.bench.quality.statistics import (
    EQUAL_PERCENT,
    Losses,
    interval,
    percent_differences,
)


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG of the results; the place of a variant that was not run stays empty."""
    losses = losses_of(results)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_sweeps(left, losses)
    _draw_comparisons(right, losses)
    figure.savefig(path, dpi=110)


def _draw_sweeps(axes: Axes, losses: Losses) -> None:
    for method, names in SWEEPS.items():
        found = [
            (length, list(losses[name].values()))
            for length, name in zip(INTERVALS, names, strict=True)
            if losses.get(name)
        ]
        if not found:
            continue
        lengths = [length for length, _ in found]
        means = [interval(samples).mean for _, samples in found]
        (line,) = axes.plot(lengths, means, label=method)
        for length, samples in found:
            axes.plot([length] * len(samples), samples, ".", color=line.get_color(), alpha=0.6)
    axes.set_xscale("log")
    axes.set_xticks(INTERVALS, [str(length) for length in INTERVALS])
    axes.minorticks_off()
    axes.set_xlabel("H, inner steps a round")
    axes.set_ylabel("held-out loss, nats per token")
    if axes.lines:
        axes.legend()


def _draw_comparisons(axes: Axes, losses: Losses) -> None:
    found: Mapping[str, list[float]] = {
        f"{pair.variant} / {pair.baseline}": list(
            percent_differences(losses, pair.variant, pair.baseline).values()
        )
        for pair in COMPARISONS
    }
    for row, samples in enumerate(found.values()):
        if samples:
            of = interval(samples)
            axes.errorbar(of.mean, -row, xerr=of.half_width, fmt="o", color="C0", capsize=3)
    axes.axvspan(-EQUAL_PERCENT, EQUAL_PERCENT, color="0.9", zorder=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks([-row for row in range(len(found))], list(found))
    axes.set_xlabel("difference in loss, %; grey: counts as equal")
