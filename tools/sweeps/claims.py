"""`claims_of`: the papers' claims as paired quantities over seeds, each with an interval.

Every quantity is made of test losses of runs with one seed, so seeds are the samples and Student's
interval over them is the uncertainty. A claim says on which side of a bound the quantity lies:

- shown: the whole interval does,
- in the mean only: the mean does, and the interval reaches beyond the bound,
- not shown: the mean does not, and the interval reaches the claimed side,
- contradicted: the whole interval is on the other side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_muloco.scaling.critical import FACTOR, largest_below
from megatron_muloco.scaling.optima import parabola_minimum
from tools.bench.quality.statistics import EQUAL_PERCENT, Interval, interval
from tools.sweeps.search import CellState
from tools.sweeps.table import ResultTable

__all__ = ["BASELINES", "Claim", "Evidence", "Losses", "Quantity", "claims_of", "losses_of"]

BASELINES = {"muloco": "dp_muon", "diloco": "dp_adamw"}
"""Method -> its data-parallel baseline."""

_BATCH, _INTERVAL = "training.global_batch_size", "outer.sync_interval"

Seeds = dict[int, float]
"""Seed -> value."""

Key = tuple[str, str, int, str, tuple[tuple[str, Any], ...]]
"""Size, method, K, variant, values of ``over``."""

Losses = Mapping[Key, Seeds]
"""Cell -> seed -> test loss of its best point."""


@dataclass(frozen=True)
class Quantity:
    """A quantity of a claim.

    Attributes:
        label: Which one, for a table.
        samples: Seed -> value.
        unit: Unit of the values.
        bound: The claim is that the quantity is below it.
    """

    label: str
    samples: Seeds
    unit: str
    bound: float = 0.0

    @property
    def interval(self) -> Interval:
        """Mean over seeds, with Student's interval."""
        return interval(list(self.samples.values()))

    @property
    def verdict(self) -> str:
        """The verdict; see the module."""
        found = self.interval
        if found.count < 2:
            return "one seed"
        if found.mean < self.bound:
            return "shown" if found.high < self.bound else "in the mean only"
        return "contradicted" if found.low > self.bound else "not shown"


@dataclass(frozen=True)
class Claim:
    """A claim and what the study says to it.

    Attributes:
        letter: Its letter on the page.
        text: The claim.
        quantities: What was measured; empty where the runs are not there yet.
    """

    letter: str
    text: str
    quantities: Sequence[Quantity]


@dataclass(frozen=True)
class Evidence:
    """Finished cells of a study.

    Attributes:
        losses: Cell -> seed -> test loss of its best point.
        outer_lr: (Method, K) -> seed -> log2 of the best outer learning rate.
    """

    losses: Losses
    outer_lr: Mapping[tuple[str, int], Seeds] = field(default_factory=dict)


def losses_of(states: Sequence[CellState], table: ResultTable) -> Losses:
    """Return the test losses of every cell whose reports are all finished."""
    found: dict[Key, Seeds] = {}
    for state in states:
        if not state.reports or state.missing:
            continue
        cell = state.cell
        key = (cell.size, cell.method, cell.replicas, cell.variant, cell.over)
        rows = {run.seed: table.rows[run.key] for run in state.reports}
        if all(row["status"] == "ok" for row in rows.values()):
            found[key] = {seed: float(row["test_loss"]) for seed, row in rows.items()}
    return found


def outer_lr_of(states: Sequence[CellState], table: ResultTable) -> dict[tuple[str, int], Seeds]:
    """Return log2 of the best outer learning rate by method, K and seed of the search."""
    found: dict[tuple[str, int], Seeds] = {}
    for state in states:
        keys = [axis.key for axis in state.cell.part.axes]
        if "outer.lr" not in keys or not state.searched or state.best is None:
            continue
        best = dict(state.best)
        points = {
            dict(point)["outer.lr"]: table.losses[run.key]
            for point, run in state.runs.items()
            if all(value == best[key] for key, value in point if key != "outer.lr")
        }
        cell = state.cell
        seeds = found.setdefault((cell.method, cell.replicas), {})
        seeds[cell.part.seed] = _lowest(points)
    return found


def _lowest(points: Mapping[float, float]) -> float:
    """Return log2 of the value with the lowest loss, between grid points where they allow it."""
    values = sorted(value for value, loss in points.items() if np.isfinite(loss))
    losses = [points[value] for value in values]
    index = int(np.argmin(losses))
    near = slice(max(0, index - 1), index + 2)
    if len(values[near]) == 3:
        minimum = parabola_minimum(np.log2(values[near]), np.array(losses[near]))
        if minimum is not None:
            return minimum[0]
    return float(np.log2(values[index]))


# ---- the claims ----------------------------------------------------------------------------------


def claims_of(evidence: Evidence) -> list[Claim]:
    """Return the claims that a study's losses can speak to."""
    found = evidence.losses
    return [
        Claim("a", "MuLoCo is below DiLoCo at every K", list(_below(found))),
        Claim(
            "b",
            "The gap to the own data-parallel baseline grows more slowly with K for MuLoCo, K >= 2",
            list(_growth(found)),
        ),
        Claim(
            "c", "MuLoCo with K = 1 is at least equal to data-parallel Muon", list(_single(found))
        ),
        Claim("e", "Four bits and streaming cost at most 0.5 %", list(_wire(found))),
        Claim(
            "f",
            "MuLoCo with K = 1 has a larger critical batch than data-parallel AdamW",
            list(_critical(found)),
        ),
        Claim("g", "The best outer learning rate grows with K", list(_outer(evidence.outer_lr))),
    ]


