"""Quality on real text: low-bandwidth outer steps against plain ones, over paired seeds.

    python -m tools.demo_corpus
    python -m tools.bench.quality --out runs/quality
    python -m tools.bench.quality --out runs/quality --report-only \
        --write docs/performance/quality.md

A campaign can be interrupted and started again; the report is made of the runs that are there. All
of them are of one commit: a campaign does not start from uncommitted changes, refuses a directory
with runs of another commit, and replaces them with `--fresh`.
"""

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from tools.bench.quality.grid import VARIANTS, chosen_variants, seeds_of
from tools.bench.quality.page import page
from tools.bench.quality.runs import (
    Result,
    Task,
    clean_commit,
    path_of,
    read_result,
    require_one_commit,
    run_all,
)

COMMAND = "python -m tools.bench.quality"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure the quality of outer steps.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/quality"),
        help="directory of the results, one file per run",
    )
    parser.add_argument("--variants", nargs="+", default=[], help="variants to run; all by default")
    parser.add_argument("--only", default="", help="keep only runs whose names contain this text")
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="seeds of each variant; by default those of the grid"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument(
        "--fresh", action="store_true", help="run again what another commit has made in --out"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="report on finished runs and start none"
    )
    parser.add_argument("--write", type=Path, help="page to write, with a drawing beside it")
    options = parser.parse_args(argv)
    return run_tool(lambda: campaign(options))


def campaign(options: argparse.Namespace) -> None:
    """Make the runs that are missing, then the report."""
    tasks = wanted(chosen_variants(options.variants, options.only), options.seeds)
    if not options.report_only:
        make(options.out, tasks, options.workers, fresh=options.fresh)
    report(options.out, options.write)


def wanted(variants: Mapping[str, tuple[str, ...]], seeds: Sequence[int] | None) -> list[Task]:
    """Return the runs of some variants; those of one seed together, in the order of the grid."""
    tasks = [
        Task(name, seed, keys)
        for name, keys in variants.items()
        for seed in seeds or seeds_of(name)
    ]
    return sorted(tasks, key=lambda task: task.seed)


def make(out: Path, tasks: Sequence[Task], workers: int, *, fresh: bool) -> None:
    """Make the runs that are missing.

    Raises:
        ConfigError: Uncommitted changes, or runs of another commit without ``fresh``; no run has
            started then.
    """
    commit = clean_commit()
    found = finished(out)
    if fresh:
        old = [result for result in found if result.commit != commit]
        for result in old:
            path_of(out, result.variant, result.seed).unlink()
            print(f"removed {result.variant}, seed {result.seed}, of {result.commit}", flush=True)
    else:
        require_one_commit(found, commit)
    missing = [task for task in tasks if not read_result(out, task.variant, task.seed, task.keys)]
    for result in run_all(out, missing, commit, workers):
        print(
            f"{time.strftime('%H:%M:%S')}  {result.variant:24} seed {result.seed}  "
            f"loss {result.loss:.4f}  {result.seconds:.0f} s",
            flush=True,
        )


def report(out: Path, write: Path | None) -> None:
    """Print the page of all variants' runs that are there, and write it where asked."""
    results = finished(out)
    if not results:
        raise ConfigError(f"--out: no finished run in {out}.")
    require_one_commit(results)
    drawing = write.with_suffix(".png") if write else None
    text = page(results, COMMAND, drawing.name if drawing else None)
    print(text)
    if write and drawing:
        from tools.bench.quality.drawing import draw

        write.write_text(text, encoding="utf-8")
        draw(results, drawing)


def finished(out: Path) -> list[Result]:
    """Return the runs of the grid that are there."""
    found = (
        read_result(out, name, seed, keys)
        for name, keys in VARIANTS.items()
        for seed in seeds_of(name)
    )
    return [result for result in found if result]


if __name__ == "__main__":
    # A campaign that is told to end ends its workers too, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
