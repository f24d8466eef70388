"""Figures: measures over K, singular spectra, and the outer optimizer over rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.pseudogradient.measures import OuterRound

__all__ = ["Panel", "Spectra", "draw_outer", "draw_over_replicas", "draw_spectra"]

Whisker = tuple[float, float, float]
"""Mean, lowest and highest value."""


@dataclass(frozen=True)
class Panel:
    """One measure over K.

    Attributes:
        title: Title, with the unit.
        series: Label -> K -> mean, lowest and highest value.
    """

    title: str
    series: Mapping[str, Mapping[int, Whisker]]


@dataclass(frozen=True)
class Spectra:
    """Singular values of one matrix in one round, in descending order.

    Attributes:
        title: Title of the panel.
        replicas: Those of each replica.
        mean: Those of the mean pseudogradient.
    """

    title: str
    replicas: Sequence[Sequence[float]]
    mean: Sequence[float]


def draw_over_replicas(panels: Sequence[Panel], path: Path) -> None:
    """Write a PNG with one panel a measure; whiskers reach from the lowest to the highest."""
    figure, axes = _figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        ticks = sorted({K for values in panel.series.values() for K in values})
        for place, (label, values) in enumerate(panel.series.items()):
            # Moved apart a little, so that the whiskers of two series do not hide each other.
            xs = [K * 1.04 ** (2 * place - len(panel.series) + 1) for K in values]
            means = [mean for mean, _, _ in values.values()]
            low = [mean - lowest for mean, lowest, _ in values.values()]
            high = [highest - mean for mean, _, highest in values.values()]
            axis.errorbar(xs, means, yerr=[low, high], marker="o", capsize=3, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="replicas, K", title=panel.title)
        axis.legend(fontsize=8)
    _save(figure, path)


def draw_spectra(spectra: Sequence[Spectra], path: Path) -> None:
    """Write a PNG: replicas thin and grey, their mean thick, one panel each."""
    figure, axes = _figure(len(spectra))
    for axis, each in zip(axes, spectra, strict=True):
        for index, values in enumerate(each.replicas):
            label = f"{len(each.replicas)} replicas" if index == 0 else None
            axis.plot(range(1, len(values) + 1), values, color="0.6", linewidth=0.8, label=label)
        axis.plot(range(1, len(each.mean) + 1), each.mean, color="C3", linewidth=2, label="mean")
        axis.set(yscale="log", xlabel="index", ylabel="singular value", title=each.title)
        axis.legend(fontsize=8)
    _save(figure, path)


def draw_outer(
    rounds: Sequence[OuterRound], correlations: Mapping[str, Sequence[float]], path: Path
) -> None:
    """Write a PNG: gain and transverse ratio over rounds, and autocorrelations over the lag."""
    figure, (over_rounds, over_lags) = _figure(2)
    numbers = [each.round_index for each in rounds]
    over_rounds.plot(numbers, [each.aligned_gain for each in rounds], label="aligned gain")
    over_rounds.plot(numbers, [each.transverse_ratio for each in rounds], label="transverse ratio")
    over_rounds.set(xlabel="round", title="outer step relative to the mean pseudogradient")
    over_rounds.legend(fontsize=8)
    for label, values in correlations.items():
        over_lags.plot(range(1, len(values) + 1), values, marker="o", label=label)
    over_lags.axhline(0, color="grey", linewidth=0.8)
    over_lags.set(xlabel="lag, rounds", title="mean cosine of rounds that far apart")
    over_lags.legend(fontsize=8)
    _save(figure, path)


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, two or three in a row."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, list(axes[:count])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
