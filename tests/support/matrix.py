"""Test matrix: every method, number of replicas, layout and precision; and a pairwise cover of it.

A case trains a tiny model for two rounds. In every layout, its losses must be those of the same
method on the same samples with one rank a replica, and all copies of a parameter must end with the
same bits.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product
from typing import Any

from megatron_muloco.config import RunConfig
from tests.support.spawn import run_ranks
from tests.support.tiny_models import ADAMW, MUON, NESTEROV, finish_tiny, start_tiny, tiny_config

__all__ = ["Case", "Outcome", "check", "matrix", "pairwise_cover", "run_case"]

STEPS = 4  # two rounds of two steps: the second trains on the result of the first outer step
LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1))  # tp, pp, dp
# Beside the product: context parallelism, and two stages of two and one layers, with K = 2.
MORE_LAYOUTS: tuple[dict[str, Any], ...] = ({"context": 2}, {"pipeline": 2, "layers": 3})
WIDTHS = (1, 2, 4)
PRECISIONS = ("fp32", "bf16")
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # inner and outer section
    "muloco": (MUON, NESTEROV),
    "diloco": (ADAMW, NESTEROV),
    "muon": (MUON, {"kind": "none"}),
    "adamw": (ADAMW, {"kind": "none"}),
}
# fp32: sums of at most 60 * 16 * 8 terms in another order; each rounding is at most 2^-24 relative
# and grows like the square root of the number of terms, 88; four steps amplify a difference of
# parameters by less than 2 a step.
# bf16: a rounding is 2^-9; tensor and pipeline parallelism round partial sums and activations at
# other places, about once in each of the eight sub-layers' branches and once at the logits.
TOLERANCE = {"fp32": 16 * 88 * 2.0**-24, "bf16": 9 * 2.0**-9}


@dataclass(frozen=True, order=True)
class Case:
    """One run of the matrix. A baseline has one replica."""

    method: str
    num_replicas: int
    tensor: int
    pipeline: int
    data: int
    precision: str
    context: int = 1
    layers: int = 2

    @property
    def world_size(self) -> int:
        return self.num_replicas * self.tensor * self.pipeline * self.data * self.context

    @property
    def stages(self) -> str:
        """Pipeline stages; their layers where these are not equal."""
        last = self.layers // self.pipeline
        return f"{self.layers - last}+{last}" if self.is_uneven else str(self.pipeline)

    @property
    def is_uneven(self) -> bool:
        return self.layers % self.pipeline > 0

    @property
    def is_baseline(self) -> bool:
        return self.method in ("muon", "adamw")

    @property
    def name(self) -> str:
        sizes = f"tp{self.tensor}-pp{self.stages}-dp{self.data}"
        sizes += f"-cp{self.context}" if self.context > 1 else ""
        return f"{self.method}-k{self.num_replicas}-{sizes}-{self.precision}"

    @property
    def factors(self) -> frozenset[tuple[str, Any]]:
        """Factors that a pairwise cover combines. A baseline's width is its data parallelism."""
        width, data = (self.data, 1) if self.is_baseline else (self.num_replicas, self.data)
        layout = (self.tensor, self.stages, data, self.context)
        values = {"width": width, "layout": layout, "precision": self.precision}
        return frozenset({"method": self.method, **values}.items())

    @property
    def reference(self) -> "Case":
        """The case with the same method and samples, and one rank a replica."""
        return replace(self, tensor=1, pipeline=1, data=1, context=1)

    @property
    def config(self) -> RunConfig:
        inner, outer = METHODS[self.method]
        uneven = {"num_layers_in_last_pipeline_stage": self.layers // self.pipeline}
        return tiny_config(
            inner=inner,
            outer=outer,
            parallel={
                "num_replicas": self.num_replicas,
                "tensor_model_parallel_size": self.tensor,
                "pipeline_model_parallel_size": self.pipeline,
                "context_parallel_size": self.context,
                **(uneven if self.is_uneven else {}),
            },
            model={"num_layers": self.layers},
            training={"precision": self.precision},
        )


@dataclass(frozen=True)
class Outcome:
    """Report of a rank: its coordinates, its replica's losses, a digest of each parameter."""

    coords: tuple[int, ...]
    losses: list[float]
    digests: dict[str, str]


def matrix() -> list[Case]:
    """Return all cases."""
    replicas = [
        Case(method, width, *layout, precision)
        for method, width, layout, precision in product(
            ("muloco", "diloco"), WIDTHS, LAYOUTS, PRECISIONS
        )
    ]
    baselines = [
        Case(method, 1, tensor, pipeline, width, precision)
        for method, width, (tensor, pipeline, data), precision in product(
            ("muon", "adamw"), WIDTHS, LAYOUTS, PRECISIONS
        )
        if data == 1  # the width is data parallelism already
    ]
    more = [
        replace(Case(method, 2, 1, 1, 1, precision), **sizes)
        for method, sizes, precision in product(("muloco", "diloco"), MORE_LAYOUTS, PRECISIONS)
    ]
    return replicas + baselines + more


def pairwise_cover(max_world: int) -> list[Case]:
    """Return a few cases that contain every pair of factors of all cases of at most that size.

    The choice is greedy: the case with the most missing pairs comes next; among equal ones the
    smallest world, then fp32, whose tolerance is tighter.
    """
    cases = sorted((c for c in matrix() if c.world_size <= max_world), key=_by_size)
    pairs = {case: set(combinations(sorted(case.factors, key=str), 2)) for case in cases}
    missing = set().union(*pairs.values())
    cover = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        cover.append(best)
    return cover


def _by_size(case: Case) -> tuple[int, bool, Case]:
    return case.world_size, case.precision != "fp32", case


def run_case(case: Case) -> list[Outcome]:
    """Train the case; return every rank's outcome."""
    return run_ranks(_train, case.world_size, case, timeout_s=240.0)


def _train(case: Case) -> Outcome:
    run = start_tiny(case.config).train(STEPS)
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(-1).float().numpy().tobytes()).hexdigest()
        for name, tensor in run.whole_parameters().items()
    }
    finish_tiny()
    return Outcome(tuple(run.groups.coords), run.losses, digests)


@cache
def reference_losses(case: Case) -> dict[int, list[float]]:
    """Return the losses of each replica of a (1, 1, 1) run, trained once a session."""
    return {outcome.coords[0]: outcome.losses for outcome in run_case(case)}


def check(case: Case, outcomes: list[Outcome]) -> float:
    """Check a case's outcomes and return the largest relative difference of losses.

    Raises:
        AssertionError: A loss or a copy of a parameter is not what it has to be.
    """
    references = (
        {outcome.coords[0]: outcome.losses for outcome in outcomes}
        if case == case.reference
        else reference_losses(case.reference)
    )
    worst = 0.0
    copies: dict[tuple[int, int, str], str] = {}
    for outcome in outcomes:
        replica, stage, _, _, tensor_rank = outcome.coords
        for step, (loss, expected) in enumerate(
            zip(outcome.losses, references[replica], strict=True), start=1
        ):
            assert math.isfinite(loss), f"{case.name}: loss {loss} at step {step}"
            worst = max(worst, abs(loss - expected) / abs(expected))
            assert worst <= TOLERANCE[case.precision], (
                f"{case.name}: replica {replica} has loss {loss!r} at step {step}, one rank a "
                f"replica had {expected!r}"
            )
        # The last step ends a round: data-parallel ranks and replicas hold the same weights.
        for name, digest in outcome.digests.items():
            same = copies.setdefault((stage, tensor_rank, name), digest)
            assert digest == same, f"{case.name}: copies of {name} differ, at {outcome.coords}"
    return worst
