"""Runs seeded faults and writes what came of them.

    python -m tests.chaos run --trials 200 --out FILE [--first-seed N] [--most-ranks R] [--work DIR]
    python -m tests.chaos damage --trials 200 --out FILE [--first-seed N] [--work DIR]
    python -m tests.chaos interrupt --trials 10 [--out FILE] [--first-seed N] [--work DIR]
    python -m tests.chaos report --run FILE --damage FILE [--page FILE]

`run` kills and disturbs whole runs and resumes them; `damage` changes bytes of files and starts a
run on them; `interrupt` presses Ctrl-C on the terminal of a run. Each trial is one line on the
screen and one in the CSV file. Seeds that the file has are skipped, so hundreds of trials fit into
many sittings. Without ``--out`` nothing is written, which replays a seed. Exits with 1 if a trial
of this sitting broke a promise.
"""

import argparse
import csv
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "damage", "interrupt"):
        command = commands.add_parser(name)
        command.add_argument("--trials", type=int, default=1, help="number of seeds")
        command.add_argument("--first-seed", type=int, default=0)
        command.add_argument("--out", type=Path, help="CSV file to append to")
        command.add_argument("--work", type=Path, help="directory for files, which are then kept")
    commands.choices["run"].add_argument(
        "--most-ranks", type=int, default=4, help="leave out seeds whose run has more"
    )
    report = commands.add_parser("report")
    report.add_argument("--run", type=Path, required=True, help="CSV file of `run`")
    report.add_argument("--damage", type=Path, required=True, help="CSV file of `damage`")
    report.add_argument("--page", type=Path, help="page to write; by default the one in docs")
    options = parser.parse_args(arguments)
    if options.command == "report":
        from tests.chaos.report import PAGE, page

        (options.page or PAGE).write_text(page(options.run, options.damage), encoding="utf-8")
        return 0
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before torch; these are for rank workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        try:
            return _trials(options, options.work or Path(scratch))
        finally:
            from tests.support import spawn

            spawn.shutdown()


def _trials(options: argparse.Namespace, work: Path) -> int:
    """Make the trials that the file has not; return the exit code."""
    from megatron_muloco.monitor.build import program_commit
    from tests.chaos.damage import DamageTrials
    from tests.chaos.interrupts import InterruptTrials
    from tests.chaos.trial import KillTrials

    work.mkdir(parents=True, exist_ok=True)
    seeds: Iterator[int] = count(options.first_seed)
    trial: Callable[[int], dict[str, object]]
    if options.command == "run":
        trial = kills = KillTrials(work)
        seeds = (seed for seed in seeds if kills.ranks(seed) <= options.most_ranks)
    else:
        trial = DamageTrials(work) if options.command == "damage" else InterruptTrials(work)
    known = _seeds_of(options.out)
    held = True
    for seed in islice(seeds, options.trials):
        if seed in known:
            continue
        row = {"seed": seed, **trial(seed), "commit": program_commit()}
        held = held and row["held"] == "yes"
        print(", ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        if options.out is not None:
            _append(options.out, row)
        if options.work is None:
            shutil.rmtree(work / str(seed), ignore_errors=True)
    return int(not held)


def _seeds_of(path: Path | None) -> set[int]:
    if path is None or not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {int(row["seed"]) for row in csv.DictReader(file)}


def _append(path: Path, row: dict[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row])
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
