"""What the published tables say about the settings of a run, each with a label.

`Published` answers for one target at a time: batch, inner lr, weight decay, outer lr and momentum.
A setting that the paper has for this very size, method and K is taken as it is, and the law is
printed beside it. Otherwise:

- *batch*: the best batch at 3.07B of the method and K, times (tokens / 61.4B)^a, where a is the
  exponent of the method's critical batch. "Best" is the largest batch that is not measurably worse
  than the lowest loss.
- *inner lr*: with Muon a power law in the size through the tuned values of all K. With AdamW there
  are two tuned values of DiLoCo: their trend, from the tuned value of the nearest K. An interval
  needs more points than that, so it is unknown.
- *outer lr and momentum*: linear in log2 K between the published K, to one decimal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.critical import critical_batch
from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.intervals import estimates, prediction_interval
from megatron_muloco.scaling.observations import Observations
from megatron_muloco.scaling.table import Table, points_of, read_table
from tools.scaling.labelled import Prediction, Target, Value, lr_step, power_of_two
from tools.scaling.published import DIRECTORY

__all__ = ["READING", "SAME", "Evidence", "Published", "extrapolated", "millions", "rows_of"]

READING = 0.002  # reading error of the losses in muloco_batch.csv
SYNC_INTERVAL = 30  # all scaling experiments of the MuLoCo paper

_REFERENCE = "3.07B"  # the only size with published losses against the batch
SAME = 0.05  # relative difference below which two sizes or budgets are the same


class Evidence(Protocol):
    """Where the settings of a run come from."""

    def batch(self, target: Target) -> Value:
        """Return the global batch in sequences."""

    def inner_lr(self, target: Target) -> Value:
        """Return the inner learning rate."""

    def weight_decay(self, target: Target) -> Value:
        """Return the weight decay at 512 sequences per replica."""

    def outer(self, target: Target) -> list[Value]:
        """Return outer lr, momentum and H; nothing for data parallelism."""


def rows_of(table: Table) -> list[dict[str, str]]:
    """Return the rows of a table, column -> cell."""
    names = list(table.columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def millions(tokens: float) -> str:
    """Return a batch in tokens as text: ``8.39M``."""
    return f"{tokens / 1e6:.3g}M"


@dataclass(frozen=True)
class Published:
    """The MuLoCo paper's settings (arXiv 2505.23725), continued where it has none."""

    def batch(self, target: Target) -> Value:
        """Return the batch: that of the paper's run, or the law snapped to a power of 2."""
        law = self.best_batch(target)
        words = f"fitted best batch {law.words}; critical batch {self.critical(target).words}"
        for name, source in (
            ("muloco_15b", "legend of the figure of the 15B runs"),
            ("muloco_tuned", "code, tuned at this size and K"),
        ):
            if row := _same_run(_runs(name), target):
                tokens = float(row["batch"])
                label = f"paper: {source}: {millions(tokens)} tokens; {words}"
                return Value(_BATCH, int(tokens) // target.seq_length, label)
        sequences = power_of_two(law.value / target.seq_length)
        label = (
            f"{words}; snapped to {millions(sequences * target.seq_length)} tokens, a power of 2"
        )
        return Value(_BATCH, sequences, label.replace("fitted best batch", "fitted: best batch", 1))

    def inner_lr(self, target: Target) -> Value:
        """Return the inner lr: the paper's, or a law or trend on the grid of powers of sqrt(2)."""
        if row := _same_run(_runs("muloco_tuned"), target):
            label = f"paper: {_SOURCES[row['source']]}; at this size and K"
            return Value(_LR, float(row["inner_lr"]), label)
        law = self.lr_law(target)
        snapped = lr_step(law.value)
        ends = self._lr_range(target)
        if ends and not min(ends) <= snapped <= max(ends):
            value = min(max(snapped, min(ends)), max(ends))
            label = (
                f"paper: the summary has {max(ends):g} falling to {min(ends):g} for K = 1 over all "
                f"sizes, and this is its end; fitted {law.words}"
            )
            return Value(_LR, value, label)
        label = f"fitted: {law.words}; snapped to a power of sqrt(2), the paper's grid"
        return Value(_LR, snapped, label)

    def weight_decay(self, target: Target) -> Value:
        """Return the weight decay at 512 sequences per replica, of the nearest size."""
        rows = rows_of(_table("muloco_weight_decay"))
        row = min(rows, key=lambda row: abs(math.log(float(row["params"]) / target.params)))
        here = abs(math.log(float(row["params"]) / target.params)) < SAME
        where = "at this size" if here else f"at {row['size']}, the nearest size"
        label = f"paper: code, {where}; in proportion to the sequences per replica"
        return Value("inner.weight_decay_base", float(row[target.inner]), label)

    def outer(self, target: Target) -> list[Value]:
        """Return outer lr, momentum and H for a number of replicas."""
        if not target.has_outer_step:
            return []
        return [
            _by_replicas("outer.lr", _outer_points(target.method, "outer_lr"), target.replicas),
            _by_replicas(
                "outer.momentum", _outer_points(target.method, "outer_momentum"), target.replicas
            ),
            Value("outer.sync_interval", SYNC_INTERVAL, "paper: code, all scaling experiments"),
        ]

    # ---- laws -----------------------------------------------------------------------------------

    def best_batch(self, target: Target) -> Prediction:
        """Return the best batch in tokens: that at 3.07B, and the exponent of the critical batch.

        The interval combines that of the exponent and half a step of the grid of batches.
        """
        table = _table("muloco_batch").only("series", _published_series(target))
        batches, losses = table.numbers("batch"), table.numbers("loss")
        tokens = float(table.numbers("tokens")[0])
        as_good = losses <= losses.min() + 2 * READING + 1e-9
        base, ratio = float(batches[as_good].max()), target.tokens / tokens
        name, value, low, high = self._exponent(target)
        ends = sorted((ratio**low, ratio**high))
        law = (
            f"{millions(base)} tokens at {_REFERENCE} and {_published_series(target)} x (tokens / "
            f"{tokens / 1e9:.3g}B)^{name}, {extrapolated(ratio)}"
        )
        low, high = base * ends[0] / math.sqrt(2), base * ends[1] * math.sqrt(2)
        interval = "95 % of the exponent and half a step of the grid:"
        return Prediction(base * ratio**value, law, low, high, interval, millions)

    def critical(self, target: Target) -> Prediction:
        """Return the critical batch in tokens, the largest within 1 % of the best loss."""
        found, points = self._critical_fit(target), self._critical_points(target)
        largest = float(points.variables["tokens"].max())
        reach = extrapolated(target.tokens / largest)
        if found is None:
            exponent, last = self._printed_exponent(target), float(points.values[-1])
            value = last * (target.tokens / largest) ** exponent
            law = f"printed power {exponent:g} of tokens, {len(points)} points, {reach}"
            return Prediction(value, law, show=millions)
        at = {"tokens": target.tokens, "replicas": float(target.replicas)}
        at = {name: at[name] for name in points.variables}
        value = float(found.predict({name: [x] for name, x in at.items()})[0])
        law = f"{found.form.formula}, {len(points)} points, {reach}"
        return Prediction(value, law, *prediction_interval(found, at), show=millions)

    def lr_law(self, target: Target) -> Prediction:
        """Return the inner lr before it is snapped."""
        if target.inner == "muon":
            return self._muon_lr(target)
        rows = _runs("muloco_tuned")
        pair = [row for row in rows if row["series"].startswith("diloco")]
        (small, lr_small), (large, lr_large) = (
            (float(r["params"]), float(r["inner_lr"])) for r in pair
        )
        trend = math.log(lr_large / lr_small) / math.log(large / small)
        known = [row for row in rows if row["series"].startswith(("diloco", "dp_adamw"))]
        near = min(
            known,
            key=lambda r: (
                abs(math.log2(float(r["replicas"]) / target.replicas)),
                -float(r["params"]),
            ),
        )
        ratio = target.params / float(near["params"])
        value = float(near["inner_lr"]) * ratio**trend
        doubt = (
            ", from a comment in the code and less certain," if near["source"] == "comment" else ""
        )
        law = (
            f"{near['inner_lr']} at {near['size']} and {near['series']}{doubt} x "
            f"(params / {near['size']})^{trend:.3f}, the trend of 2 points ("
            + ", ".join(f"{row['series']} at {row['size']}" for row in pair)
            + f"; arXiv 2503.09799 prints "
            f"{_printed_lr_power():g}), {extrapolated(ratio)}"
        )
        return Prediction(value, law)

    def _muon_lr(self, target: Target) -> Prediction:
        found = self.muon_lr_fit
        sizes = found.points.variables["params"]
        ratio = target.params / float(sizes.max())
        value = float(found.predict({"params": [target.params]})[0])
        law = (
            f"A·params^{found.values['alpha']:.3f} through {len(sizes)} tuned values of Muon at "
            f"all K, {extrapolated(ratio)}"
        )
        return Prediction(value, law, *prediction_interval(found, {"params": target.params}))

    @cached_property
    def muon_lr_fit(self) -> Fit:
        """Power law of Muon's tuned inner lr in the size, all K together."""
        tuned = [r for r in _runs("muloco_tuned") if r["series"].startswith(("mulo", "dp_muon"))]
        top = _range_ends()[0]  # the other end may belong to 3.07B or to 15B
        rows = [top, *tuned]
        sizes = np.array([float(row["params"]) for row in rows])
        return fit(
            "power",
            Observations({"params": sizes}, np.array([float(r["inner_lr"]) for r in rows]), "lr"),
        )

    def _lr_range(self, target: Target) -> list[float]:
        """Return the ends of the stated range of the inner lr; nothing where none is stated."""
        return [float(end["inner_lr"]) for end in _range_ends() if end["series"] == target.series]

    def _exponent(self, target: Target) -> tuple[str, float, float, float]:
        """Return the exponent of the critical batch in tokens, as text and with its interval."""
        found = self._critical_fit(target)
        if found is None:
            printed = self._printed_exponent(target)
            return f"{printed:g} (printed)", printed, math.nan, math.nan
        power = next(e for e in estimates(found) if e.name == "alpha")
        words = f"{power.value:.3f} ({power.low:.3f} to {power.high:.3f})"
        return words, power.value, power.low, power.high

    def _critical_points(self, target: Target) -> Observations:
        """Return the critical batches of a method: at K = 1 by tokens, at other K at 3.07B.

        Curves whose largest batch is still within 1 % give a bound only and are left out.
        """
        method = target.method
        first = f"{method}_k1" if target.has_outer_step else method
        read = points_of(
            _table("muloco_critical_batch").only("series", first), "critical_batch", ["tokens"]
        )
        if not target.has_outer_step:
            return read
        tokens, batches = read.variables["tokens"].tolist(), read.values.tolist()
        replicas, curves = [1.0] * len(batches), _table("muloco_batch")
        for k in (2, 4, 8, 16):
            curve = curves.only("series", f"{method}_k{k}")
            try:
                found = critical_batch(
                    curve.numbers("batch").tolist(), curve.numbers("loss").tolist()
                )
            except ConfigError:  # a bound
                continue
            tokens.append(float(curve.numbers("tokens")[0]))
            batches.append(found)
            replicas.append(float(k))
        return Observations(
            {"tokens": np.array(tokens), "replicas": np.array(replicas)}, np.array(batches), "batch"
        )

    def _critical_fit(self, target: Target) -> Fit | None:
        """Return the power law of the critical batch; None where its points are too few."""
        points = self._critical_points(target)
        return fit("power", points) if len(points) > len(points.variables) + 1 else None

    def _printed_exponent(self, target: Target) -> float:
        row = _table("muloco_critical_batch_exponents").only("series", target.series)
        return float(row.numbers("exponent")[0])


_SOURCES = {
    "launcher": "code",
    "checkpoint": "name of a checkpoint in the code",
    "comment": "code, from a comment on rescaling, less certain",
}
_BATCH, _LR = "training.global_batch_size", "inner.lr"


def _table(name: str) -> Table:
    return read_table(DIRECTORY / f"{name}.csv")


def _runs(name: str) -> list[dict[str, str]]:
    """Return the rows of a table that are single runs."""
    return [row for row in rows_of(_table(name)) if row.get("source") != "range"]


def _range_ends() -> list[dict[str, str]]:
    """Return the ends of the stated range of the inner lr, the smallest size first."""
    ends = [row for row in rows_of(_table("muloco_tuned")) if row["source"] == "range"]
    return sorted(ends, key=lambda row: float(row["params"]))


def _same_run(rows: Sequence[dict[str, str]], target: Target) -> Mapping[str, Any] | None:
    """Return the row of this size, budget, method and K."""
    for row in rows:
        same_size = abs(math.log(float(row["params"]) / target.params)) < SAME
        same_budget = abs(math.log(float(row["tokens"]) / target.tokens)) < SAME
        if row["series"] == target.series and same_size and same_budget:
            return row
    return None


def _published_series(target: Target) -> str:
    """Return the series of a method whose K is nearest among those of the figures."""
    if not target.has_outer_step:
        return target.method
    nearest = min((1, 2, 4, 8, 16), key=lambda k: abs(math.log2(k / target.replicas)))
    return f"{target.method}_k{nearest}"


def extrapolated(ratio: float) -> str:
    """Return in words how far a target is beyond the largest point."""
    return f"extrapolated by {ratio:.3g}x" if ratio > 1.005 else "inside the points"


def _printed_lr_power() -> float:
    laws = _table("diloco_laws").only("quantity", "inner_lr").only("fit", "joint")
    return float(laws.numbers("alpha")[0])


# ---- outer optimizer ----------------------------------------------------------------------------

_LARGE = 3e8  # from 335M on, the DiLoCo paper's best outer lr does not depend on the size


def _outer_points(method: str, column: str) -> list[tuple[int, float, str]]:
    """Return K, value and source of an outer setting, by K."""
    table = _table("muloco_outer").only("method", method)
    points = [
        (
            int(row["replicas"]),
            float(row[column]),
            "paper: code" if int(row["replicas"]) > 1 else "paper: summary",
        )
        for row in rows_of(table)
        if row[column]
    ]
    if method == "diloco":
        points += _diloco_points(column)
    return sorted(points)


def _diloco_points(column: str) -> list[tuple[int, float, str]]:
    """Return what the DiLoCo paper adds: K = 2 and 4, and lr at K = 1 from an equal gain."""
    rows = [row for row in rows_of(_table("diloco_outer_lr")) if float(row["params"]) > _LARGE]
    source = "paper: arXiv 2503.09799, Figure 7, from 335M on"
    best = {
        m: float(np.median([float(r["outer_lr"]) for r in rows if r["replicas"] == str(m)]))
        for m in (1, 2, 4)
    }
    if column == "outer_momentum":
        return [(m, 0.9, "paper: arXiv 2503.09799, fixed in that study") for m in (2, 4)]
    (momentum,) = (p[1] for p in _outer_points("diloco", "outer_momentum") if p[0] == 1)
    gain = f"rule: same gain lr / (1 - momentum) as {best[1]:g} at 0.9 of arXiv 2503.09799"
    equal = (1, round(best[1] / 0.1 * (1 - momentum), 3), gain)
    return [equal, *((m, best[m], source) for m in (2, 4))]


def _by_replicas(key: str, points: Sequence[tuple[int, float, str]], replicas: int) -> Value:
    """Return an outer setting at K: as published, between two K, or that of the largest K."""
    for k, value, source in points:
        if k == replicas:
            return Value(key, value, f"{source}; K = {k}")
    last, value, _ = points[-1]
    if replicas > last:
        label = f"fitted: {value:g} of K = {last}, the largest published; interval unknown"
        return Value(key, value, label)
    for (k, low, _), (above, high, _) in pairwise(points):
        if k < replicas < above:
            share = math.log(replicas / k) / math.log(above / k)
            between = low + share * (high - low)
            label = (
                f"fitted: {between:.3g} (interval unknown), linear in log2 K between {low:g} at "
                f"K = {k} and {high:g} at K = {above}, 2 points; to one decimal"
            )
            return Value(key, round(between, 1), label)
    raise ConfigError(f"{key}: no published value at or below K = {replicas}.")
