"""Write the page of a study: verdicts on the papers' claims, tuned values, losses.

    python tools/study_report.py configs/studies/cpu.yaml --output docs/performance/study.md

What lies between the page's two marks is replaced; the text around them stays.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import ConfigError, run_tool
from tools.bench.quality.statistics import interval
from tools.sweeps.claims import (
    BASELINES,
    Claim,
    Evidence,
    Losses,
    claims_of,
    critical_batches,
    gaps,
    losses_of,
    outer_lr_of,
)
from tools.sweeps.runs import Runs
from tools.sweeps.search import CellState, Search
from tools.sweeps.study import read_study
from tools.sweeps.table import ResultTable

BEGIN, END = "<!-- written by tools/study_report.py -->", "<!-- end -->"
NAMES = {
    "dp_adamw": "AdamW DP", "dp_muon": "Muon DP", "diloco": "DiLoCo", "muloco": "MuLoCo",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="study file")
    parser.add_argument("--output", type=Path, help="page to write into; else standard output")
    options = parser.parse_args(argv)
    return run_tool(lambda: _run(options.study, options.output))


def _run(path: Path, output: Path | None) -> None:
    study = read_study(path)
    runs = Runs(study)
    table = ResultTable(study.table, study.varied, runs.data)
    search = Search(study, runs)
    states = list(search.states(table.losses))
    waiting = len(search.waiting(table.losses))
    text = "\n".join(_page(states, waiting, table))
    if output is None:
        print(text)
        return
    page = output.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ConfigError(f"{output}: it needs the lines {BEGIN} and {END}, once each.")
    before, rest = page.split(BEGIN)
    output.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _page(states: Sequence[CellState], waiting: int, table: ResultTable) -> Iterator[str]:
    found = losses_of(states, table)
    evidence = Evidence(found, outer_lr_of(states, table))
    seconds = sum(float(row["seconds"]) for row in table.rows.values())
    finished = sum(state.best is not None and not state.missing for state in states)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in table.rows.values()))
    yield f"{len(table.rows)} runs, {seconds / 3600:.1f} core-hours; {finished} of "
    yield f"{len(states) + waiting} cells are finished. Commits: {commits}."
    yield ""
    yield "## Verdicts"
    for claim in claims_of(evidence):
        yield from _claim(claim)
    yield from _loss_tables(found)
    yield from _tuned(states)
    yield from _over(found, "Length of a round", "outer.sync_interval", "H")
    yield from _over(found, "Batch, in sequences", "training.global_batch_size", "batch")
    yield from _critical_table(found)


def _claim(claim: Claim) -> Iterator[str]:
    yield ""
    yield f"**({claim.letter}) {claim.text}.**"
    yield ""
    if not claim.quantities:
        yield "The runs are not finished."
        return
    yield "| quantity | per seed | mean | 95 % interval | unit | verdict |"
    yield "|---|---|---|---|---|---|"
    for quantity in claim.quantities:
        each = ", ".join(f"{value:+.2f}" for value in quantity.samples.values())
        found = quantity.interval
        verdict = quantity.verdict if quantity.bound < float("inf") else "-"
        yield (
            f"| {quantity.label} | {each} | {found.mean:+.2f} | {found.low:+.2f} to "
            f"{found.high:+.2f} | {quantity.unit} | {verdict} |"
        )


def _loss_tables(found: Losses) -> Iterator[str]:
    yield ""
    yield "## Test losses"
    yield ""
    yield "Mean over seeds with the 95 % interval, and percent above the own baseline."
    yield ""
    yield "| size | method | K | test loss | above baseline, % |"
    yield "|---|---|---|---|---|"
    for (size, method, replicas, variant, over), seeds in sorted(found.items(), key=str):
        if over:
            continue
        loss = interval(list(seeds.values()))
        gap = ""
        if method in BASELINES and not variant:
            values = gaps(found, method, size).get(replicas, {})
            if values:
                mean = interval(list(values.values()))
                gap = f"{mean.mean:+.2f} ± {mean.half_width:.2f}"
        name = f"{NAMES.get(method, method)}{f', {variant}' if variant else ''}"
        yield f"| {size} | {name} | {replicas} | {loss.mean:.4f} ± {loss.half_width:.4f} | {gap} |"


def _tuned(states: Sequence[CellState]) -> Iterator[str]:
    yield ""
    yield "## Tuned values"
    yield ""
    yield "| slice | size | method | K | cell | best | runs | at a limit |"
    yield "|---|---|---|---|---|---|---|---|"
    for state in states:
        if state.best:
            cell = state.cell
            best = ", ".join(f"`{key}` {value:g}" for key, value in state.best)
            over = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in cell.over)
            yield (
                f"| {cell.part.name} | {cell.size} | {NAMES.get(cell.method, cell.method)} | "
                f"{cell.replicas} | {over} | {best} | {len(state.runs)} | "
                f"{', '.join(state.at_limit)} |"
            )


def _over(found: Losses, title: str, key: str, word: str) -> Iterator[str]:
    rows = {
        (size, method, replicas, dict(over)[key]): seeds
        for (size, method, replicas, variant, over), seeds in found.items()
        if key in dict(over) and not variant
    }
    yield ""
    yield f"## {title}"
    yield ""
    if not rows:
        yield "The runs are not finished."
        return
    yield f"| size | method | K | {word} | test loss |"
    yield "|---|---|---|---|---|"
    for (size, method, replicas, value), seeds in sorted(rows.items(), key=lambda item: item[0]):
        loss = interval(list(seeds.values()))
        yield (
            f"| {size} | {NAMES.get(method, method)} | {replicas} | {value} | {loss.mean:.4f} ± "
            f"{loss.half_width:.4f} |"
        )


def _critical_table(found: Losses) -> Iterator[str]:
    lines = []
    for size in dict.fromkeys(key[0] for key in found):
        for method in NAMES:
            seeds = critical_batches(found, method, size)
            if seeds:
                each = ", ".join(f"{2**value:.0f}" for value in seeds.values())
                lines.append(f"| {size} | {NAMES[method]} | {each} |")
    if lines:
        yield ""
        yield "Largest batch within 1 % of the best loss, in sequences, per seed:"
        yield ""
        yield "| size | method | critical batch |"
        yield "|---|---|---|"
        yield from lines


if __name__ == "__main__":
    sys.exit(main())
