"""The planner beside published and measured numbers: tables of bandwidth, hours, outer steps.

Everything that is not printed in a source is in `Parameters`: one set for both bandwidth tables.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from megatron_muloco.comm.chunking import ring_bytes
from megatron_muloco.config import RunConfig, load_config, topology_of
from megatron_muloco.config.outer import NoOuter, interval_values
from megatron_muloco.planning.simulation import (
    Layered,
    Program,
    layered_rounds,
    steady_share,
    trainer_rounds,
)
from megatron_muloco.planning.timing import ideal_seconds
from megatron_muloco.planning.traffic import launch_bytes, traffic_plan
from megatron_muloco.scaling.table import Table, read_table
from tools.bench.lowbandwidth.methods import CONFIG, OVERLAP, RANKS, TABLE, Sizes, overrides
from tools.scaling.evidence import rows_of
from tools.scaling.published import DIRECTORY

__all__ = [
    "GRID", "PARAMETERS", "Cell", "Hours", "Lab", "Measured", "Parameters", "bandwidth_cells",
    "fitted_efficiency", "ideal_hours", "laboratory", "measured_outer_steps", "within",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]

GRID = tuple(0.1 * 10 ** (4 * place / 49) for place in range(50))
"""Rates of both papers in Gbit/s: 0.1 to 1,000, 50 of them at equal ratios."""

_PAYLOAD = 1448 / 1514
"""Share of payload in full Ethernet frames of TCP with timestamps: 1,500 bytes less 52 of headers,
and 14 more of the frame. The laboratory's links are shaped by frames."""


# ---- bandwidth tables ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """What the papers' simulator needs and the papers do not print.

    Attributes:
        sent: Bits on a link for each bit of the model in an exchange. Fitted.
    """

    sent: float


PARAMETERS = Parameters(sent=0.75)


@dataclass(frozen=True)
class Cell:
    """One cell of a bandwidth table.

    Attributes:
        table: The paper's table.
        row: Model and method.
        share: Share of the time that computes.
        published: Gbit/s as printed.
        planned: The least rate of the grid with that share. Both are infinite beyond the grid.
    """

    table: str
    row: str
    share: float
    published: float
    planned: float

    @property
    def steps(self) -> int:
        """Steps of the grid from the published to the planned rate."""
        return _place(self.planned) - _place(self.published)


def _place(gbit: float) -> int:
    if math.isinf(gbit):
        return len(GRID)
    return min(range(len(GRID)), key=lambda place: abs(GRID[place] - gbit))


def bandwidth_cells(parameters: Parameters = PARAMETERS) -> list[Cell]:
    """Return all cells of Table 6 of the DiLoCo laws and Table 4 of Streaming DiLoCo."""
    laws, streaming = _rows("diloco_bandwidth"), _rows("streaming_bandwidth")
    return [
        *(_cell("DiLoCo laws, Table 6", f"{r['model']}, {_cadence(r)}", r, parameters)
          for r in laws),
        *(_cell("Streaming DiLoCo, Table 4", f"{r['model']}, {r['method']}", r, parameters)
          for r in streaming),
    ]  # fmt: skip


def _rows(name: str) -> list[dict[str, str]]:
    return rows_of(_table(name))


def _table(name: str) -> Table:
    return read_table(DIRECTORY / f"{name}.csv")


def _cadence(row: Mapping[str, str]) -> str:
    return "data parallel" if row["interval"] == "1" else f"H = {row['interval']}"


def _cell(table: str, name: str, row: Mapping[str, str], parameters: Parameters) -> Cell:
    bits = int(row["params"]) * float(row.get("bits", "16")) * parameters.sent
    model = Layered(
        layers=int(row["layers"]),
        step_seconds=float(row["step_seconds"]),
        bits=bits,
        interval=int(row["interval"]),
        fragments=int(row.get("fragments", "1")),
        overlap_steps=int(row.get("overlap_steps", "0")),
    )
    share = int(row["share_percent"]) / 100
    return Cell(
        table, name, share, float(row["gbit"]), (*GRID, math.inf)[_least_place(model, share)]
    )


@lru_cache(maxsize=1024)
def _share_at(model: Layered, place: int) -> float:
    return steady_share(_program(model), GRID[place] * 1e9)


@lru_cache(maxsize=64)
def _program(model: Layered) -> Program:
    return layered_rounds(model)


def _least_place(model: Layered, share: float) -> int:
    """Return the first place of the grid that reaches a share, by bisection; else one more."""
    low, high = -1, len(GRID)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _share_at(model, middle) >= share else (middle, high)
    return high


def within(cells: Sequence[Cell], steps: int) -> float:
    """Return the share of cells that are at most so many steps of the grid away."""
    return sum(abs(cell.steps) <= steps for cell in cells) / len(cells)


# ---- idealised hours ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hours:
    """Idealised hours of a run.

    Attributes:
        series: Method and K.
        gbit: Rate between replicas, or between all ranks of data parallelism.
        published: Hours read from the figure.
        planned: Ours.
    """

    series: str
    gbit: float
    published: float
    planned: float

    @property
    def error(self) -> float:
        """Relative difference."""
        return self.planned / self.published - 1


IDEAL_STEP = 0.98
"""Seconds of an inner step at 15B, whatever the batch: the figure's hardware grows with it. Read
from its hours at 6,400 Gbit/s."""


def ideal_hours() -> list[Hours]:
    """Return the idealised hours of the six runs at 15B at two rates.

    An exchange is one copy of the model in 16 bits, and blocks.
    """
    runs = {row["series"]: row for row in _rows("muloco_15b")}
    found = []
    for row in _rows("muloco_hours"):
        run, rate = runs[row["series"]], float(row["gbit"])
        bits = 16 * int(run["params"])
        seconds = ideal_seconds(
            int(run["steps"]), IDEAL_STEP, bits, rate * 1e9, int(row["interval"])
        )
        found.append(Hours(row["series"], rate, float(row["hours"]), seconds / 3600))
    return found


# ---- outer steps on shaped links ----------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """An outer step of one measured run.

    Attributes:
        run: Name of the run.
        interval: H.
        mbit: Rate of the links.
        compute: Seconds of its compute.
        bits: Bits that a replica sends.
        seconds: Seconds measured.
    """

    run: str
    interval: int
    mbit: float
    compute: float
    bits: float
    seconds: float

    def planned(self, efficiency: float) -> float:
        """Return the planned seconds, at a share of the nominal rate."""
        return self.compute + self.bits / (self.mbit * 1e6 * efficiency)

    def error(self, efficiency: float) -> float:
        """Return the relative difference of plan and measurement."""
        return self.planned(efficiency) / self.seconds - 1


_SHAPED = {"50m": 50.0, "200m": 200.0, "1g": 1000.0, "5g": 5000.0}


def measured_outer_steps() -> list[Measured]:
    """Return the DiLoCo runs with shaped links of `diloco_measured.csv`."""
    return [
        Measured(
            row["run"],
            int(row["H"]),
            _SHAPED[row["link"]],
            float(row["compute_ms_median"]) / 1e3,
            8.0 * ring_bytes(int(row["parameters"]), int(row["replicas"])),
            float(row["wall_ms_outer_median"]) / 1e3,
        )
        for row in _rows("diloco_measured")
        if row["method"] == "diloco" and row["link"] in _SHAPED
    ]


def fitted_efficiency(runs: Sequence[Measured]) -> float:
    """Return the one share of the nominal rate for all: the median over runs."""
    return median(run.bits / (run.mbit * 1e6 * (run.seconds - run.compute)) for run in runs)


# ---- the laboratory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A measurement of `docs/performance/low_bandwidth.md`.

    Attributes:
        title: Method.
        mbit: Rate of the links.
        measured: Seconds of a step, outer steps included.
        planned: Ours, from the compute without the network and the planner's bytes.
    """

    title: str
    mbit: float
    measured: float
    planned: float

    @property
    def error(self) -> float:
        """Relative difference."""
        return self.planned / self.measured - 1


