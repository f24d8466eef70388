"""What a finished study says about the settings of a run, each with a label.

A study is a table with one run a row: the columns `method`, `replicas`, `params_total`, `tokens`,
`batch_tokens`, `seq_length`, `status`, `loss`, and one column for each config key that it varies.
`Study` answers like `Published`, from the runs of the target's method and of its K, or of the
nearest K that the study has:

- *batch, inner lr*: the optimum of each size (a parabola in log2, as in `optima`). At the target's
  own size and budget the best run's value is taken. Otherwise a power law through at least three
  interior optima, with its interval; with two, their trend; with one, its value. Without a law the
  interval is unknown.
- *outer lr, momentum, H, weight decay*: those of the best run at the largest size.

What the study does not vary comes from the published tables.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.fitting import fit
from megatron_muloco.scaling.intervals import prediction_interval
from megatron_muloco.scaling.observations import Observations
from megatron_muloco.scaling.optima import Cell, Optimum, law_variables
from megatron_muloco.scaling.table import Table
from tools.scaling.evidence import SAME, Evidence, extrapolated, millions, rows_of
from tools.scaling.labelled import Prediction, Target, Value, lr_step, power_of_two

__all__ = ["Study"]

_NEEDED = (
    "status",
    "method",
    "replicas",
    "params_total",
    "tokens",
    "batch_tokens",
    "seq_length",
    "loss",
)
_REFERENCE_BATCH = 512  # sequences per replica at which the weight decay of a config is stated


@dataclass(frozen=True)
class Study:
    """The runs of a study, and where the settings come from that it does not vary.

    Attributes:
        table: The runs; those whose status is not ``ok`` take no part.
        otherwise: Evidence for the rest.

    Raises:
        ConfigError: A column is missing, or no run ended well.
    """

    table: Table
    otherwise: Evidence

    def batch(self, target: Target) -> Value:
        """Return the global batch in sequences, a power of two."""
        found = self._optimum(target, "batch_tokens", millions)
        if found is None:
            return self.otherwise.batch(target)
        label, tokens = found
        sequences = power_of_two(tokens / target.seq_length)
        snapped = f"{label}; snapped to {millions(sequences * target.seq_length)} tokens"
        return Value("training.global_batch_size", sequences, f"{snapped}, a power of 2")

    def inner_lr(self, target: Target) -> Value:
        """Return the inner lr; a law's value is snapped to a power of sqrt(2)."""
        found = self._optimum(target, "inner.lr", "{:.4g}".format)
        if found is None:
            return self.otherwise.inner_lr(target)
        label, value = found
        if label.startswith("measured"):
            return Value("inner.lr", value, label)
        return Value("inner.lr", lr_step(value), f"{label}; snapped to a power of sqrt(2)")

    def weight_decay(self, target: Target) -> Value:
        """Return the weight decay at 512 sequences per replica, from the best run's rule."""
        best = self._best(target)
        given = best.get("inner.weight_decay", "")
        if not given or not self._varies(target, "inner.weight_decay"):
            return self.otherwise.weight_decay(target)
        sequences = float(best["batch_tokens"]) / float(best["seq_length"])
        replica = sequences / float(best["replicas"])
        base = float(given) * _REFERENCE_BATCH / replica
        label = (
            f"{_where(best, target)}: {given} at {replica:g} sequences per replica, in proportion "
            f"to them"
        )
        return Value("inner.weight_decay_base", float(f"{base:.4g}"), label)

    def outer(self, target: Target) -> list[Value]:
        """Return outer lr, momentum and H of the best run at the largest size."""
        best = self._best(target) if target.has_outer_step else {}
        found = []
        for value in self.otherwise.outer(target):
            if best.get(value.key) and self._varies(target, value.key):
                number = float(best[value.key])
                exact = int(number) if isinstance(value.value, int) else number
                found.append(Value(value.key, exact, _where(best, target)))
            else:
                found.append(value)
        return found

    # ---- runs -----------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        missing = [name for name in _NEEDED if name not in self.table.columns]
        if missing:
            raise ConfigError(
                f"{self.table.path} has no column {', '.join(missing)}; a study has one run a row "
                f"with {', '.join(_NEEDED)} and one column for each config key that it varies."
            )
        if "ok" not in self.table.columns["status"]:
            raise ConfigError(f"{self.table.path}: no run has status ok; there is nothing to use.")

    @cached_property
    def runs(self) -> list[dict[str, str]]:
        """Runs that ended well."""
        return [run for run in rows_of(self.table) if run["status"] == "ok"]

    def chosen(self, target: Target) -> list[dict[str, str]]:
        """Return the runs of the target's method at its K, or at the nearest K of the study."""
        runs = [run for run in self.runs if run["method"] == target.method]
        if not runs:
            methods = ", ".join(sorted({run["method"] for run in self.runs}))
            raise ConfigError(
                f"{self.table.path} has no finished run of {target.method}; it has {methods}."
            )
        nearest = min(
            {float(run["replicas"]) for run in runs},
            key=lambda k: (abs(math.log2(k / target.replicas)), k),
        )
        return [run for run in runs if float(run["replicas"]) == nearest]

    def _varies(self, target: Target, key: str) -> bool:
        return len({run[key] for run in self.chosen(target)} - {""}) > 1

    def _best(self, target: Target) -> dict[str, str]:
        """Return the best run at the largest size."""
        runs = self.chosen(target)
        largest = max(float(run["params_total"]) for run in runs)
        here = [run for run in runs if float(run["params_total"]) == largest]
        return min(here, key=lambda run: float(run["loss"]))

    def _cells(self, target: Target, key: str) -> list[Cell]:
        """Return the runs by size and budget, smallest first; seeds are one run with their mean.

        Whole steps and rounds move the tokens of a run by some percent, so budgets within `SAME`
        are one.
        """
        groups: dict[tuple[float, float], list[dict[str, str]]] = {}
        for run in sorted(self.chosen(target), key=_budget):
            params, tokens = _budget(run)
            known = (key for key in groups if key[0] == params and tokens < key[1] * (1 + SAME))
            groups.setdefault(next(known, (params, tokens)), []).append(run)
        cells = []
        for (params, tokens), group in groups.items():
            losses: dict[tuple[tuple[str, str], ...], list[float]] = {}
            for run in group:
                if run.get(key):
                    losses.setdefault(_settings(run), []).append(float(run["loss"]))
            if losses:
                values = np.array([float(dict(setting)[key]) for setting in losses])
                means = np.array([np.mean(seeds) for seeds in losses.values()])
                points = Observations({key: values}, means, "loss")
                cells.append(Cell({"params": params, "tokens": tokens}, points))
        return cells

    # ---- optima ---------------------------------------------------------------------------------

    def _optimum(
        self, target: Target, key: str, show: Callable[[float], str]
    ) -> tuple[str, float] | None:
        """Return the label and value of a setting that the study varies; None where it does not."""
        if key not in self.table.columns or not self._varies(target, key):
            return None
        optima = [(cell, cell.optimum(key)) for cell in self._cells(target, key)]
        for cell, optimum in optima:
            if _same(cell, target):
                return _measured(cell, optimum, show), optimum.best
        return _law(optima, target, show)


