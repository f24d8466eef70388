#!/usr/bin/env python
"""Draws the README's plot, the time of one inner step at each link rate, from the measured page.

    python tools/bench/step_time_plot.py

Reads the tables of docs/performance/low_bandwidth.md and writes docs/step_time.svg, so that the
plot never says anything else than the page.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "performance" / "low_bandwidth.md"
PLOT = ROOT / "docs" / "step_time.svg"

_TABLE = re.compile(r"^## (\d+) Mbit/s\n\n(\|.*?)\n\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Bar:
    """One method at one rate, milliseconds per inner step.

    Attributes:
        method: Name in the table.
        compute: Time of the same step without the link.
        step: Measured time, the link included.
    """

    method: str
    compute: float
    step: float


def bars(page: str) -> dict[int, list[Bar]]:
    """Return the bars of each rate in Mbit/s, in the order of the page."""
    found: dict[int, list[Bar]] = {}
    for rate, table in _TABLE.findall(page):
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
        ]
        method, compute, step = (header.index(name) for name in ("method", "compute", "step"))
        found[int(rate)] = [
            Bar(cells[method].rstrip("*"), number(cells[compute]), number(cells[step]))
            for cells in rows
        ]
    return found


def number(text: str) -> float:
    """Return a number with commas between thousands."""
    return float(text.replace(",", ""))


def draw(found: dict[int, list[Bar]], path: Path) -> None:
    """Write one panel per rate: horizontal bars, compute first, then what the link adds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "step_time"  # the same bytes for the same page
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(10, 3.2), sharey=True, layout="constrained"
    )
    for axis, (rate, rows) in zip(axes, sorted(found.items()), strict=True):
        names = [row.method for row in rows]
        compute = [min(row.compute, row.step) / 1e3 for row in rows]
        link = [max(0.0, row.step - row.compute) / 1e3 for row in rows]
        axis.barh(names, compute, color="#4c72b0", label="compute")
        axis.barh(names, link, left=compute, color="#dd8452", label="waiting for the link")
        for index, row in enumerate(rows):
            axis.text(row.step / 1e3, index, f" {row.step / 1e3:.2f} s", va="center", fontsize=8)
        axis.set_xlim(0, max(row.step for row in rows) / 1e3 * 1.15)
        axis.set_title(f"{rate} Mbit/s links", fontsize=10)
        axis.set_xlabel("seconds per inner step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # shared by all panels
    axes[-1].legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Draw the plot; 1 where the page has no table of that form."""
    found = bars(PAGE.read_text(encoding="utf-8"))
    if not found:
        sys.stderr.write(f"{PAGE}: no table of a link rate\n")
        return 1
    draw(found, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
