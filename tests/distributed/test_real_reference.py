"""Relation 3 on the real stack: model, inner optimizer, groups, reducers against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.config import RunConfig
from tests.support.recorded import assert_is_the_reference, recorded, reference_of
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, tiny_config

INNER = {"muon": MUON, "adamw": ADAMW}


def outer(**keys: Any) -> dict[str, Any]:
    return {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 4, **keys}


def config_of(replicas: int, inner: str, **sections: Any) -> RunConfig:
    training = {"global_batch_size": 4 * replicas, "train_iters": 10}
    return tiny_config(
        inner=INNER[inner],
        parallel={"num_replicas": replicas, **sections.pop("parallel", {})},
        training=training | sections.pop("training", {}),
        monitor={"debug_digests": True},
        **sections,
    )


FRAGMENTS = {"fragments": {"count": 2}}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # world, replicas, sections
    "k2-muon": (2, 2, {"inner": "muon", "outer": outer()}),
    "k2-adamw-bf16": (
        2,
        2,
        {"inner": "adamw", "outer": outer(), "training": {"precision": "bf16"}},
    ),
    "k2-dp2-fragments": (4, 2, {"inner": "muon", "outer": outer(**FRAGMENTS)}),
    "k2-mixing": (2, 2, {"inner": "adamw", "outer": outer(mixing_weight=0.25)}),
    "k2-overlap-mix": (2, 2, {"inner": "adamw", "outer": outer(**FRAGMENTS, overlap_steps=1)}),
    "k2-overlap-additive": (
        2,
        2,
        {"inner": "muon", "outer": outer(overlap_steps=3, apply="additive")},
    ),
    "k2-tp2-streaming-in-flight": (
        4,
        2,
        {
            "inner": "muon",
            "parallel": {"tensor_model_parallel_size": 2},
            "outer": outer(
                fragments={"count": 2, "pattern": "strided"},
                overlap_steps=3,
                max_in_flight=2,
                apply="additive",
            ),
        },
    ),
    "k2-pp2-overlap": (
        4,
        2,
        {
            "inner": "adamw",
            "parallel": {"pipeline_model_parallel_size": 2},
            "model": {"untie_embeddings_and_output_weights": False},
            "outer": outer(**FRAGMENTS, overlap_steps=1, state_device="cpu"),
        },
    ),
    # Rounds that end after 3, 8 and 12 steps, the last one beyond the run.
    "k2-schedules": (
        2,
        2,
        {
            "inner": "muon",
            "model": {"num_layers": 3},
            "outer": outer(
                fragments={"count": 3},
                overlap_steps=1,
                max_in_flight=2,
                sync_interval={"kind": "steps", "values": [[1, 3], [2, 5], [3, 4]]},
                lr={"kind": "cosine", "start": 0.9, "end": 0.5, "rounds": 3},
                momentum={"kind": "linear", "start": 0.3, "end": 0.8, "rounds": 3},
            ),
        },
    ),
}


def coded(kind: str, **keys: Any) -> dict[str, Any]:
    return {"kind": kind, **keys}


IN_FLIGHT = {"overlap_steps": 3, "max_in_flight": 3}
NO_FLUSH = {"train_iters": 8}  # four terms are averaged pairwise in the flush, not from the left
CODED_CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # world, replicas, sections
    "k2-linear4": (2, 2, {"outer": outer(compression=coded("linear", bits=4))}),
    "k2-tp2-statistical2-row-overlap": (
        4,
        2,
        {
            "inner": "muon",
            "parallel": {"tensor_model_parallel_size": 2},
            "outer": outer(
                **FRAGMENTS,
                overlap_steps=1,
                compression=coded("statistical", bits=2, granularity="row"),
            ),
        },
    ),
    "k3-dp2-e3m0-block-additive": (
        6,
        3,
        {
            "outer": outer(
                **IN_FLIGHT,
                **FRAGMENTS,
                apply="additive",
                compression=coded("e3m0", granularity="block", block_size=32),
            ),
        },
    ),
    "k2-pp2-tied-topk-exceptions": (
        4,
        2,
        {
            "parallel": {"pipeline_model_parallel_size": 2},
            "model": {"untie_embeddings_and_output_weights": False},
            "outer": outer(
                **FRAGMENTS,
                overlap_steps=1,
                transport="host",
                compression=coded(
                    "topk", density=0.1, block_size=64, value_bits=4, exceptions={"norm": "none"}
                ),
            ),
        },
    ),
    "k4-tp2-linear1-exceptions-decay": (
        8,
        4,
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "training": NO_FLUSH,
            "outer": outer(
                compression=coded(
                    "linear",
                    bits=1,
                    error_decay=0.5,
                    granularity="block",
                    exceptions={"embedding": 8, "output": "none", "norm": 4},
                ),
            ),
        },
    ),
    "k3-host-deterministic": (
        3,
        3,
        {"outer": outer(transport="host", compression={"kind": "none", "deterministic": True})},
    ),
    "k3-deterministic-in-flight": (
        3,
        3,
        {
            "outer": outer(
                **FRAGMENTS,
                overlap_steps=3,
                max_in_flight=2,
                compression={"kind": "none", "deterministic": True},
            )
        },
    ),
    "k4-pp2-statistical4-without-feedback": (
        8,
        4,
        {
            "parallel": {"pipeline_model_parallel_size": 2},
            "training": NO_FLUSH,
            "outer": outer(
                transport="host",
                compression=coded("statistical", bits=4, error_feedback=False),
            ),
        },
    ),
}


@pytest.mark.parametrize("case", CODED_CASES)
def test_a_real_run_with_a_code_is_the_reference(case: str) -> None:
    """Bit for bit, residuals too: the order of every sum is ours, on any number of replicas."""
    world, replicas, sections = CODED_CASES[case]
    config = config_of(replicas, sections.pop("inner", "adamw"), **sections)
    assert_is_the_reference(config, run_ranks(recorded, world, config))


@pytest.mark.parametrize("case", CASES)
def test_a_real_run_is_the_reference(case: str) -> None:
    """Bit for bit: two terms have one sum, and half of it is exact."""
    world, replicas, sections = CASES[case]
    config = config_of(replicas, **sections)
    assert_is_the_reference(config, run_ranks(recorded, world, config))


def test_three_real_replicas_are_the_reference() -> None:
    """Bit for bit where the order of the sum is ours: from the left, as in the reference."""
    keys = {**FRAGMENTS, "overlap_steps": 1, "compression": {"deterministic": True}}
    config = config_of(3, "muon", outer=outer(**keys))
    assert_is_the_reference(config, run_ranks(recorded, 3, config))


def test_the_librarys_order_of_three_is_within_its_roundings() -> None:
    config = config_of(3, "adamw", outer=outer(), training={"train_iters": 4})
    ranks = run_ranks(recorded, 3, config)
    reference = reference_of(config, ranks)
    for t in range(1, 5):
        reference.step(t)
    lr, mu = config.outer.lr, config.outer.momentum
    for name, anchor in reference.anchor.items():
        deltas = torch.stack([r["moves"][0][0][name] - r["moves"][3][1][name] for r in ranks])
        # Sums of three in two orders: two roundings each, of at most half an ulp of 3 max|delta|;
        # over three, and through lr * (1 + mu). The subtraction from the anchor may then round the
        # other way: one ulp.
        limit = lr * (1 + mu) * 4 * 2.0**-24 * _largest(deltas) + 2.0**-23 * anchor.abs()
        for rank in ranks:
            assert_equal(rank["anchors"][3][name], ranks[0]["anchors"][3][name])
            assert torch.all((rank["anchors"][3][name] - anchor).abs() <= limit), name


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax(dim=0)