def _law(
    optima: Sequence[tuple[Cell, Optimum]], target: Target, show: Callable[[float], str]
) -> tuple[str, float]:
    """Return the label and value of the optima continued to a target."""
    interior = [(cell, optimum) for cell, optimum in optima if not optimum.edge]
    used = interior or list(optima)
    edges = "" if interior else f"; all at the end of a grid, as {used[-1][1].edge}"
    cells = [cell for cell, _ in used]
    names, _ = law_variables(cells)
    values = np.array([optimum.value for _, optimum in used])
    at = {name: {"params": target.params, "tokens": target.tokens}[name] for name in names}
    words = f"{len(used)} optima of the study"
    if len(used) < 2 or not names:
        law = f"{words}, at {_name(cells[-1])}"
        return f"fitted: {Prediction(values[-1], law, show=show).words}{edges}", values[-1]
    columns = {name: np.array([cell.keys[name] for cell in cells]) for name in names}
    ratio = at[names[0]] / columns[names[0]].max()
    if len(used) < len(names) + 2:
        sizes = columns[names[0]]
        power = math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])
        value = values[-1] * (at[names[0]] / sizes[-1]) ** power
        law = f"trend {names[0]}^{power:.3f} of {words}, {extrapolated(ratio)}"
        return f"fitted: {Prediction(value, law, show=show).words}{edges}", value
    found = fit("power", Observations(columns, values, "optimum"))
    value = float(found.predict({name: [x] for name, x in at.items()})[0])
    law = f"{found.form.formula}, {words}, {extrapolated(ratio)}"
    prediction = Prediction(value, law, *prediction_interval(found, at), show=show)
    return f"fitted: {prediction.words}{edges}", value


def _measured(cell: Cell, optimum: Optimum, show: Callable[[float], str]) -> str:
    count = len(np.unique(cell.runs.values))
    edge = f"; {optimum.edge}" if optimum.edge else ""
    return (
        f"measured: {show(optimum.best)} is the best of {count} settings at {_name(cell)}, loss "
        f"{cell.best_loss:.4f}{edge}"
    )


def _where(run: dict[str, str], target: Target) -> str:
    """Return the label of a setting of the best run at the largest size."""
    place = (
        f"best run of K = {float(run['replicas']):g} at {float(run['params_total']):.4g} "
        f"parameters, loss {float(run['loss']):.4f}"
    )
    same = abs(math.log(float(run["params_total"]) / target.params)) < SAME
    if same and float(run["replicas"]) == target.replicas:
        return f"measured: {place}"
    return f"fitted: as the {place}, the largest size; interval unknown"


def _name(cell: Cell) -> str:
    return f"{cell.keys['params']:.4g} parameters and {cell.keys['tokens']:.4g} tokens"


def _same(cell: Cell, target: Target) -> bool:
    pairs = ((cell.keys["params"], target.params), (cell.keys["tokens"], target.tokens))
    return all(abs(math.log(there / here)) < SAME for there, here in pairs)


def _budget(run: dict[str, str]) -> tuple[float, float]:
    return float(run["params_total"]), float(run["tokens"])


def _settings(run: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Return what a run was configured with, without its seed."""
    keys = [key for key in run if "." in key and not key.endswith("seed")]
    return tuple((key, run[key]) for key in ("batch_tokens", *sorted(keys)))
