"""Critical batch size: from a sweep, from loss curves, or from branches of a checkpoint.

    python tools/critical_batch.py published
    python tools/critical_batch.py largest TABLE
    python tools/critical_batch.py steps TABLE --target 3.2
    python tools/critical_batch.py branch CHECKPOINT --output DIR --tokens 2e6

Guide: docs/guides/critical_batch.md.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.scaling.critical import FACTOR, OVERHEAD
from megatron_muloco.scaling.table import BATCH_UNITS
from tools.scaling import critical_runs
from tools.scaling.critical_runs import CELL_COLUMNS, TUNED_COLUMNS


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    published = commands.add_parser("published", help="the published curves and exponents again")
    published.add_argument("--plot", type=Path, help="PNG file")
    _largest_options(commands.add_parser("largest", help="largest batch near the best loss"))
    _steps_options(commands.add_parser("steps", help="steps to a target loss"))
    _branch_options(commands.add_parser("branch", help="branches of one checkpoint"))
    options = parser.parse_args(argv)
    bodies = {
        "published": _run_published,
        "largest": _run_largest,
        "steps": _run_steps,
        "branch": _run_branch,
    }
    return run_tool(lambda: bodies[options.command](options))


def _largest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="CSV file, one run a row")
    parser.add_argument("--loss", default="loss", help="column of the final loss")
    parser.add_argument("--lr", default="inner.lr", help="column of the learning rate")
    _batch_options(parser)
    parser.add_argument("--tokens", default="tokens", help="column of the training tokens, D")
    parser.add_argument(
        "--cell",
        action="append",
        help="column that tells cells apart; by default "
        f"{', '.join(CELL_COLUMNS)} and every config key that is not tuned, where there are such",
    )
    parser.add_argument(
        "--tuned",
        action="append",
        help="column whose best value is taken at each batch, beside the lr; by default "
        f"{', '.join(TUNED_COLUMNS)}, where there are such",
    )
    parser.add_argument("--size", default="size", help="column of the size: laws go across sizes")
    parser.add_argument("--where", action="append", default=[], help="COLUMN=VALUE: only such rows")
    parser.add_argument("--factor", type=float, default=FACTOR, help="limit over the best loss")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", default="batch_tokens", help="column of the global batch")
    parser.add_argument("--batch-unit", choices=BATCH_UNITS, default=BATCH_UNITS[0])
    parser.add_argument("--seq-length", type=int, help="tokens per sequence")


def _steps_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, nargs="?", help="CSV file, one point of a curve a row")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], help="directories of runs, instead of a table"
    )
    parser.add_argument("--tag", default="lm loss validation", help="tag of the runs' points")
    parser.add_argument("--target", type=float, action="append", required=True, help="target loss")
    parser.add_argument("--run", default="run", help="column of the run")
    parser.add_argument("--step", default="step", help="column of the inner step")
    parser.add_argument("--loss", default="loss", help="column of the loss")
    _batch_options(parser)
    parser.add_argument(
        "--overhead", type=float, default=OVERHEAD, help="further tokens that are accepted"
    )
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _branch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint, iter_*")
    parser.add_argument("--output", type=Path, required=True, help="directory of the branches")
    parser.add_argument("--tokens", type=float, required=True, help="tokens of each branch")
    parser.add_argument(
        "--factors",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="batches, in units of the run's",
    )
    parser.add_argument(
        "--lr-rule",
        choices=("sqrt", "linear", "none"),
        default="sqrt",
        help="lr at k times the batch",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="loss above that of k = 1, nats per token"
    )
    parser.add_argument(
        "--plan", action="store_true", help="write configs and commands, run nothing"
    )
    parser.add_argument("--plot", type=Path, help="PNG file")


# ---- commands -----------------------------------------------------------------------------------


def _run_published(options: argparse.Namespace) -> None:
    curves, laws = critical_runs.published()
    print(critical_runs.cells_text(curves))
    print("\n" + critical_runs.published_text(laws))
    if options.plot:
        from tools.scaling.critical_drawing import draw_cells

        draw_cells(curves, laws, options.plot)


def _run_largest(options: argparse.Namespace) -> None:
    cells, left_out = critical_runs.read_cells(
        options.table,
        loss=options.loss,
        lr=options.lr,
        batch=(options.batch, options.batch_unit, options.seq_length),
        tokens=options.tokens,
        cell=options.cell,
        tuned=options.tuned,
        where=options.where,
        factor=options.factor,
    )
    if left_out:
        print("\n".join([*left_out, ""]))
    print(critical_runs.cells_text(cells))
    laws, reasons = critical_runs.laws(cells, options.tokens, options.size)
    print("\n" + "\n".join([*map(str, laws), *reasons]))
    if options.plot:
        from tools.scaling.critical_drawing import draw_cells

        draw_cells(cells, laws, options.plot)
    _write_json(options.json, critical_runs.cells_json(cells, laws))


def _run_steps(options: argparse.Namespace) -> None:
    if bool(options.table) == bool(options.runs):
        raise ConfigError("name either a table of loss curves or the directories of --runs.")
    if options.table:
        curves = critical_runs.read_curves(
            options.table,
            run=options.run,
            step=options.step,
            loss=options.loss,
            batch=(options.batch, options.batch_unit, options.seq_length),
        )
    else:
        curves = critical_runs.curves_of_runs(options.runs, options.tag)
    found = [
        critical_runs.steps_to_target(curves, target, options.overhead) for target in options.target
    ]
    print("\n\n".join(map(str, found)))
    if options.plot:
        from tools.scaling.critical_drawing import draw_steps

        draw_steps(found, options.plot)
    _write_json(options.json, [each.as_json() for each in found])


def _run_branch(options: argparse.Namespace) -> None:
    from tools.scaling import branches

    plan = branches.plan(
        options.checkpoint,
        options.output,
        factors=options.factors,
        tokens=options.tokens,
        lr_rule=options.lr_rule,
    )
    print(branches.plan_text(plan))
    if options.plan:
        return
    table = branches.run(plan, options.output)
    found = branches.verdict(table, options.tolerance)
    print("\n" + branches.verdict_text(table, found, options.tolerance))
    if options.plot:
        from tools.scaling.critical_drawing import draw_branches

        draw_branches(table, found, options.plot)


def _write_json(path: Path | None, content: object) -> None:
    if path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
