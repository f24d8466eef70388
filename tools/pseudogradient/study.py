"""The study of claim (d): the cosine to the K = 1 pseudogradient, over K, for both optimizers.

A row is one branch: seed, inner optimizer, warm-up, H and K. Rows are appended as they are
measured, so a study can be interrupted and started again. Pairs of rows with the same seed, warm-up
and H start from the same initial weights and read the same samples.
"""

import csv
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import yaml

from megatron_muloco.config import load_config
from megatron_muloco.errors import ConfigError
from tools.bench.provenance import commit
from tools.pseudogradient.layers import LayerMeasures, measure_layers

__all__ = ["COLUMNS", "METHODS", "Cell", "Row", "overrides", "read_rows", "run_study"]

CONFIG = Path(__file__).with_name("small.yaml")

_SHORTEST = 330
"""Shortest run, in steps. The order of samples depends on the length, so rows share it."""

METHODS = {"muloco": "muon", "diloco": "adamw"}
"""Method -> inner optimizer."""

COLUMNS = (
    "run", "commit", "finished", "status", "method", "replicas", "seed", "outer.sync_interval",
    "warm_steps", "inner.lr", "training.global_batch_size", "matrices", "cosine_mean", "cosine_min",
    "cosine_max", "pairwise_mean", "pairwise_min", "top5_gap_mean", "top_replica", "top_mean",
    "nuclear_replica", "nuclear_mean", "alignment", "step_norm_spread", "rates_ratio", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Settings that all branches from one start have in common."""

    method: str
    seed: int
    warm_steps: int
    lr: float
    batch: int

    def key(self, replicas: int, interval: int) -> str:
        """Return the digest that names a row."""
        base = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))  # without its comments
        text = f"{self}|{replicas}|{interval}|{json.dumps(base, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Row:
    """A row of the table that was read back.

    Attributes:
        method: ``muloco`` or ``diloco``.
        replicas: K.
        seed: Seed of weights and sample order.
        interval: H.
        warm_steps: Inner steps before the branch.
        values: All columns as text.
    """

    method: str
    replicas: int
    seed: int
    interval: int
    warm_steps: int
    values: Mapping[str, str]

    def number(self, column: str) -> float:
        """Return a column as a number."""
        return float(self.values[column])


def overrides(cell: Cell, replicas: int, train_iters: int) -> list[str]:
    """Return the keys of `small.yaml` that a branch replaces."""
    return [
        f"inner.kind={METHODS[cell.method]}",
        f"inner.lr={cell.lr}",
        f"training.seed={cell.seed}",
        f"data.seed={cell.seed}",
        f"training.global_batch_size={cell.batch}",
        f"training.micro_batch_size={cell.batch // replicas}",
        f"training.train_iters={train_iters}",
        f"parallel.num_replicas={replicas}",
    ]


def run_study(
    table: Path, cells: Iterable[Cell], replicas: Sequence[int], intervals: Sequence[int]
) -> None:
    """Measure the branches that the table lacks, and append them.

    Raises:
        ConfigError: The table has other columns, or a K does not divide the batch.
    """
    done = {row.values["run"] for row in read_rows(table)} if table.exists() else set()
    for cell in cells:
        wanted = [K for K in replicas if any(cell.key(K, H) not in done for H in intervals)]
        if uneven := [K for K in wanted if cell.batch % K]:
            raise ConfigError(f"{uneven} replicas do not divide the batch of {cell.batch}.")
        if wanted:
            _run_cell(table, cell, wanted, intervals, done)


def _run_cell(
    table: Path, cell: Cell, wanted: Sequence[int], intervals: Sequence[int], done: set[str]
) -> None:
    from tools.pseudogradient.branches import branch, rates_of, warm_up

    iters = max(_SHORTEST, cell.warm_steps + max(intervals))
    configs = {K: load_config(CONFIG, overrides(cell, K, iters)) for K in {1, *wanted}}
    start = warm_up(configs[1], cell.warm_steps)
    reference = branch(configs[1], start, intervals)
    rates = rates_of(configs[1], cell.warm_steps, max(intervals))
    for K in wanted:
        began = time.perf_counter()
        found = branch(configs[K], start, intervals, keep_steps=True)
        seconds = time.perf_counter() - began
        for H in intervals:
            layers = measure_layers(
                found.pseudogradients[H],
                reference.pseudogradients[H][0],
                [steps[:H] for steps in found.steps],
                rates[:H],
            )
            run = cell.key(K, H)
            if run in done:
                continue
            _append(table, _values(cell, K, H, run, layers, seconds))
            cosine = fmean(each.cosine for each in layers)
            print(
                f"{cell.method} seed {cell.seed} warm {cell.warm_steps} H {H} K {K}: "
                f"cosine {cosine:.3f}, {seconds:.0f} s",
                flush=True,
            )


def _values(
    cell: Cell, K: int, H: int, run: str, layers: Sequence[LayerMeasures], seconds: float
) -> dict[str, str]:
    cosines = [each.cosine for each in layers]
    pairs = [each.pairwise_min for each in layers if each.pairwise_min is not None]

    def mean(values: Iterable[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{fmean(known):.6g}" if known else ""

    return {
        "run": run,
        "commit": commit(),
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "status": "ok",
        "method": cell.method,
        "replicas": str(K),
        "seed": str(cell.seed),
        "outer.sync_interval": str(H),
        "warm_steps": str(cell.warm_steps),
        "inner.lr": f"{cell.lr:g}",
        "training.global_batch_size": str(cell.batch),
        "matrices": str(len(layers)),
        "cosine_mean": f"{fmean(cosines):.6f}",
        "cosine_min": f"{min(cosines):.6f}",
        "cosine_max": f"{max(cosines):.6f}",
        "pairwise_mean": mean(each.pairwise_mean for each in layers),
        "pairwise_min": f"{min(pairs):.6g}" if pairs else "",
        "top5_gap_mean": mean(each.top_gap for each in layers),
        "top_replica": mean(each.top_replica for each in layers),
        "top_mean": mean(each.top_mean for each in layers),
        "nuclear_replica": mean(each.nuclear_replica for each in layers),
        "nuclear_mean": mean(each.nuclear_mean for each in layers),
        "alignment": mean(each.alignment for each in layers),
        "step_norm_spread": mean(each.step_norm_spread for each in layers),
        "rates_ratio": mean(each.rates_ratio for each in layers) if cell.method == "muloco" else "",
        "seconds": f"{seconds:.1f}",
    }


def _append(table: Path, values: Mapping[str, str]) -> None:
    """Append a row in one write; a table that does not exist yet begins with its header."""
    table.parent.mkdir(parents=True, exist_ok=True)
    new = not table.exists()
    with table.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(dict(values))


def read_rows(table: Path) -> list[Row]:
    """Return the rows of a table.

    Raises:
        ConfigError: The file is not there, has other columns, or a row is cut short.
    """
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{table} cannot be read: {error}. Run the study first.") from error
    reader = csv.DictReader(line for line in lines if not line.startswith("#"))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ConfigError(f"{table} has other columns than this version writes. Name a new table.")
    rows = []
    for number, values in enumerate(reader, 2):
        if None in values.values() or None in values:
            raise ConfigError(f"{table}:{number} is cut short. Remove the line and start again.")
        rows.append(
            Row(
                values["method"],
                int(values["replicas"]),
                int(values["seed"]),
                int(values["outer.sync_interval"]),
                int(values["warm_steps"]),
                values,
            )
        )
    return rows
