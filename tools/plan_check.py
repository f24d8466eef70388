"""Compare the planner with published tables and with measurements, and write its page.

    python tools/plan_check.py --markdown docs/performance/planner.md

Tables and their sources are in configs/studies/published/. It exits with 1 if a bar does not hold.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import run_tool
from tools.planning.published import (
    GRID,
    IDEAL_STEP,
    PARAMETERS,
    Cell,
    Hours,
    Lab,
    Measured,
    Parameters,
    bandwidth_cells,
    fitted_efficiency,
    ideal_hours,
    laboratory,
    measured_outer_steps,
    within,
)

_SENT = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)


@dataclass(frozen=True)
class Bar:
    """A bar and what was found.

    Attributes:
        words: What is compared.
        found: The number.
        limit: What it has to be.
        holds: Whether it is.
    """

    words: str
    found: str
    limit: str
    holds: bool


class Check:
    """All comparisons, each computed once."""

    @cached_property
    def cells(self) -> list[Cell]:
        """Both bandwidth tables."""
        return bandwidth_cells()

    @cached_property
    def hours(self) -> list[Hours]:
        """Idealised hours."""
        return ideal_hours()

    @cached_property
    def measured(self) -> list[Measured]:
        """Outer steps on shaped links."""
        return measured_outer_steps()

    @cached_property
    def efficiency(self) -> float:
        """Share of the nominal rate, from the first run of each setting."""
        return fitted_efficiency([run for run in self.measured if run.run.endswith("-r0")])

    @cached_property
    def lab(self) -> list[Lab]:
        """The laboratory's step times."""
        return laboratory()

    def tables(self) -> Iterator[tuple[str, list[Cell]]]:
        """Yield the cells of each table."""
        for name, cells in groupby(self.cells, key=lambda cell: cell.table):
            yield name, list(cells)

    def bars(self) -> list[Bar]:
        """Return every bar."""
        found = []
        for name, cells in self.tables():
            for steps, least in ((1, 0.75), (2, 0.95)):
                share = within(cells, steps)
                words = f"{name}: cells within {steps} step{'s' * (steps > 1)} of the grid"
                found.append(Bar(words, f"{share:.1%}", f"at least {least:.0%}", share >= least))
        worst = max(abs(each.error) for each in self.hours)
        found.append(_error("idealised hours at 15B, largest error", worst, 0.05))
        errors = [abs(run.error(self.efficiency)) for run in self.measured]
        found.append(_error("48 outer steps on shaped links, median error", median(errors), 0.1))
        others = [
            abs(run.error(self.efficiency)) for run in self.measured if not run.run.endswith("-r0")
        ]
        words = "the 32 of them that the efficiency was not fitted to, median error"
        found.append(_error(words, median(others), 0.1))
        steps = median(abs(each.error) for each in self.lab)
        found.append(_error("steps of the laboratory, median error", steps, 0.1))
        return found


def _error(words: str, found: float, limit: float) -> Bar:
    return Bar(words, f"{found:.1%}", f"at most {limit:.0%}", found <= limit)


# ---- page ---------------------------------------------------------------------------------------


def page(check: Check) -> str:
    """Return the page."""
    parts = [
        _HEAD,
        _table(
            ("compared", "found", "bar", ""),
            [(b.words, b.found, b.limit, "holds" if b.holds else "**missed**")
             for b in check.bars()],
        ),
        _BANDWIDTH.format(sent=PARAMETERS.sent),
        *(_table_text(name, cells) for name, cells in check.tables()),
        _sent_text(),
        _HOURS.format(step=IDEAL_STEP),
        _table(
            ("run", "Gbit/s", "published h", "planned h", "error"),
            [(h.series, f"{h.gbit:g}", f"{h.published:g}", f"{h.planned:.1f}", f"{h.error:+.1%}")
             for h in check.hours],
        ),
        _MEASURED.format(efficiency=check.efficiency),
        _measured_text(check),
        _LAB,
        _table(
            ("method", "Mbit/s", "measured ms", "planned ms", "error"),
            [(each.title, f"{each.mbit:g}", f"{1e3 * each.measured:,.0f}",
              f"{1e3 * each.planned:,.0f}", f"{each.error:+.1%}") for each in check.lab],
        ),
        _TAIL,
    ]  # fmt: skip
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_HEAD = """# The planner against published numbers

```
python tools/plan_check.py --markdown docs/performance/planner.md
```

[`tools/plan.py`](../guides/planning.md) beside the tables of two papers, the idealised hours of a
third, and measurements over slow links. The tables are in `configs/studies/published/`, with their
sources. Nothing on this page was measured with this package but the laboratory's steps. Written by
the command; it takes a few seconds of one core."""