def laboratory(page: Path = ROOT / "docs/performance/low_bandwidth.md") -> list[Lab]:
    """Return every step time of the page, and ours."""
    text, found = page.read_text(encoding="utf-8"), []
    methods = {method.title: method for method in (*TABLE, *OVERLAP)}
    computes: dict[str, float] = {}
    for rate, rows in _shaped_tables(text):
        for title, cells in rows:
            compute, step = float(cells[2]) / 1e3, float(cells[5]) / 1e3
            computes[title] = compute
            planned = _lab_step(_lab_config(methods[title].changes), compute, rate)
            found.append(Lab(title, rate, step, planned))
    rate, rows = _overlap_table(text)
    for title, cells in rows:
        config = _lab_config(methods[title].changes)
        interval = config.outer.sync_interval  # type: ignore[union-attr]
        planned = _lab_step(config, computes["MuLoCo"], rate)
        found.append(Lab(title, rate, float(cells[0]) / interval, planned))
    return found


def _lab_config(changes: Sequence[str]) -> RunConfig:
    method = next(method for method in (*TABLE, *OVERLAP) if method.changes == tuple(changes))
    return load_config(str(ROOT / CONFIG), list(overrides(method, Sizes(240, 4, 0, 42), "runs")))


def _lab_step(config: RunConfig, compute: float, mbit: float) -> float:
    """Return the planned seconds of a step with one rank on each link.

    gloo reduces and scatters by an all-reduce, which sends twice as much.
    """
    topology, rate = topology_of(config, RANKS), mbit * 1e6 * _PAYLOAD
    if isinstance(config.outer, NoOuter):
        traffic = traffic_plan(config, topology)
        return compute + 8 * (traffic.inner_step + traffic.gradient_reduce) / rate
    bits = [8.0 * sent for sent in launch_bytes(config, topology)]
    interval = interval_values(config.outer.sync_interval)[0]
    program = trainer_rounds(interval, bits, config.outer.overlap_steps, compute)
    return compute / steady_share(program, rate)


def _shaped_tables(text: str) -> Iterator[tuple[float, list[tuple[str, list[str]]]]]:
    for match in re.finditer(r"^## ([\d.]+) Mbit/s\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL):
        yield float(match[1]), _cells(match[2])


def _overlap_table(text: str) -> tuple[float, list[tuple[str, list[str]]]]:
    match = re.search(r"^## Overlap, at ([\d.]+) Mbit/s\n\n(.*?)\n\n", text, re.M | re.S)
    assert match is not None, "the laboratory's page has no table of overlap"
    return float(match[1]), _cells(match[2])


def _cells(table: str) -> list[tuple[str, list[str]]]:
    """Return title and cells of each row of a Markdown table."""
    rows = []
    for line in table.splitlines()[2:]:
        title, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
        rows.append((title, [cell.replace(",", "") for cell in cells]))
    return rows