def _plain(found: Losses, method: str, replicas: int, size: str) -> Seeds:
    return found.get((size, method, replicas, "", ()), {})


def _sizes(found: Losses) -> list[str]:
    return list(dict.fromkeys(key[0] for key in found))


def _paired(left: Seeds, right: Seeds, make: Callable[[float, float], float]) -> Seeds:
    return {seed: make(left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())}


def percent(ours: float, theirs: float) -> float:
    """Return by how many percent a loss is above another."""
    return 100 * (ours / theirs - 1)


def _below(found: Losses) -> Iterator[Quantity]:
    for size in _sizes(found):
        for replicas in sorted({key[2] for key in found}):
            pairs = _paired(
                _plain(found, "muloco", replicas, size),
                _plain(found, "diloco", replicas, size),
                percent,
            )
            if pairs:
                yield Quantity(f"{size}, K = {replicas}: MuLoCo over DiLoCo", pairs, "% of loss")


def gaps(found: Losses, method: str, size: str) -> dict[int, Seeds]:
    """Return K -> seed -> percent of loss above the method's data-parallel baseline."""
    baseline = _plain(found, BASELINES[method], 1, size)
    gap = {
        key[2]: _paired(seeds, baseline, percent)
        for key, seeds in found.items()
        if key[0] == size and key[1] == method and key[3:] == ("", ())
    }
    return {replicas: seeds for replicas, seeds in sorted(gap.items()) if seeds}


def _growth(found: Losses) -> Iterator[Quantity]:
    for size in _sizes(found):
        slopes = {
            method: _slopes({k: s for k, s in gaps(found, method, size).items() if k >= 2})
            for method in BASELINES
        }
        pairs = _paired(slopes["muloco"], slopes["diloco"], lambda ours, theirs: ours - theirs)
        if pairs:
            yield Quantity(f"{size}: slope of MuLoCo less DiLoCo's", pairs, "% per doubling of K")


def _slopes(gap: Mapping[int, Seeds]) -> Seeds:
    """Return seed -> slope of the gap in log2 K, by least squares; empty with fewer than two K."""
    if len(gap) < 2:
        return {}
    seeds = set.intersection(*(set(values) for values in gap.values()))
    x = np.log2(list(gap))
    return {
        seed: float(np.polyfit(x, [values[seed] for values in gap.values()], 1)[0])
        for seed in sorted(seeds)
    }


def _single(found: Losses) -> Iterator[Quantity]:
    for size in _sizes(found):
        pairs = _paired(
            _plain(found, "muloco", 1, size), _plain(found, "dp_muon", 1, size), percent
        )
        if pairs:
            yield Quantity(f"{size}: MuLoCo K = 1 over Muon", pairs, "% of loss")


def _wire(found: Losses) -> Iterator[Quantity]:
    for (size, method, replicas, variant, over), seeds in found.items():
        if variant and not over:
            pairs = _paired(seeds, _plain(found, method, replicas, size), percent)
            label = f"{size}, {method} K = {replicas}: {variant} over plain"
            # Two bits are no part of the claim; they are shown beside it.
            bound = EQUAL_PERCENT if variant != "2-bit" else np.inf
            if pairs:
                yield Quantity(label, pairs, "% of loss", bound)


def critical_batches(found: Losses, method: str, size: str) -> Seeds:
    """Return seed -> log2 of the largest batch within 1 % of the best loss, in sequences.

    Between the last batch within and the first beyond, the loss is linear in log2 of the batch.
    Where the largest batch tried is within, it is the answer, and only a lower bound.
    """
    curve = {
        dict(key[4])[_BATCH]: seeds
        for key, seeds in found.items()
        if key[:4] == (size, method, 1, "") and [name for name, _ in key[4]] == [_BATCH]
    }
    if len(curve) < 3:
        return {}
    seeds = set.intersection(*(set(values) for values in curve.values()))
    return {
        seed: _crossing(sorted((batch, values[seed]) for batch, values in curve.items()))
        for seed in sorted(seeds)
    }


def _crossing(curve: Sequence[tuple[int, float]]) -> float:
    batches, losses = zip(*curve, strict=True)
    found = largest_below(batches, losses, FACTOR * min(losses))
    return float(np.log2(found.grid if found.beyond else found.value))


def _critical(found: Losses) -> Iterator[Quantity]:
    for size in _sizes(found):
        for baseline in ("dp_adamw", "dp_muon", "diloco"):
            pairs = _paired(
                critical_batches(found, baseline, size),
                critical_batches(found, "muloco", size),
                lambda theirs, ours: theirs - ours,
            )
            if pairs:
                bound = 0.0 if baseline == "dp_adamw" else np.inf
                yield Quantity(f"{size}: {baseline} less MuLoCo K = 1", pairs, "log2 batch", bound)


def _outer(best: Mapping[tuple[str, int], Seeds]) -> Iterator[Quantity]:
    for method in BASELINES:
        ks = sorted(k for name, k in best if name == method and len(best[name, k]) > 1)
        if len(ks) > 1:
            pairs = _paired(
                best[method, ks[0]], best[method, ks[-1]], lambda small, large: small - large
            )
            label = f"{method}: K = {ks[0]} less K = {ks[-1]}"
            yield Quantity(label, pairs, "log2 outer lr")
