#!/usr/bin/env python
"""Squared error of each rule for the bins of kind statistical, on pseudogradients of real runs.

Trains the model of `tools/bench/quality/small.yaml` with MuLoCo and with DiLoCo, both replicas in
this process, and encodes the pseudogradient of every tensor before it is sent.

    python -m tools.demo_corpus
    python tools/bench/quantization_error.py [--write docs/performance/quantization_error.md]

A tensor is one coding unit. Exchange is uncompressed, so the runs do not depend on the rules.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch
from provenance import commit
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.compress.format import Bins, CodingUnit, Grouping
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.errors import run_tool
from megatron_muloco.runtime.distributed import silence_known_warnings

CONFIG = Path(__file__).with_name("quality") / "small.yaml"
# The keys and learning rates of `quality/grid.py`, without the imports of its package.
METHODS = {"MuLoCo": (), "DiLoCo": ("inner.kind=adamw", "inner.lr=0.08")}
RULES: tuple[Bins, ...] = ("edged", "centred", "least_error")
BITS = (1, 2, 4)
SUMMARY_BITS = (*BITS, 8)
ROUNDS = (1, 2, 4, 8)  # chosen: the first, and as many of each later phase
ALONE = ("training.eval_interval=0", "monitor.log_interval=60")


@dataclass(frozen=True)
class Capture:
    """One pseudogradient of one tensor.

    Attributes:
        name: Name of the tensor.
        values: fp32, flat.
    """

    name: str
    values: Tensor


def pseudogradients(config: RunConfig, rounds: Sequence[int]) -> list[Capture]:
    """Train the replicas of a run; return all pseudogradients of some rounds, counted from 1."""
    from megatron_muloco.training.build import build_context, load_data
    from megatron_muloco.training.loop import inner_step, outer_step
    from megatron_muloco.training.one_process import run_replicas
    from megatron_muloco.training.stopping import StopRequest

    outer: Any = config.outer
    interval, captures = int(outer.sync_interval), []
    data: Any = None

    def body(groups: Groups) -> None:
        nonlocal data
        if data is None:
            data = load_data(config, groups.topology)
        context, stop = build_context(config, groups, data, writes=False), StopRequest()
        for step in range(1, interval * max(rounds) + 1):
            inner_step(context, step, stop, None)
            if step % interval == 0 and step // interval in rounds:
                masters = context.optimizer.view.masters
                for name, anchor in context.state.anchors().items():
                    captures.append(Capture(name, (anchor - masters[name]).flatten()))
            outer_step(context, step)

    run_replicas(config, body)
    return captures


def squared_error(values: Tensor, bits: int, rule: Bins) -> float:
    """Return the sum of squared errors of one coding unit."""
    codec, unit = Statistical(bits, Grouping(), rule), CodingUnit(values.numel())
    decoded = torch.empty_like(values)
    codec.decode(codec.encode(values, unit), unit, decoded)
    return float((decoded.double() - values.double()).square().sum())


class Errors:
    """Squared errors of all pseudogradients of a run, by tensor, bits and rule."""

    def __init__(self, captures: Sequence[Capture]) -> None:
        self.names = list(dict.fromkeys(capture.name for capture in captures))
        self._energy = dict.fromkeys(self.names, 0.0)
        self._errors: dict[tuple[str, int, Bins], list[float]] = {}
        for capture in captures:
            self._energy[capture.name] += float(capture.values.double().square().sum())
            for bits in SUMMARY_BITS:
                for rule in RULES:
                    found = self._errors.setdefault((capture.name, bits, rule), [])
                    found.append(squared_error(capture.values, bits, rule))

    def relative(self, name: str, bits: int, rule: Bins) -> float:
        """Return a tensor's squared error over its squares, both summed over its captures."""
        return sum(self._errors[name, bits, rule]) / self._energy[name]

    def overall(self, bits: int, rule: Bins) -> float:
        """Return the same over all tensors."""
        found = sum(sum(self._errors[name, bits, rule]) for name in self.names)
        return found / sum(self._energy.values())

    def worst(self, bits: int) -> float:
        """Return the largest ratio of least_error to the better rule, over single captures."""
        ratios = [
            1.0 if ours == better == 0 else ours / better for ours, better in self._pairs(bits)
        ]
        return max(ratios)

    def wins(self, bits: int, rule: Bins) -> int:
        """Return in how many captures a rule has a smaller error than the other one."""
        other: Bins = "centred" if rule == "edged" else "edged"
        return sum(
            ours < theirs
            for name in self.names
            for ours, theirs in zip(
                self._errors[name, bits, rule], self._errors[name, bits, other], strict=True
            )
        )

    @property
    def count(self) -> int:
        """Number of captures."""
        return sum(len(self._errors[name, BITS[0], RULES[0]]) for name in self.names)

    def _pairs(self, bits: int) -> list[tuple[float, float]]:
        found = []
        for name in self.names:
            edged, centred, least = (self._errors[name, bits, rule] for rule in RULES)
            found += [(c, min(a, b)) for a, b, c in zip(edged, centred, least, strict=True)]
        return found


def table(method: str, errors: Errors) -> list[str]:
    """Return the section of one method: over all tensors, then of each."""
    lines = [
        f"## {method}",
        "",
        f"Over all tensors; {errors.count} captures.",
        "",
        f"| bits | {' | '.join(RULES)} | edged is better in | centred is better in | largest error "
        "of least_error, of the better rule's |",
        "|---" * (len(RULES) + 4) + "|",
    ]
    for bits in SUMMARY_BITS:
        cells = [f"{errors.overall(bits, rule):.5f}" for rule in RULES]
        wins = [str(errors.wins(bits, rule)) for rule in ("edged", "centred")]
        lines.append(f"| {' | '.join([str(bits), *cells, *wins])} | {errors.worst(bits):.4f} |")
    heads = [f"{bits} bit{'s' * (bits > 1)}, {rule}" for bits in BITS for rule in RULES]
    lines += ["", f"| tensor | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in errors.names:
        cells = [f"{errors.relative(name, bits, rule):.4f}" for bits in BITS for rule in RULES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def page(by_method: dict[str, Errors]) -> str:
    """Return the result page."""
    rounds = ", ".join(map(str, ROUNDS))
    lines = [
        "# Quantization error of bins",
        "",
        "`python tools/bench/quantization_error.py`: squared error of `outer.compression.kind:",
        "statistical` over the sum of squares, by the rule for its bins (`bins`), on",
        "pseudogradients of both replicas of a MuLoCo and a DiLoCo run. Both train the model of",
        f"`tools/bench/quality/small.yaml`; the pseudogradients are those of rounds {rounds}.",
        "A capture is one tensor of one replica in one round, encoded as one coding unit. Numbers",
        "of a tensor are sums over its captures. `centred` is the rule of the public code,",
        "`least_error` the default, which with 8 bits is `edged`",
        "([decision](../decisions/0017-bins-of-least-error.md)).",
        "",
    ]
    for method, errors in by_method.items():
        lines += table(method, errors)
    lines.append(
        f"{platform.machine()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}, commit "
        f"{commit()}."
    )
    return "\n".join(lines)


def measure(write: Path | None) -> None:
    """Train, measure, print, and write the page if asked."""
    assert set(RULES) == set(get_args(Bins))
    silence_known_warnings()
    by_method = {
        method: Errors(pseudogradients(load_config(CONFIG, (*keys, *ALONE)), ROUNDS))
        for method, keys in METHODS.items()
    }
    text = page(by_method)
    print(text)
    if write:
        write.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    return run_tool(lambda: measure(options.write))


if __name__ == "__main__":
    sys.exit(main())
