"""Scaling laws: refit the published ones, fit any table, find the optima of a sweep.

    python tools/scaling_laws.py published
    python tools/scaling_laws.py fit TABLE --form power_offset --x params --y loss
    python tools/scaling_laws.py optimum TABLE --size N --tokens D --loss loss --lr lr --batch B

Guide: docs/guides/scaling_laws.md.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, from anywhere

import numpy as np

from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.scaling.fitting import HUBER_DELTA, METHODS, Fit, fit
from megatron_muloco.scaling.forms import FORMS
from megatron_muloco.scaling.intervals import INTERVALS, estimates, leave_out
from megatron_muloco.scaling.observations import Observations, listed
from megatron_muloco.scaling.optima import (
    KNOBS,
    Cell,
    Regret,
    cells_of,
    interior,
    law_variables,
    optimum_laws,
    regrets,
)
from megatron_muloco.scaling.table import (
    BATCH_UNITS,
    REPEATS,
    Columns,
    Table,
    drop_non_finite,
    points_of,
    read_runs,
    read_table,
    without_repeats,
)
from tools.scaling import published, report


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _published_options(commands.add_parser("published", help="refit the published tables"))
    _fit_options(commands.add_parser("fit", help="fit a law to columns of a table"))
    _optimum_options(commands.add_parser("optimum", help="optima and their laws of a sweep"))
    options = parser.parse_args(argv)
    bodies = {"published": _run_published, "fit": _run_fit, "optimum": _run_optimum}
    return run_tool(lambda: bodies[options.command](options))


def _published_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="directory for published_laws.png")
    parser.add_argument("--markdown", type=Path, help="file for the tables as Markdown")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _fit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="CSV file")
    parser.add_argument("--y", required=True, help="column of the response")
    parser.add_argument(
        "--x", action="append", required=True, help="column of a variable; again for more"
    )
    forms = [*FORMS, "shared_offset"]
    parser.add_argument("--form", default="power", help=f"one of {', '.join(forms)}")
    parser.add_argument("--series", default="", help="column of the series, for shared_offset")
    _where_option(parser)
    _repeats_option(parser)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--delta", type=float, default=HUBER_DELTA, help="of Huber's loss")
    parser.add_argument("--interval", choices=INTERVALS, default="", help="kind of the intervals")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap fits")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--leave-out", default="", help="column whose values are left out in turn")
    parser.add_argument(
        "--complement", action="store_true", help="fit 1 - y, as for a momentum near 1"
    )
    parser.add_argument("--predict", action="append", default=[], help="such as N=4e9,M=2")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _optimum_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", type=Path, help="CSV file, one run a row")
    parser.add_argument("--loss", required=True, help="column of the final loss")
    parser.add_argument("--lr", required=True, help="column of the learning rate")
    parser.add_argument("--batch", required=True, help="column of the global batch")
    parser.add_argument("--batch-unit", choices=BATCH_UNITS, default=BATCH_UNITS[0])
    parser.add_argument("--seq-length", type=int, help="tokens per sequence")
    parser.add_argument("--size", default="", help="column of the parameters, N")
    parser.add_argument("--tokens", default="", help="column of the training tokens, D")
    parser.add_argument(
        "--cell", action="append", default=[], help="further column that tells cells apart"
    )
    _where_option(parser)
    parser.add_argument(
        "--non-finite", choices=("refuse", "drop"), default="refuse", help="losses nan or inf"
    )
    _repeats_option(parser)
    parser.add_argument("--predict", action="append", default=[], help="such as N=4e9,D=8e10")
    parser.add_argument("--cells", type=Path, help="CSV file for the optima, to fit further laws")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def _where_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--where", action="append", default=[], help="COLUMN=VALUE: only such rows")


def _repeats_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", choices=REPEATS, default=REPEATS[0], help="rows that are the same point"
    )


# ---- published ----------------------------------------------------------------------------------


def _run_published(options: argparse.Namespace) -> None:
    comparisons = published.compare_all()
    print(report.comparisons_text(comparisons))
    if options.markdown:
        options.markdown.write_text(report.markdown(comparisons), encoding="utf-8")
    if options.plot:
        from tools.scaling.drawing import draw_published

        draw_published(options.plot / "published_laws.png")
    _write_json(options.json, report.comparisons_json(comparisons))


# ---- fit ----------------------------------------------------------------------------------------


def _run_fit(options: argparse.Namespace) -> None:
    table = _table(options)
    points = points_of(table, options.y, options.x, options.series, options.repeats)
    if options.complement:
        if (points.values >= 1).any():
            raise ConfigError(f"--complement fits 1 - {options.y}, which needs values below 1.")
        points = points.with_values(1 - points.values)
    found = fit(options.form, points, method=options.method, delta=options.delta)
    parameters = estimates(found, interval=options.interval, draws=options.draws, seed=options.seed)
    left = leave_out(found, options.leave_out) if options.leave_out else []
    print(report.fit_text(found, parameters, left))
    predictions = [_predict({options.y: found}, text) for text in options.predict]
    if options.plot:
        from tools.scaling.drawing import draw_fit

        draw_fit(found, options.plot)
    result = report.fit_json(found, parameters, left)
    _write_json(options.json, {**result, "predictions": predictions})


# ---- optimum ------------------------------------------------------------------------------------


def _run_optimum(options: argparse.Namespace) -> None:
    columns = Columns(
        options.loss, options.lr, options.batch, options.size, options.tokens,
        tuple(options.cell), options.batch_unit, options.seq_length,
    )  # fmt: skip
    cells = cells_of(_runs(options, columns), columns.keys)
    print(report.cells_text(cells))
    for knob in KNOBS:
        print(f"{len(interior(cells, knob))} of {len(cells)} optima of {knob} are interior")
    if options.cells:
        _write_cells(options.cells, cells)
    variables, left_out = law_variables(cells)
    print("\n" + "\n".join(f"not in the laws: {reason}" for reason in left_out) if left_out else "")
    laws = optimum_laws(cells, variables)
    parameters = {knob: estimates(law) for knob, law in laws.items()}
    for knob, law in laws.items():
        print(report.law_text(law, parameters[knob]))
    found = _print_regrets(cells, variables)
    predictions = [_predict(laws, text) for text in options.predict]
    if options.plot:
        from tools.scaling.drawing import draw_cells

        draw_cells(cells, laws, options.plot)
    _write_json(
        options.json,
        {
            "cells": report.cells_json(cells),
            "laws": {k: report.fit_json(law, parameters[k], []) for k, law in laws.items()},
            "regrets": report.regrets_json(found),
            "predictions": predictions,
        },
    )


def _print_regrets(cells: Sequence[Cell], variables: Sequence[str]) -> list[Regret]:
    try:
        found = regrets(cells, variables)
    except ConfigError as error:  # the laws stand; there is no cell to spare for a test of them
        print(f"\nno regret of left-out cells: {error}")
        return []
    print("\n" + report.regrets_text(found))
    worst = max(found, key=lambda regret: regret.value)
    print(f"largest regret {100 * worst.value:.2f} % of loss, at {worst.cell.name}")
    return found


def _runs(options: argparse.Namespace, columns: Columns) -> Observations:
    table = _table(options)
    finite, dropped = drop_non_finite(table, columns.loss)
    if dropped and options.non_finite == "refuse":
        raise ConfigError(
            f"column {columns.loss} is not finite at {listed(dropped)}; a parabola through such "
            f"runs has no meaning. Leave them out with --non-finite drop."
        )
    if dropped:
        print(f"left out, loss not finite: {listed(dropped)}\n")
    runs = read_runs(finite, columns)
    return without_repeats(runs, options.repeats)


def _write_cells(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        keys = list(cells[0].keys)
        writer.writerow([*keys, "best_loss", "lr", "lr_edge", "batch", "batch_edge"])
        for cell in cells:
            optima = [cell.optimum(knob) for knob in KNOBS]
            values = [v for o in optima for v in (f"{o.value:.6g}", o.edge)]
            writer.writerow([*(cell.keys[key] for key in keys), cell.best_loss, *values])


# ---- shared -------------------------------------------------------------------------------------


def _table(options: argparse.Namespace) -> Table:
    table = read_table(options.table)
    for condition in options.where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition} is not of the form COLUMN=VALUE.")
        table = table.only(column, value)
    return table


def _predict(laws: dict[str, Fit], text: str) -> dict[str, Any]:
    """Print and return the predictions of laws at ``name=value,...``."""
    try:
        at = {name: float(v) for name, v in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--predict {text} is not of the form N=4e9,M=2.") from error
    values = {
        name: float(law.predict({key: np.array([value]) for key, value in at.items()})[0])
        for name, law in laws.items()
    }
    print(f"at {text}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
    return {"at": at, **values}


def _write_json(path: Path | None, content: object) -> None:
    if path:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
