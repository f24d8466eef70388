"""Pseudogradients: how replicas' progress of a round adds up, from files or from branches.

    python tools/pseudogradients.py saved DIR --out runs/pseudogradients
    python tools/pseudogradients.py branches --config FILE --out runs/pseudogradients
    python tools/pseudogradients.py study --table configs/studies/pseudogradients.csv

Guide: docs/guides/pseudogradients.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import run_tool

_REPLICAS = (1, 2, 4, 8, 16)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _saved_options(commands.add_parser("saved", help="analyse rounds that a run has saved"))
    _branches_options(commands.add_parser("branches", help="train K replicas for each K, analyse"))
    _study_options(commands.add_parser("study", help="cosine to K = 1 over K and seeds, resumable"))
    page = commands.add_parser("page", help="page and figure of the study's table")
    page.add_argument("--table", type=Path, required=True, help="CSV file of the study")
    page.add_argument("--page", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(argv)
    bodies = {
        "saved": _run_saved,
        "branches": _run_branches,
        "study": _run_study,
        "page": _run_page,
    }
    return run_tool(lambda: bodies[options.command](options))


def _saved_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="monitor.save_pseudogradients.dir of a run")
    parser.add_argument("--reference", type=Path, help="that of a K = 1 run from the same anchor")
    _output_options(parser)


def _branches_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys")
    parser.add_argument(
        "--inner", nargs="+", default=[], metavar="KIND:LR", help="such as muon:0.044 adamw:0.0078"
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=list(_REPLICAS), metavar="K")
    parser.add_argument("--warm-steps", type=int, default=0, help="inner steps before a branch")
    parser.add_argument("--interval", type=int, default=30, help="H, inner steps of a branch")
    _output_options(parser)


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--matrix", default="", help="part of the name of the drawn matrix")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pseudogradients"), help="directory of the output"
    )


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", type=Path, required=True, help="CSV file, appended to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--replicas", type=int, nargs="+", default=list(_REPLICAS), metavar="K")
    parser.add_argument("--intervals", type=int, nargs="+", default=[10, 30], metavar="H")
    parser.add_argument(
        "--warm-steps", type=int, nargs="+", default=[0, 300], help="inner steps before a branch"
    )
    parser.add_argument("--muon-lr", type=float, default=0.044, help="inner.lr of Muon")
    parser.add_argument("--adamw-lr", type=float, default=0.0078, help="inner.lr of AdamW")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step, all replicas")


def _run_saved(options: argparse.Namespace) -> None:
    from tools.pseudogradient.analysis import analyse_saved

    print(analyse_saved(options.directory, options.reference, options.matrix, options.out))


def _run_branches(options: argparse.Namespace) -> None:
    from megatron_muloco.runtime.distributed import silence_known_warnings
    from tools.pseudogradient.analysis import analyse_branches

    silence_known_warnings()
    print(
        analyse_branches(
            options.config,
            options.set,
            options.inner,
            options.replicas,
            options.warm_steps,
            options.interval,
            options.matrix,
            options.out,
        )
    )


def _run_page(options: argparse.Namespace) -> None:
    from tools.pseudogradient.page import write_page
    from tools.pseudogradient.study import read_rows

    print(write_page(read_rows(options.table), options.page))


def _run_study(options: argparse.Namespace) -> None:
    from megatron_muloco.runtime.distributed import silence_known_warnings
    from tools.pseudogradient.study import METHODS, Cell, run_study

    silence_known_warnings()
    rates = {"muloco": options.muon_lr, "diloco": options.adamw_lr}
    cells = [
        Cell(method, seed, warm, rates[method], options.batch)
        for warm in options.warm_steps
        for seed in options.seeds
        for method in METHODS
    ]
    run_study(options.table, cells, options.replicas, options.intervals)


if __name__ == "__main__":
    sys.exit(main())
