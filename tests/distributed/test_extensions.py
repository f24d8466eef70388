"""What is passed to `wrap_optimizer` from outside works through the whole stack."""

from typing import Any

import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.outer.optimizer import OuterOptimizer
from tests.support.extensions import OTHER_NAMES, HeavyBall, SignedMomentum, with_other_names
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import MUON, finish_tiny, start_tiny, tiny_config

STEPS = 5
RENAMED = {"mlp.gate_and_up": "mlp.linear_fc1", "mlp.down": "mlp.linear_fc2"}
Masters = dict[str, tuple[int, torch.Tensor]]


def config_of(tensor: int, replicas: int) -> RunConfig:
    compression = {"kind": "linear", "bits": 4, "exceptions": {"norm": "none", "embedding": 8}}
    return tiny_config(
        inner=MUON,
        parallel={"tensor_model_parallel_size": tensor, "num_replicas": replicas},
        outer={
            "kind": "nesterov",
            "lr": 0.7,
            "momentum": 0.6,
            "sync_interval": 2,
            "fragments": {"count": 2},
            "compression": compression,
        },
        training={"train_iters": STEPS},
    )


def train_one(config: RunConfig, other_names: bool) -> tuple[Masters, dict[str, str]]:
    options: dict[str, Any] = {"names": OTHER_NAMES} if other_names else {}
    run = start_tiny(config, change=with_other_names if other_names else None, **options)
    run.train(STEPS)
    run.optimizer.flush()
    masters, routes = run.masters(), run.optimizer.inner.table.routes
    finish_tiny()
    return masters, dict(routes)


def as_in_gpt(name: str) -> str:
    for other, own in RENAMED.items():
        name = name.replace(other, own)
    return name


def test_a_model_with_other_names_trains_as_the_one_it_renames() -> None:
    config = config_of(tensor=2, replicas=2)
    expected = run_ranks(train_one, 4, config, False)
    ranks = run_ranks(train_one, 4, config, True)
    for (masters, routes), (own_masters, own_routes) in zip(ranks, expected, strict=True):
        assert any("gate_and_up" in name for name in routes)
        assert {as_in_gpt(name): route for name, route in routes.items()} == own_routes
        assert [as_in_gpt(name) for name in masters] == list(own_masters)
        for name, (start, values) in masters.items():
            own_start, own_values = own_masters[as_in_gpt(name)]
            assert start == own_start
            assert_equal(values, own_values, name)


def step_signed(config: RunConfig) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """Return how far one step moved each whole matrix parameter, and how far it should have."""
    run = start_tiny(config, matrix_update=SignedMomentum())
    before = run.masters()
    run.train(1)
    inner, last = run.optimizer.inner, run.optimizer.last_inner
    assert last is not None
    moved = {}
    for row in inner.table.rows:
        if row.route == "matrix":
            kept = 1 - last.lr * inner.param_groups[0]["weight_decay"]
            step = run.masters()[row.name][1] - kept * before[row.name][1]
            moved[row.name] = (step.norm().item(), last.lr * len(row.matrices) ** 0.5)
    names = set(inner.named_state())
    finish_tiny()
    return moved, names


def test_another_update_rule_takes_the_place_of_muon() -> None:
    """Each matrix, q, k, v, gate and up apart, moves by one learning rate in Frobenius norm."""
    ((moved, names),) = run_ranks(step_signed, 1, tiny_config(inner=MUON, outer={"kind": "none"}))
    assert names == {"velocity", "exp_avg", "exp_avg_sq"}
    assert len(moved) == 2 * 4
    for name, (actual, expected) in moved.items():
        # Parameters below 1 round to 6e-8, steps are lr / sqrt(1024) an element.
        assert abs(actual - expected) <= 1e-3 * expected, name


def anchors_of_two_rounds(
    config: RunConfig, outer_optimizer: OuterOptimizer | None
) -> list[dict[str, torch.Tensor]]:
    """Train two rounds and return the anchor after each of them."""
    run = start_tiny(config, outer_optimizer=outer_optimizer)
    synchronizer = run.optimizer.synchronizer
    assert synchronizer is not None
    anchors = []
    for _ in range(2):
        run.train(config.outer.sync_interval)
        anchors.append({name: anchor.clone() for name, anchor in synchronizer.anchors().items()})
    finish_tiny()
    return anchors


def test_another_outer_optimizer_takes_the_place_of_nesterov() -> None:
    """From zero momentum Nesterov is heavy ball with 1 + mu times the learning rate, bit for bit.

    With eta = 1 and mu = 1/2 both subtract D + D/2, rounded once. In the second round they differ.
    """
    outer = {"kind": "nesterov", "lr": 1.0, "momentum": 0.5, "sync_interval": 2}
    config = tiny_config(outer=outer, parallel={"num_replicas": 2})
    nesterov = run_ranks(anchors_of_two_rounds, 2, config, None)
    ranks = run_ranks(anchors_of_two_rounds, 2, config, HeavyBall(1.5, 0.5))
    for (first, second), (own_first, own_second) in zip(ranks, nesterov, strict=True):
        assert first.keys() == own_first.keys()
        for name, anchor in first.items():
            assert_equal(anchor, own_first[name], name)
        assert not any(torch.equal(anchor, own_second[name]) for name, anchor in second.items())
    for name, anchor in ranks[0][1].items():
        assert_equal(anchor, ranks[1][1][name], f"{name} of both replicas")
