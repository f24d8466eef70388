"""Critical batches of tables of runs: cells, laws in tokens, and steps to a target."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.critical import (
    FACTOR,
    Largest,
    LossCurve,
    StepsLaw,
    first_reach,
    fit_steps,
    interval,
    largest_below,
    loss_curve,
    pooled_spread,
)
from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.intervals import Estimate, estimates
from megatron_muloco.scaling.observations import FloatArray, Observations, listed
from megatron_muloco.scaling.table import Table, drop_non_finite, read_batches, read_table
from tools.scaling.published import DIRECTORY
from tools.scaling.report import text_table

__all__ = [
    "CELL_COLUMNS", "TUNED_COLUMNS", "Cell", "Curve", "Target", "TokenLaw", "cells_json",
    "cells_text", "curves_of_runs", "laws", "published", "published_text", "read_cells",
    "read_curves", "steps_to_target",
]  # fmt: skip

CELL_COLUMNS = ("size", "method", "variant", "replicas", "seq_length", "series")
TUNED_COLUMNS = ("outer.lr", "outer.momentum", "inner.weight_decay")

# Config keys that follow from the batch and the tokens, so they tell no cells apart.
_FOLLOW = (
    "training.global_batch_size", "training.micro_batch_size", "training.train_iters",
    "training.train_tokens", "training.seed", "training.eval_interval", "training.eval_iters",
    "inner.lr_warmup_iters",
)  # fmt: skip
_LEAST_TOKEN_COUNTS = 3
# Runs of equal length end after a whole number of steps or rounds, so their tokens differ a little.
_EQUAL_TOKENS = 1.05
_SAME_TOKENS = 1.01  # within this nothing is said about it

BatchColumn = tuple[str, str, int | None]


@dataclass(frozen=True)
class Cell:
    """Runs that differ in batch, tuned values and seed only, and their critical batch.

    Attributes:
        keys: Column -> text, without the tokens.
        tokens: Training tokens, D.
        curve: Lowest loss at each batch.
        found: The largest batch within the factor.
        low: Lower end of its interval over seeds; ``nan`` without repeated seeds.
        high: Upper end; infinite where it lies beyond the grid.
        notes: What makes it doubtful.
    """

    keys: Mapping[str, str]
    tokens: float
    curve: LossCurve
    found: Largest
    low: float
    high: float
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """The keys as text."""
        return ", ".join(self.keys.values())

    @property
    def name(self) -> str:
        """The keys and the tokens as text."""
        return f"{self.label}, {self.tokens:.4g} tokens"


@dataclass(frozen=True)
class TokenLaw:
    """Critical batch against tokens: ``A tokens^alpha``.

    Attributes:
        label: The cells it holds for.
        law: The fit.
        parameters: A and alpha with intervals.
        printed: The exponent that a paper prints for the same points; ``None`` for own tables.
    """

    label: str
    law: Fit
    parameters: Sequence[Estimate]
    printed: float | None = None

    def __str__(self) -> str:
        """Return the law on one line."""
        parts = [f"{e.name} {e.value:.4g} ({e.low:.4g} to {e.high:.4g})" for e in self.parameters]
        return f"{self.label}: critical batch = A tokens^alpha: " + ", ".join(parts)


# ---- cells of a sweep ---------------------------------------------------------------------------


def read_cells(
    path: Path,
    *,
    loss: str,
    lr: str,
    batch: BatchColumn,
    tokens: str,
    cell: Sequence[str] | None = None,
    tuned: Sequence[str] | None = None,
    where: Sequence[str] = (),
    factor: float = FACTOR,
) -> tuple[list[Cell], list[str]]:
    """Return the cells of a table with at least three batches, and what was left out.

    Args:
        path: CSV file.
        loss: Column of the loss.
        lr: Column of the learning rate; empty where the table has only the best runs.
        batch: Column of the batch, its unit, and the sequence length.
        tokens: Column of the training tokens.
        cell: Columns that tell cells apart; by default see `CELL_COLUMNS`.
        tuned: Further tuned columns; by default `TUNED_COLUMNS`.
        where: Conditions COLUMN=VALUE on rows.
        factor: Limit over the best loss.

    Raises:
        ConfigError: A column is missing, units are mixed, or no cell has three batches.
    """
    if factor <= 1:
        raise ConfigError(f"--factor {factor:g} is not above 1: it multiplies the best loss.")
    table = read_table(path)
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise ConfigError(f"--where {condition} is not of the form COLUMN=VALUE.")
        table = table.only(column, value)
    table, dropped = drop_non_finite(table, loss)
    notes = [f"left out, loss not finite: {listed(dropped)}"] if dropped else []
    if not table.lines:
        raise ConfigError(f"{path}: no row has a finite {loss}.")
    tuned = [c for c in TUNED_COLUMNS if c in table.columns] if tuned is None else tuned
    keys = _cell_columns(table, (lr, batch[0], tokens, *tuned)) if cell is None else cell
    groups = _groups(table, loss, lr, batch, tokens, keys, tuned)
    spread = pooled_spread([runs for _, runs in groups])
    cells = []
    for texts, runs in groups:
        curve = loss_curve(runs)
        shown = {name: text for name, text in zip(keys, texts, strict=True) if text}
        count = float(np.median(runs.variables["tokens"]))
        if len(curve.batches) < 3:
            name = ", ".join([*shown.values(), f"{count:.4g} tokens"])
            notes.append(f"left out, {len(curve.batches)} of 3 batches: {name}")
            continue
        found = largest_below(curve.batches.tolist(), curve.losses, factor * curve.losses.min())
        doubts = _doubts(runs, curve, found)
        ends = (math.nan, math.nan)
        if spread is not None:
            ends = interval(curve, spread, factor=factor)
        cells.append(Cell(shown, count, curve, found, *ends, doubts))
    if not cells:
        raise ConfigError(
            f"{path}: no cell has three batches, which a critical batch needs. Cells are told "
            f"apart by {', '.join([*keys, tokens])}; name other columns with --cell, or add runs."
        )
    return cells, notes


def _doubts(runs: Observations, curve: LossCurve, found: Largest) -> tuple[str, ...]:
    """Return what makes the critical batch of a cell doubtful."""
    notes = [*found.notes, *curve.notes]
    if found.best == curve.batches[0]:
        notes.append(f"the best batch, {found.best:g}, is the smallest that was tried")
    counts = runs.variables["tokens"]
    if counts.max() > _SAME_TOKENS * counts.min():
        spread = counts.max() / counts.min() - 1
        notes.append(f"its runs differ in tokens by up to {spread:.1%}, which changes losses too")
    return tuple(notes)


def _cell_columns(table: Table, knobs: Sequence[str]) -> list[str]:
    """Return the columns that tell cells apart: the named ones, and config keys not tuned."""
    names = [name for name in CELL_COLUMNS if name in table.columns]
    keys = [name for name in table.columns if "." in name and name not in (*knobs, *_FOLLOW)]
    return [name for name in [*names, *keys] if len(set(table.columns[name])) > 1 or name in names]


def _groups(
    table: Table,
    loss: str,
    lr: str,
    batch: BatchColumn,
    tokens: str,
    keys: Sequence[str],
    tuned: Sequence[str],
) -> list[tuple[tuple[str, ...], Observations]]:
    """Return the runs of each cell, with the text of its keys."""
    settings = list(zip(*(table.column(name) for name in tuned), strict=True))
    rates = table.numbers(lr) if lr else np.ones(len(table.lines))
    variables = {
        "lr": rates,
        "batch": read_batches(table, *batch),
        "tokens": table.numbers(tokens),
    }
    series = [" ".join(each) for each in settings] if settings else ()
    runs = Observations(variables, table.numbers(loss), loss, table.rows, series)
    texts = [table.column(name) for name in keys]
    labels = list(zip(*texts, strict=True)) if texts else [()] * len(runs)
    found = []
    for label in dict.fromkeys(labels):
        members = runs.where(np.array([each == label for each in labels]))
        counts = members.variables["tokens"]
        for count in _clusters(counts):
            chosen = (counts >= count) & (counts <= count * _EQUAL_TOKENS)
            found.append((label, members.where(chosen)))
    return found


def _clusters(counts: FloatArray) -> list[float]:
    """Return the lowest value of each cluster of token counts."""
    lowest: list[float] = []
    for count in np.unique(counts).tolist():
        if not lowest or count > lowest[-1] * _EQUAL_TOKENS:
            lowest.append(count)
    return lowest


def laws(cells: Sequence[Cell], tokens: str, size: str) -> tuple[list[TokenLaw], list[str]]:
    """Return the laws in tokens, one for all cells that differ in tokens and size only.

    Cells whose critical batch lies beyond the grid take no part.

    Returns:
        The laws, and why there is none for some cells.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        label = ", ".join(text for name, text in cell.keys.items() if name != size)
        groups.setdefault(label, []).append(cell)
    found, reasons = [], []
    for label, members in groups.items():
        usable = [cell for cell in members if not cell.found.beyond]
        counts = len({cell.tokens for cell in usable})
        if counts < _LEAST_TOKEN_COUNTS:
            reasons.append(
                f"{label}: no law in {tokens}: {counts} token counts with a critical batch inside "
                f"the grid, and a law needs {_LEAST_TOKEN_COUNTS}"
            )
            continue
        points = Observations(
            {"tokens": np.array([cell.tokens for cell in usable])},
            np.array([cell.found.value for cell in usable]),
            "critical batch",
            [cell.name for cell in usable],
        )
        law = fit("power", points)
        found.append(TokenLaw(label, law, estimates(law)))
        if len({cell.keys.get(size) for cell in usable}) > 1:
            reasons.append(f"{label}: its cells differ in {size} too; the law gives it to tokens")
    return found, reasons


