"""Plots of a plan: utilisation and days of each method against the rate of the link."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_muloco.planning.timing import Rate
from tools.planning.text import Plan
from tools.scaling.drawing import pyplot, save

__all__ = ["draw"]

_DECADES = 2  # of rates on each side of the plan's
_POINTS = 41


def draw(plan: Plan, path: Path) -> None:
    """Write the plot to a file."""
    figure, (used, days) = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
    given = plan.base.rates.link.value
    rates = given * np.logspace(-_DECADES, _DECADES, _POINTS)
    for index, method in enumerate(plan.methods):
        if method.estimate is None:
            continue
        found = [
            replace(
                method.estimate,
                rates=replace(method.estimate.rates, link=Rate(float(rate), "plotted")),
            )
            for rate in rates
        ]
        style = {"label": method.name, "color": f"C{index}"}
        used.plot(rates / 1e9, [100 * each.share for each in found], **style)
        days.plot(rates / 1e9, [each.days or np.nan for each in found], **style)
    for axes in (used, days):
        axes.axvline(given / 1e9, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel="Gbit/s between a replica and the others")
    used.set(ylabel="share of the time that computes, %")
    days.set(yscale="log", ylabel="days, failures included")
    used.legend(fontsize=8)
    save(figure, path)
