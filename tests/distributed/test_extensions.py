"""What is passed to `wrap_optimizer` from outside works through the whole stack."""

from typing import Any

import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.optim.muon import MatrixUpdate, Muon
from megatron_muloco.outer.optimizer import OuterOptimizer
from tests.support.extensions import (
    OTHER_NAMES,
    HeavyBall,
    SignedMomentum,
    polar_factor,
    with_other_names,
    wrap_with_own_parts,
)
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


def step_by(
    config: RunConfig, update: MatrixUpdate
) -> tuple[dict[str, tuple[float, float, list[tuple[int, int]]]], set[str]]:
    """Return how far one step moved each matrix parameter, the learning rate, and the matrices."""
    run = start_tiny(config, matrix_update=update)
    before = run.masters()
    run.train(1)
    inner, last = run.optimizer.inner, run.optimizer.last_inner
    assert last is not None
    moved = {}
    for row in inner.table.rows:
        if row.route == "matrix":
            kept = 1 - last.lr * inner.param_groups[0]["weight_decay"]
            step = run.masters()[row.name][1] - kept * before[row.name][1]
            moved[row.name] = (step.norm().item(), last.lr, [m.shape for m in row.matrices])
    names = set(inner.named_state())
    finish_tiny()
    return moved, names


def test_another_update_rule_takes_the_place_of_muon() -> None:
    """Each matrix, q, k, v, gate and up apart, moves by one learning rate in Frobenius norm."""
    config = tiny_config(inner=MUON, outer={"kind": "none"})
    ((moved, names),) = run_ranks(step_by, 1, config, SignedMomentum())
    assert names == {"velocity", "exp_avg", "exp_avg_sq"}
    assert len(moved) == 2 * 4
    for name, (actual, lr, shapes) in moved.items():
        # Parameters below 1 round to 6e-8, steps are lr / sqrt(1024) an element.
        assert abs(actual / (lr * len(shapes) ** 0.5) - 1) <= 1e-3, name


def test_another_orthogonaliser_takes_the_place_of_newton_schulz() -> None:
    """All singular values of an update are sqrt(rows / columns): exactly, unlike with Muon."""
    config = tiny_config(inner=MUON, outer={"kind": "none"})
    update = Muon(config.inner.muon, polar_factor)
    ((moved, names),) = run_ranks(step_by, 1, config, update)
    assert names == {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert len(moved) == 2 * 4
    for name, (actual, lr, shapes) in moved.items():
        square = sum(rows / columns * min(rows, columns) for rows, columns in shapes)
        assert abs(actual / (lr * square**0.5) - 1) <= 1e-3, name  # roundings as above


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


def train_with_own_parts(config: RunConfig) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Train two rounds with names, update rule and outer optimizer from outside."""
    run = start_tiny(config, change=with_other_names, names=OTHER_NAMES)
    run.optimizer = wrap_with_own_parts(run.optimizer.view.optimizer, run.model, config, run.groups)
    run.train(4)
    synchronizer = run.optimizer.synchronizer
    assert synchronizer is not None
    anchors = {name: anchor.clone() for name, anchor in synchronizer.anchors().items()}
    names = set(run.optimizer.inner.named_state())
    finish_tiny()
    return anchors, names


def test_all_of_them_work_together() -> None:
    ranks = run_ranks(train_with_own_parts, 2, config_of(tensor=1, replicas=2))
    (anchors, names), (other_anchors, _) = ranks
    assert names == {"velocity", "exp_avg", "exp_avg_sq"}
    assert any("gate_and_up" in name for name in anchors)
    for name, anchor in anchors.items():
        assert anchor.isfinite().all()
        assert_equal(anchor, other_anchors[name], name)