def cells_text(cells: Sequence[Cell]) -> str:
    """Return a table of critical batches, and a line for each doubt."""
    rows, notes = [], []
    for cell in cells:
        found = cell.found
        grid = f"> {found.grid:.4g}" if found.beyond else f"{found.grid:.4g}"
        value = "beyond" if found.beyond else f"{found.value:.4g}"
        best = f"{cell.curve.losses.min():.4f}"
        ends = [_end(cell.low), _end(cell.high)]
        rows.append((cell.name, best, f"{found.best:.4g}", grid, value, *ends))
        notes += [f"! {cell.name}: {note}" for note in cell.notes]
    header = ("cell", "best loss", "at batch", "grid", "critical batch", "95 % from", "to")
    return "\n".join([text_table(header, rows), *notes])


def _end(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return "beyond" if math.isinf(value) else f"{value:.4g}"


def cells_json(cells: Sequence[Cell], found: Sequence[TokenLaw]) -> dict[str, Any]:
    """Return cells and laws as JSON; what does not exist is null."""
    return {
        "cells": [
            {
                "keys": dict(cell.keys),
                "tokens": cell.tokens,
                "batches": cell.curve.batches.tolist(),
                "losses": cell.curve.losses.tolist(),
                "lrs": cell.curve.lrs.tolist(),
                "best_batch": cell.found.best,
                "grid": cell.found.grid,
                "critical_batch": _finite(cell.found.value),
                "low": _finite(cell.low),
                "high": _finite(cell.high),
                "notes": list(cell.notes),
            }
            for cell in cells
        ],
        "laws": [
            {
                "label": law.label,
                **{e.name: [e.value, e.low, e.high] for e in law.parameters},
            }
            for law in found
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- the published ones -------------------------------------------------------------------------


def published() -> tuple[list[Cell], list[TokenLaw]]:
    """Return MuLoCo's curves at 3.07B and the laws of its critical batches in tokens."""
    curves, _ = read_cells(
        DIRECTORY / "muloco_batch.csv", loss="loss", lr="", batch=("batch", "tokens", None),
        tokens="tokens", cell=["series"],
    )  # fmt: skip
    return curves, list(_published_laws())


def _published_laws() -> Iterator[TokenLaw]:
    table = read_table(DIRECTORY / "muloco_critical_batch.csv")
    exponents = read_table(DIRECTORY / "muloco_critical_batch_exponents.csv")
    printed = exponents.numbers("exponent").tolist()
    for series, exponent in zip(exponents.column("series"), printed, strict=True):
        rows = table.only("series", series)
        if len(rows.lines) < _LEAST_TOKEN_COUNTS:
            continue
        variables = {"tokens": rows.numbers("tokens")}
        values = rows.numbers("critical_batch")
        law = fit("power", Observations(variables, values, "critical batch", rows.rows))
        yield TokenLaw(series, law, estimates(law), exponent)


def published_text(found: Sequence[TokenLaw]) -> str:
    """Return refitted exponents beside the printed ones."""
    rows = []
    for law in found:
        alpha = next(e for e in law.parameters if e.name == "alpha")
        ends = (f"{alpha.low:.3f}", f"{alpha.high:.3f}")
        rows.append(
            (law.label, str(len(law.law.points)), f"{law.printed:.4f}", f"{alpha.value:.4f}", *ends)
        )
    return text_table(("exponent of", "points", "printed", "refitted", "95 % from", "to"), rows)


# ---- steps to a target --------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Loss of a run against its inner steps.

    Attributes:
        run: Name of the run.
        batch: Global batch in tokens.
        steps: Inner steps.
        losses: Loss at each.
    """

    run: str
    batch: float
    steps: Sequence[float]
    losses: Sequence[float]


@dataclass(frozen=True)
class Target:
    """Steps that reach a target with each batch.

    Attributes:
        target: The loss, nats per token.
        batches: Batches in tokens that reach it.
        steps: Fewest steps over the runs of each batch.
        law: The law of steps.
        overhead: Further tokens that are accepted, as a fraction.
        measured: The largest batch whose tokens are within the overhead of the fewest.
        notes: Runs that do not reach the target, and doubts.
    """

    target: float
    batches: Sequence[float]
    steps: Sequence[float]
    law: StepsLaw
    overhead: float
    measured: Largest
    notes: Sequence[str]

    def __str__(self) -> str:
        """Return the steps as a table, the law and both critical batches."""
        law, fewest = self.law, min(s * b for s, b in zip(self.steps, self.batches, strict=True))
        rows = [
            (
                f"{batch:.4g}",
                f"{steps:.1f}",
                f"{law.steps(np.array([batch]))[0]:.1f}",
                f"{steps * batch:.4g}",
                f"{100 * (steps * batch / fewest - 1):+.1f}",
            )
            for batch, steps in zip(self.batches, self.steps, strict=True)
        ]
        header = ("batch, tokens", "steps", "by the law", "tokens", "above the fewest, %")
        share = f"{100 * self.overhead:g} %"
        measured = self.measured
        by_grid = f"> {measured.grid:.4g}, beyond the grid" if measured.beyond else (
            f"{measured.value:.4g} (largest tried: {measured.grid:.4g})"
        )  # fmt: skip
        return "\n".join(
            [
                f"target {self.target:g} nats per token",
                text_table(header, rows),
                f"steps = {law.s_min:.4g} (1 + {law.b_noise:.4g} / batch), b_noise 95 % "
                f"{law.low:.4g} to {_end(law.high)}, sigma {law.sigma:.2g}",
                f"critical batch, {share} more tokens than small batches, by the law: "
                f"{law.critical(self.overhead):.4g}",
                f"critical batch, {share} more tokens than the fewest measured: {by_grid}",
                *(f"! {note}" for note in self.notes),
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Return the numbers; what does not exist is null."""
        return {
            "target": self.target,
            "batches": list(self.batches),
            "steps": list(self.steps),
            "s_min": self.law.s_min,
            "b_noise": self.law.b_noise,
            "low": _finite(self.law.low),
            "high": _finite(self.law.high),
            "critical_batch_law": self.law.critical(self.overhead),
            "critical_batch_measured": _finite(self.measured.value),
            "notes": list(self.notes),
        }


def read_curves(path: Path, *, run: str, step: str, loss: str, batch: BatchColumn) -> list[Curve]:
    """Return the loss curves of a table with one point a row.

    Raises:
        ConfigError: A column is missing, units are mixed, or a run has two batches.
    """
    table = read_table(path)
    batches = read_batches(table, *batch)
    steps, losses = table.numbers(step), table.numbers(loss)
    curves = []
    for name in dict.fromkeys(table.column(run)):
        members = np.array([cell == name for cell in table.column(run)])
        if np.ptp(batches[members]) > 0:
            raise ConfigError(f"{path}: run {name} has more than one batch; name runs apart.")
        size = float(batches[members][0])
        curves.append(Curve(name, size, steps[members].tolist(), losses[members].tolist()))
    return curves


def curves_of_runs(directories: Sequence[Path], tag: str) -> list[Curve]:
    """Return the loss curves of run directories, with the batch of each run's config.

    Raises:
        ConfigError: A directory holds no such points, or no config.
    """
    from tools.run_points import read_run

    curves = []
    for directory in directories:
        run = read_run(directory)
        if tag not in run.points or "config" not in run.facts:
            raise ConfigError(
                f"{directory}: {run.source} holds no {tag}, or not the run's config. Name the "
                "directory of a run of this package with held-out data."
            )
        config = run.facts["config"]
        batch = config["training"]["global_batch_size"] * config["model"]["seq_length"]
        steps, losses = zip(*run.points[tag], strict=True)
        curves.append(Curve(directory.name, float(batch), steps, losses))
    return curves


def steps_to_target(curves: Sequence[Curve], target: float, overhead: float) -> Target:
    """Return the steps to a target with each batch, their law and the critical batches.

    Raises:
        ConfigError: Fewer than three batches reach the target; those that do not are named.
    """
    fewest: dict[float, float] = {}
    notes = []
    for curve in curves:
        try:
            steps = first_reach(curve.steps, curve.losses, target)
        except ConfigError as error:
            notes.append(f"run {curve.run} is left out: {error}")
            continue
        if steps is None:
            best = np.nanmin(curve.losses)
            notes.append(f"run {curve.run} never reaches {target:g}; its lowest loss is {best:.4f}")
            continue
        fewest[curve.batch] = min(steps, fewest.get(curve.batch, math.inf))
    batches = sorted(fewest)
    steps_of = [fewest[batch] for batch in batches]
    try:
        law = fit_steps(batches, steps_of)
    except ConfigError as error:
        raise ConfigError([f"target {target:g}: {error}", *notes]) from error
    tokens = [batch * steps for batch, steps in fewest.items()]
    by_batch = [fewest[batch] * batch for batch in batches]
    measured = largest_below(batches, by_batch, (1 + overhead) * min(tokens))
    if not batches[0] <= law.critical(overhead) <= batches[-1]:
        notes.append("the critical batch by the law lies outside the batches that were tried")
    notes += [note for note in (law.problem, *measured.notes) if note]
    return Target(target, batches, steps_of, law, overhead, measured, notes)
