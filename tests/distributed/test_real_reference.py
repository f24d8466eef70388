"""Relation 3 on the real stack: model, inner optimizer, groups and reducers against the reference.

The reference does not train. Its inner steps replay what the inner optimizer of each replica did to
the masters, after checking that it started from the same bits: so every outer step, every merge and
the flush in between have to agree bit for bit. Each position of the replicas is one reference.
"""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_muloco.comm.reducers import mean_reducer
from megatron_muloco.config import RunConfig
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, finish_tiny, start_tiny, tiny_config

INNER = {"muon": MUON, "adamw": ADAMW}
Moves = list[tuple[Parameters, Parameters]]


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


def recorded(config: RunConfig, *, deterministic: bool = False) -> dict[str, Any]:
    """Train to the end and flush; return what the inner optimizer did and where it all ended."""
    reducer = partial(mean_reducer, deterministic=deterministic)
    with mock.patch("megatron_muloco.training.outer_wiring.mean_reducer", reducer):
        run = start_tiny(config)
    owned = [s.name for s in run.optimizer.view.shards if not s.param.duplicate]
    masters, moves, anchors = run.optimizer.view.masters, [], []
    synchronizer = run.optimizer.synchronizer
    assert synchronizer is not None

    def snapshot(tensors: Any) -> Parameters:
        return {name: tensors[name].clone() for name in owned}

    inner_step = run.optimizer.inner_step

    def record() -> Any:
        before = snapshot(masters)
        report = inner_step()
        moves.append((before, snapshot(masters)))
        return report

    run.optimizer.inner_step = record  # type: ignore[method-assign]
    for _ in range(config.training.train_iters or 0):
        run.train(1)
        anchors.append(snapshot(synchronizer.anchors()))
    run.optimizer.flush()
    anchors.append(snapshot(synchronizer.anchors()))
    end = snapshot(masters)
    finish_tiny()
    return {"moves": moves, "anchors": anchors, "end": end}


def replay(moves: Moves) -> Any:
    """Return an inner step that does what was recorded, from where it was recorded."""

    def step(local: Parameters, t: int) -> None:
        before, after = moves[t - 1]
        for name, tensor in local.items():
            assert_equal(tensor, before[name], f"{name} before inner step {t}")
            tensor.copy_(after[name])

    return step


def reference_of(config: RunConfig, members: list[dict[str, Any]]) -> Reference:
    """Return the reference of one position, over the ranks that hold it."""
    o = config.outer
    initial = members[0]["moves"][0][0]
    plan = FragmentPlan.by_layer(
        initial,
        num_layers=config.model.num_layers,
        count=o.fragments.count,
        pattern=o.fragments.pattern,
    )
    settings = Settings(
        sync_interval=o.sync_interval,
        train_iters=config.training.train_iters or 0,
        fragments=plan.fragments,
        overlap_steps=o.overlap_steps,
        mixing_weight=o.effective_mixing_weight,
        additive=o.apply == "additive",
        outer_lr=o.lr,
        outer_momentum=o.momentum,
    )
    return Reference(initial, [replay(member["moves"]) for member in members], settings)


def assert_is_the_reference(config: RunConfig, ranks: list[dict[str, Any]]) -> None:
    replicas = config.parallel.num_replicas
    size = len(ranks) // replicas
    for position in range(size):
        members = ranks[position::size]
        reference = reference_of(config, members)
        for t in range(1, (config.training.train_iters or 0) + 1):
            reference.step(t)
            for member in members:
                assert_same(member["anchors"][t - 1], reference.anchor, f"anchor after step {t}")
        reference.flush()
        for k, member in enumerate(members):
            assert_same(member["anchors"][-1], reference.anchor, "flushed anchor")
            assert_same(member["end"], reference.local[k], "local parameters at the end")


def assert_same(actual: Parameters, expected: Parameters, message: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, f"{message}, {name}")


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
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_run_is_the_reference(case: str) -> None:
    """Bit for bit: two terms have one sum, and half of it is exact."""
    world, replicas, sections = CASES[case]
    config = config_of(replicas, **sections)
    assert_is_the_reference(config, run_ranks(recorded, world, config))


def test_three_real_replicas_are_the_reference() -> None:
    """Bit for bit where the order of the sum is ours: from the left, as in the reference."""
    config = config_of(3, "muon", outer=outer(**FRAGMENTS, overlap_steps=1))
    assert_is_the_reference(config, run_ranks(partial(recorded, deterministic=True), 3, config))


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
