"""Run a declared study: sweeps of learning rates, batches, K, H and more, resumable.

    python tools/sweep.py run configs/studies/cpu.yaml --workers 2
    python tools/sweep.py status configs/studies/cpu.yaml
    python tools/sweep.py slurm configs/studies/cpu.yaml --submit
    python tools/sweep.py plot configs/studies/cpu.yaml --output plots

Guide: docs/guides/sweeps.md.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import ConfigError, run_tool
from tools.bench.provenance import commit
from tools.sweeps.plots import draw_slices
from tools.sweeps.runs import Runs
from tools.sweeps.search import CellState, Search
from tools.sweeps.slurm import collect_rows, read_wave, submit, write_row, write_wave
from tools.sweeps.study import Study, read_study
from tools.sweeps.table import ResultTable
from tools.sweeps.training import train_run
from tools.sweeps.workers import execute, finished_now


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = _command(commands, "run", "train what is missing, on this machine")
    run.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each"
    )
    run.add_argument("--hours", type=float, default=math.inf, help="start no run after this time")
    run.add_argument("--dry-run", action="store_true", help="print what would run now")
    _command(commands, "status", "print every cell: its best point, or what it waits for")
    slurm = _command(commands, "slurm", "write the runs that can start now as a SLURM array")
    slurm.add_argument("--submit", action="store_true", help="give the array to sbatch")
    slurm.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="OPTION",
        help="option of sbatch, again for more: --option=--partition=cpu",
    )
    task = _command(commands, "task", "train one run of an array; the batch script calls it")
    task.add_argument("--wave", type=Path, required=True, help="list of the array's runs")
    task.add_argument("--index", type=int, required=True, help="index in the array")
    plot = _command(commands, "plot", "draw every slice")
    plot.add_argument("--output", type=Path, required=True, help="directory of the figures")
    _command(commands, "parquet", "write the table as Parquet beside the CSV file")
    options = parser.parse_args(argv)
    bodies = {
        "run": _run, "status": _status, "slurm": _slurm, "task": _task, "plot": _plot,
        "parquet": _parquet,
    }  # fmt: skip
    return run_tool(lambda: bodies[options.command](options))


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("study", type=Path, help="study file")
    parser.add_argument("--slices", nargs="+", default=[], metavar="NAME", help="these slices only")
    return parser


def _open(options: argparse.Namespace) -> tuple[Study, ResultTable, Search]:
    """Return the study, its table and its search, with the slices checked."""
    study = read_study(options.study)
    unknown = [name for name in options.slices if name not in study.slices]
    if unknown:
        raise ConfigError(
            f"--slices: {', '.join(unknown)} unknown; {study.path} has {', '.join(study.slices)}."
        )
    runs = Runs(study)
    return study, ResultTable(study.table, study.varied, runs.data), Search(study, runs)


def _run(options: argparse.Namespace) -> None:
    study, table, search = _open(options)
    slices = tuple(options.slices)
    search.check()
    missing = search.missing(table.losses, slices)
    if options.dry_run:
        for run in missing:
            at = ", ".join(f"{key}={value}" for key, value in run.settings.items())
            print(f"{run.key}  {run.size} {run.method} K={run.replicas} seed {run.seed}  {at}")
        waiting = search.waiting(table.losses, slices)
        print(f"{len(table.rows)} done, {len(missing)} ready, {len(waiting)} cells wait")
        return
    deadline = time.monotonic() + 3600 * options.hours
    made = execute(study, table, workers=options.workers, slices=slices, deadline=deadline)
    print(f"{made} runs made, {len(table.rows)} in {table.path}")


def _status(options: argparse.Namespace) -> None:
    _, table, search = _open(options)
    slices = tuple(options.slices)
    for state in search.states(table.losses, slices):
        print(f"{state.cell.name:48s} {_described(state, table)}")
    for cell in search.waiting(table.losses, slices):
        print(f"{cell.name:48s} waits for an earlier slice")


def _slurm(options: argparse.Namespace) -> None:
    study, table, search = _open(options)
    with table.writing():
        collected = collect_rows(table)
        search.check()
        missing = search.missing(table.losses, tuple(options.slices))
        print(f"{collected} new rows, {len(table.rows)} in {table.path}")
        if not missing:
            print("nothing is missing")
            return
        wave = write_wave(study.path, table, missing, options.option)
    print(f"{len(wave.keys)} runs in {wave.script}")
    print(submit(wave) if options.submit else f"submit it with: sbatch {wave.script}")


def _task(options: argparse.Namespace) -> None:
    study, table, search = _open(options)
    key = read_wave(options.wave, options.index)
    run = next((r for r in search.missing(table.losses) if r.key == key), None)
    if run is None:
        print(f"run {key} is in {table.path}, or the study has changed: nothing to do")
        return
    outcome = train_run(study, run)
    row = table.row(run, outcome, commit(), finished_now())
    print(f"{write_row(table, row)}: {outcome.status}, loss {row['loss'] or 'n/a'}")


def _plot(options: argparse.Namespace) -> None:
    _, table, search = _open(options)
    states = list(search.states(table.losses, tuple(options.slices)))
    for path in draw_slices(states, table, options.output):
        print(path)


def _parquet(options: argparse.Namespace) -> None:
    _, table, _ = _open(options)
    print(f"{len(table.rows)} runs in {table.write_parquet()}")


def _described(state: CellState, table: ResultTable) -> str:
    finished = sum(run.key in table.rows for run in state.runs.values())
    if state.best is None:
        return f"{finished} of {len(state.runs)} runs of this wave"
    at = ", ".join(f"{key} {value:g}" for key, value in state.best) or "one run"
    loss = table.losses[state.runs[state.best].key]
    limit = f"; at the limit of {', '.join(state.at_limit)}" if state.at_limit else ""
    left = f"; {len(state.missing)} reports left" if state.missing else ""
    return f"{loss:.4f} at {at} ({finished} runs){limit}{left}"


if __name__ == "__main__":
    sys.exit(main())