_BANDWIDTH = """## Bandwidth for a utilisation

Both papers simulate a model as a chain of equal layers: gradients of a layer are sent as soon as
its backward is done, and are needed at its next forward. `planning.simulation.layered_rounds` is
that chain. Backward has two thirds of a step, an exchange 16 bits a value (4 in the last column of
the streaming paper), fragments three layers, H // (P + 1) steps between two of them, and tau = 1
with overlap. Step times and sizes are the papers'.

One number is not printed: how many bits are on a link for each bit of the model. It is fitted once,
for both tables: {sent:g}. A cell is the published rate in Gbit/s, and how
many steps of the papers' grid (50 rates from 0.1 to 1,000, 21 % apart) ours is above or below."""

_HOURS = """## Idealised hours at 15B

The figure of the MuLoCo paper, read to 2 %. An exchange is one copy of the model in 16 bits and
blocks; a step takes {step:g} s whatever the batch, which is read from the hours at the fast rate.
Not the simulator of the tables above: that figure counts all bits of a copy."""

_MEASURED = """## Outer steps on shaped links

The 48 DiLoCo runs of `diloco_measured.csv`: 4 replicas, 30.85M parameters in fp32, shaped links.
Planned are the measured compute and the bytes of a ring at one share of the nominal rate for all
links, {efficiency:.3f}: the median of the 16 first runs. Median errors of the three runs of each
setting:"""

_LAB = """## The laboratory's steps

All step times of [the laboratory](low_bandwidth.md), read from its page. Planned from the compute
without the network, the planner's bytes and the simulation of our schedule. Links are shaped by
frames, of which TCP's payload is 1,448 of 1,514 bytes; gloo reduces and scatters by an all-reduce.
Nothing is fitted. Compute of the rows with overlap is that of MuLoCo."""

_TAIL = """## What does not fit

- Data parallelism of the 671B model: the paper's bandwidths are above ours, and at 99 % it has no
  rate of its grid. How the paper counts the experts of that model is not printed.
- One efficiency for all links of the 48 runs: their exchanges take longer at the slowest link, for
  their bytes, than at 1 Gbit/s. With H = 128 at 5 Gbit/s they take longest; each of these runs has
  one outer step.
- Slow links of the laboratory: two cores compute for four ranks, and all wait for one that is late.
  No plan knows that.

Memory is compared elsewhere: tests count what a run allocates, [One H100](h100.md) has the GPU's
numbers."""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table_text(name: str, cells: Sequence[Cell]) -> str:
    shares = list(dict.fromkeys(cell.share for cell in cells))
    rows = []
    for row, members in groupby(cells, key=lambda cell: cell.row):
        rows.append((row, *(f"{_gbit(c.published)} ({c.steps:+d})" for c in members)))
    return f"### {name}\n\n" + _table(("model", *(f"{share:.0%}" for share in shares)), rows)


def _gbit(rate: float) -> str:
    return f"{rate:g}" if rate <= GRID[-1] else "over 1,000"


def _sent_text() -> str:
    rows = []
    for sent in _SENT:
        cells = bandwidth_cells(Parameters(sent))
        rows.append((f"{sent:g}", *(f"{within(cells, steps):.0%}" for steps in (0, 1, 2))))
    header = ("bits on the link for each of the model", "equal", "within 1", "within 2")
    return "The same with other values of the fitted number, both tables together:\n\n" + _table(
        header, rows
    )


def _measured_text(check: Check) -> str:
    links = list(dict.fromkeys(run.mbit for run in sorted(check.measured, key=lambda r: r.mbit)))
    intervals = sorted({run.interval for run in check.measured})
    rows = []
    for interval in intervals:
        cells = []
        for mbit in links:
            runs = [r for r in check.measured if (r.interval, r.mbit) == (interval, mbit)]
            cells.append(f"{median(run.error(check.efficiency) for run in runs):+.1%}")
        rows.append((f"H = {interval}", *cells))
    return _table(("", *(f"{mbit:,.0f} Mbit/s" for mbit in links)), rows)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="file for the page")
    options = parser.parse_args(argv)
    held = []

    def body() -> None:
        check = Check()
        held.extend(bar.holds for bar in check.bars())
        for bar in check.bars():
            print(
                f"{'holds ' if bar.holds else 'MISSED'}  {bar.found:>6}  {bar.words}: {bar.limit}"
            )
        if options.markdown:
            options.markdown.write_text(page(check), encoding="utf-8")

    return run_tool(body) or int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
