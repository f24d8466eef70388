"""Quality on real text: low-bandwidth outer steps against plain ones, over paired seeds.

    python -m tools.demo_corpus
    python -m tools.bench.quality --out runs/quality
    python -m tools.bench.quality --out runs/quality --report-only \
        --write docs/performance/quality.md

A campaign can be interrupted and started again; the report is made of the runs that are there.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from tools.bench.quality.grid import VARIANTS, chosen_variants
from tools.bench.quality.page import page
from tools.bench.quality.runs import Result, read_result, run

SEEDS = (1, 2, 3)
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
        "--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds of each variant"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="report on finished runs and start none"
    )
    parser.add_argument("--write", type=Path, help="page to write, with a drawing beside it")
    options = parser.parse_args(argv)
    return run_tool(lambda: campaign(options))


def campaign(options: argparse.Namespace) -> None:
    """Make the runs that are missing, then the report."""
    variants = chosen_variants(options.variants, options.only)
    for seed in options.seeds:
        for name, keys in variants.items():
            if options.report_only or read_result(options.out, name, seed, keys):
                continue
            result = run(options.out, name, seed, keys)
            print(
                f"{time.strftime('%H:%M:%S')}  {name:24} seed {seed}  loss {result.loss:.4f}  "
                f"{result.seconds:.0f} s",
                flush=True,
            )
    report(options.out, options.seeds, options.write)


def report(out: Path, seeds: Sequence[int], write: Path | None) -> None:
    """Print the page of all variants' runs that are there, and write it where asked."""
    results = finished(out, seeds)
    if not results:
        raise ConfigError(f"--out: no finished run in {out}.")
    drawing = write.with_suffix(".png") if write else None
    text = page(results, COMMAND, drawing.name if drawing else None)
    print(text)
    if write and drawing:
        from tools.bench.quality.drawing import draw

        write.write_text(text, encoding="utf-8")
        draw(results, drawing)


def finished(out: Path, seeds: Sequence[int]) -> list[Result]:
    """Return the runs of the grid that are there."""
    found = (
        read_result(out, name, seed, keys) for name, keys in VARIANTS.items() for seed in seeds
    )
    return [result for result in found if result]


if __name__ == "__main__":
    # A campaign that is told to end ends its ranks too, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
