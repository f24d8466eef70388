"""MuonAdamW: what it equals, and what it refuses. Ranks are threads here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.config.inner import Accumulation, MuonConfig, NSImplementation
from megatron_muloco.errors import CheckpointError, RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import LayerShape, implementation_for
from megatron_muloco.optim.muon import Muon, MuonAdamW
from megatron_muloco.optim.newton_schulz import newton_schulz, scale_factor
from megatron_muloco.optim.parameter_table import Assignment, ParameterTable
from megatron_muloco.params import Shard
from tests.support.extensions import SignedMomentum
from tests.support.scattered import (
    VECTOR,
    Pieces,
    Stage,
    shards_of,
    train_in_threads,
    whole,
)
from tests.support.tensors import assert_equal

GQA = LayerShape(8, 4, 3, 20)  # no matrix is square: q [24 x 7], k and v [12 x 7], gate [20 x 7]
SQUARE = LayerShape(4, 4, 3, 12)  # with hidden 12 every matrix is square and scaled by 1
HIDDEN = 7
FP32 = Muon(MuonConfig(ns_dtype="fp32"))
BF16 = Muon(MuonConfig(ns_dtype="bf16"))
IDENTITY = Muon(MuonConfig(), lambda batch: batch)
LAYOUTS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}


def plain_muon(stage: Stage, steps: int, *, lr: float, weight_decay: float) -> dict[str, Tensor]:
    """Muon on whole matrices in one process, as the paper writes it."""
    trained = {}
    for matrix in stage.table.matrices:
        theta = whole(matrix, stage.random(0))
        M = torch.zeros_like(theta)
        for t in range(1, steps + 1):
            M = 0.9 * M + whole(matrix, stage.random(t))
            U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
            s = S / (S.norm() + 1e-8)
            for a, b, c in QUINTIC:
                s = a * s + b * s**3 + c * s**5
            fan_out, fan_in = theta.shape
            update = (fan_out / fan_in) ** 0.5 * (U * s) @ Vh
            theta = (1 - lr * weight_decay) * theta - lr * update.float()
        trained[matrix.name] = theta
    return trained


QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("tensor_size", "dp"), LAYOUTS)
def test_agrees_with_plain_muon_on_every_layout(tensor_size: int, dp: int) -> None:
    stage = Stage.even(GQA, HIDDEN, tensor_size, dp)
    trained = train_in_threads(stage, 3, matrix_update=FP32, **OPTIONS)
    expected = plain_muon(stage, 3, **OPTIONS)
    for matrix in stage.table.matrices:
        # Newton-Schulz is within 1e-4 of the polynomial; parameters are larger than updates.
        assert relative_error(whole(matrix, trained), expected[matrix.name]) <= 1e-4, matrix.name


@pytest.mark.parametrize(("tensor_size", "dp"), LAYOUTS)
def test_the_update_does_not_depend_on_the_layout(tensor_size: int, dp: int) -> None:
    alone = Stage.even(GQA, HIDDEN, 1, 1)
    spread = Stage.even(GQA, HIDDEN, tensor_size, dp)
    expected = train_in_threads(alone, 2, matrix_update=BF16, **OPTIONS)
    same_batches = train_in_threads(spread.owned_by_one(), 2, matrix_update=BF16, **OPTIONS)
    balanced = train_in_threads(spread, 2, matrix_update=FP32, **OPTIONS)
    expected_fp32 = train_in_threads(alone, 2, matrix_update=FP32, **OPTIONS)
    for mine, reference in zip(spread.table.matrices, alone.table.matrices, strict=True):
        assert_equal(whole(mine, same_batches), whole(reference, expected), mine.name)
        error = relative_error(whole(mine, balanced), whole(reference, expected_fp32))
        assert error <= 1e-4, mine.name
    assert_equal(same_batches[VECTOR, 0], expected[VECTOR, 0])


@pytest.mark.parametrize(("tensor_size", "dp"), LAYOUTS)
def test_muon_with_identity_is_sgd_with_momentum_bit_for_bit(tensor_size: int, dp: int) -> None:
    stage = Stage.even(SQUARE, 12, tensor_size, dp)
    trained = train_in_threads(stage, 3, matrix_update=IDENTITY, **OPTIONS)
    for matrix in stage.table.matrices:
        theta = torch.nn.Parameter(whole(matrix, stage.random(0)))
        sgd = torch.optim.SGD([theta], lr=OPTIONS["lr"], momentum=0.9)
        for step in (1, 2, 3):
            theta.grad = whole(matrix, stage.random(step))
            theta.data.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
            sgd.step()
        assert_equal(whole(matrix, trained), theta.data, matrix.name)


@pytest.mark.parametrize("accumulation", ["heavy_ball", "ema"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_variants(accumulation: Accumulation, nesterov: bool) -> None:
    stage = Stage.even(SQUARE, 12, 2, 2)
    config = MuonConfig(accumulation=accumulation, nesterov=nesterov, momentum=0.5)
    update = Muon(config, lambda batch: batch)
    trained = train_in_threads(stage, 2, lr=1.0, weight_decay=0.0, matrix_update=update)
    fresh = 0.5 if accumulation == "ema" else 1.0
    for matrix in stage.table.matrices:
        theta, M = whole(matrix, stage.random(0)), torch.tensor(0.0)
        for step in (1, 2):
            G = fresh * whole(matrix, stage.random(step))
            M = 0.5 * M + G
            theta = theta - (0.5 * M + G if nesterov else M)
        # Factors 0.5 and 1 are exact, so only the order of two additions could differ: it does not.
        assert_equal(whole(matrix, trained), theta, matrix.name)


def test_settings_reach_newton_schulz_and_the_scale() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    config = MuonConfig(
        num_ns_steps=3, coefficient_type="simple", scale_mode="match_rms", ns_dtype="fp32"
    )
    trained = train_in_threads(stage, 1, lr=1.0, matrix_update=Muon(config))
    for matrix in stage.table.matrices:
        G = whole(matrix, stage.random(1))
        update = newton_schulz(G, steps=3, coefficients="simple", dtype=torch.float32)
        update *= scale_factor("match_rms", *matrix.shape)
        expected = whole(matrix, stage.random(0)) - update
        assert relative_error(whole(matrix, trained), expected) <= 1e-4


@pytest.mark.parametrize(("tensor_size", "dp"), [(1, 1), (2, 3)])
def test_kind_adamw_is_torch_adamw_bit_for_bit(tensor_size: int, dp: int) -> None:
    stage = Stage.even(GQA, HIDDEN, tensor_size, dp, kind="adamw")
    assert set(stage.table.routes.values()) == {"vector"}
    start, gradients = random_pieces(stage, 0), [random_pieces(stage, s) for s in (1, 2, 3)]
    for rank, shards in enumerate(stage.layout):
        ours = shards_of(start, shards)
        theirs = [torch.nn.Parameter(shard.clone()) for shard in ours.values()]
        optimizer = stage.optimizer(rank, ours, None, betas=(0.9, 0.95), **OPTIONS)
        reference = torch.optim.AdamW(theirs, betas=(0.9, 0.95), foreach=True, **OPTIONS)
        for gradient in gradients:
            for (name, tensor), other in zip(ours.items(), theirs, strict=True):
                tensor.grad = shards_of(gradient, shards)[name]
                other.grad = tensor.grad.clone()
            optimizer.step()
            reference.step()
        for (name, tensor), other in zip(ours.items(), theirs, strict=True):
            assert_equal(tensor, other.data, name)
        assert optimizer.last_step.newton_schulz_calls == 0


def random_pieces(stage: Stage, seed: int) -> Pieces:
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, t): torch.randn(param.local_shape, generator=generator)
        for name, param in stage.params.items()
        for t in range(stage.tensor_size)
    }


def lone_optimizer(**options: Any) -> tuple[MuonAdamW, dict[str, Tensor], Stage]:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    masters = shards_of(stage.random(0), stage.layout[0])
    optimizer = stage.optimizer(0, masters, None, **({"lr": 0.1, "matrix_update": FP32} | options))
    return optimizer, masters, stage


def step(optimizer: MuonAdamW, masters: dict[str, Tensor], stage: Stage, seed: int) -> None:
    gradients = shards_of(stage.random(seed), stage.layout[0])
    for name, master in masters.items():
        master.grad = gradients[name]
    optimizer.step()


@pytest.mark.parametrize(("tensor_size", "dp"), [(1, 1), (2, 3), (4, 2)])
def test_split_heads_are_matrices_of_their_own(tensor_size: int, dp: int) -> None:
    stage = Stage.even(GQA, HIDDEN, tensor_size, dp, split_heads=True)
    trained = train_in_threads(stage, 1, lr=1.0, matrix_update=FP32)
    heads = {"q": 8, "k": 4, "v": 4}
    for matrix in stage.table.matrices:
        assert matrix.blocks == heads.get(matrix.kind, 1)
        G = whole(matrix, stage.random(1))
        updates = []
        for head in G.chunk(matrix.blocks):
            update = newton_schulz(head, dtype=torch.float32)
            updates.append(update * scale_factor("unit_rms_norm", *head.shape))
        expected = whole(matrix, stage.random(0)) - torch.cat(updates)
        assert relative_error(whole(matrix, trained), expected) <= 1e-4, matrix.name


def test_every_head_is_counted() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1, split_heads=True)
    masters = shards_of(stage.random(0), stage.layout[0])
    optimizer = stage.optimizer(0, masters, None, lr=0.1)
    for master in masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    # 8 + 4 + 4 heads, proj, gate, up, down
    assert optimizer.last_step.newton_schulz_calls == optimizer.planned_calls == 16 + 4


def test_the_implementation_that_is_planned_is_the_one_that_runs() -> None:
    # In bf16 `triangle` and `gram` raise, so a step shows which one it was given.
    batch = torch.ones(1, 2, 3)
    forced: tuple[NSImplementation, ...] = ("triangle", "gram")
    for impl in forced:
        config = MuonConfig(ns_impl=impl, ns_dtype="bf16")
        assert implementation_for(config, accelerator=False)(2, 3) == impl
        with pytest.raises(ValueError, match=f"impl '{impl}' iterates in fp32"):
            Muon(config).orthogonalise(batch)
    choose = implementation_for(MuonConfig(ns_dtype="fp32"), accelerator=False)
    assert choose(512, 512) == "triangle"
    assert choose(512, 1024) == choose(1024, 512) == "gram"
    assert implementation_for(MuonConfig(ns_dtype="bf16"), accelerator=False)(512, 1024) == "plain"
    assert BF16.orthogonalise(batch).isfinite().all()


@pytest.mark.parametrize("accelerator", [False, True])
def test_auto_means_the_same_dtype_where_it_is_planned_and_where_it_runs(accelerator: bool) -> None:
    config, G = MuonConfig(), torch.randn(1, 5, 9)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        config.compute_dtype(accelerator=accelerator)
    ]
    muon = Muon(config, accelerator=accelerator)
    assert_equal(muon.orthogonalise(G), newton_schulz(G, dtype=dtype))
    impl = implementation_for(config, accelerator=accelerator)(512, 1024)
    assert impl == ("plain" if accelerator else "gram")


@pytest.mark.parametrize(("tensor_size", "dp"), LAYOUTS)
def test_another_update_rule_sees_whole_matrices_and_keeps_its_own_state(
    tensor_size: int, dp: int
) -> None:
    stage = Stage.even(GQA, HIDDEN, tensor_size, dp)
    trained = train_in_threads(stage, 2, matrix_update=SignedMomentum(), **OPTIONS)
    for matrix in stage.table.matrices:
        theta, M = whole(matrix, stage.random(0)), torch.tensor(0.0)
        for seed in (1, 2):
            M = torch.lerp(M, whole(matrix, stage.random(seed)), 0.5)
            update = M.sign() / M.sign().norm()
            theta = theta * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) - OPTIONS["lr"] * update
        torch.testing.assert_close(whole(matrix, trained), theta)
    optimizer, _, _ = lone_optimizer(matrix_update=SignedMomentum())
    assert set(optimizer.named_state()) == {"velocity", "exp_avg", "exp_avg_sq"}


def test_learning_rate_and_weight_decay_are_read_in_every_step() -> None:
    optimizer, masters, stage = lone_optimizer()
    before = {name: master.clone() for name, master in masters.items()}
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, masters, stage, 1)
    for name, master in masters.items():
        assert_equal(master, before[name], name)
    # 1 - lr * wd = 0 forgets the parameters, so what they were no longer matters.
    other, others, _ = lone_optimizer(lr=0.0)
    step(other, others, stage, 1)
    for master in others.values():
        master.fill_(3.0)
    for tuned, tensors in ((optimizer, masters), (other, others)):
        tuned.param_groups[0].update(lr=0.5, weight_decay=2.0)
        step(tuned, tensors, stage, 2)
    for name, master in masters.items():
        assert_equal(others[name] + 0.0, master + 0.0, name)


def test_all_zero_gradients_change_nothing_but_the_decay() -> None:
    optimizer, masters, _ = lone_optimizer(weight_decay=0.5)
    before = {name: master.clone() for name, master in masters.items()}
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    for name, master in masters.items():
        assert_equal(master, before[name] * (1 - 0.1 * 0.5), name)


def test_named_state_round_trips_into_an_equal_continuation() -> None:
    first, masters, stage = lone_optimizer()
    step(first, masters, stage, 1)
    state = {
        key: {name: t.clone() for name, t in named.items()}
        for key, named in first.named_state().items()
    }
    assert set(state["momentum_buffer"]) == {row.name for row in stage.table.rows if row.matrices}
    assert set(state["exp_avg"]) == set(state["exp_avg_sq"]) == {VECTOR}
    second, copies, _ = lone_optimizer()
    for name, master in masters.items():
        copies[name].copy_(master)
    second.load_named_state(state, step=first.step_count)
    step(first, masters, stage, 2)
    step(second, copies, stage, 2)
    for name, master in masters.items():
        assert_equal(copies[name], master, name)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer, masters, stage = lone_optimizer()
    step(optimizer, masters, stage, 1)
    state = optimizer.named_state()
    kept = state["exp_avg"][VECTOR].clone()
    with pytest.raises(CheckpointError, match=r"exp_avg_sq does not fit .* missing"):
        optimizer.load_named_state(
            {"momentum_buffer": state["momentum_buffer"], "exp_avg": {VECTOR: 0 * kept}}, step=1
        )
    assert_equal(optimizer.named_state()["exp_avg"][VECTOR], kept)


def test_zero_moments_gives_a_fresh_optimizer() -> None:
    used, masters, stage = lone_optimizer()
    step(used, masters, stage, 1)
    used.zero_moments()
    fresh, copies, _ = lone_optimizer()
    for name, master in masters.items():
        copies[name].copy_(master)
    step(used, masters, stage, 2)
    step(fresh, copies, stage, 2)
    for name, master in masters.items():
        assert_equal(copies[name], master, name)


def test_masters_may_be_views_and_steps_write_through_them() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    buffers = {n: s.clone() for n, s in shards_of(stage.random(0), stage.layout[0]).items()}
    masters = {name: buffer.view(-1)[:] for name, buffer in buffers.items()}
    optimizer = stage.optimizer(0, masters, None, lr=0.1)
    step(optimizer, masters, stage, 1)
    start = shards_of(stage.random(0), stage.layout[0])
    assert all(not torch.equal(buffers[name], start[name]) for name in buffers)


def test_step_before_bind_is_refused() -> None:
    optimizer = MuonAdamW([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(RuntimeMismatch, match="not bound to its shards yet"):
        optimizer.step()


def test_megatrons_state_dicts_are_refused_after_bind() -> None:
    optimizer, _, _ = lone_optimizer()
    with pytest.raises(RuntimeMismatch, match="state_dict was called on bound shards"):
        optimizer.state_dict()
    with pytest.raises(RuntimeMismatch, match="load_state_dict was called on bound shards"):
        optimizer.load_state_dict({})


def test_a_shard_without_gradient_is_refused() -> None:
    optimizer, masters, stage = lone_optimizer()
    step(optimizer, masters, stage, 1)
    masters[VECTOR].grad = None
    with pytest.raises(RuntimeMismatch, match=f"1 shards have no gradient, the first is {VECTOR}"):
        optimizer.step()


UNIT_KINDS = ("q", "k", "v", "proj", "gate", "up", "down")


@pytest.mark.parametrize("kind", UNIT_KINDS)
@pytest.mark.parametrize("where", ["exchange", "table", "both"])
def test_a_unit_taken_out_of_the_plan_makes_bind_refuse(kind: str, where: str) -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    masters = shards_of(stage.random(0), stage.layout[0])
    optimizer = MuonAdamW([{"params": list(masters.values())}], lr=0.1)
    matrices = stage.table.matrices
    fewer = tuple(matrix for matrix in matrices if matrix.kind != kind)
    rows = tuple(
        replace(row, matrices=tuple(matrix for matrix in row.matrices if matrix.kind != kind))
        for row in stage.table.rows
    )
    smaller = ParameterTable(rows, Assignment((0,) * len(fewer), (1,)))
    moved, table = (
        matrices if where == "table" else fewer,
        stage.table if where == "exchange" else smaller,
    )
    shards = [
        (tensor, Shard(stage.params[name], *stage.layout[0].ranges[name]))
        for name, tensor in masters.items()
    ]

    def bind() -> None:
        exchange = ShardExchange(moved, [0] * len(moved), stage.layout, rank=0, transport=None)
        optimizer.bind(shards, table, exchange)

    with pytest.raises(
        RuntimeMismatch, match=r"without Muon|only part of the shards|groups and exchange disagree"
    ):
        bind()


def test_matrices_without_an_exchange_are_refused() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    masters = shards_of(stage.random(0), stage.layout[0])
    with pytest.raises(RuntimeMismatch, match="a matrix would be left without Muon"):
        MuonAdamW([{"params": list(masters.values())}], lr=0.1).bind(
            [(t, Shard(stage.params[n], *stage.layout[0].ranges[n])) for n, t in masters.items()],
            stage.table,
            None,
        )


def test_phases_of_a_step_are_timed() -> None:
    optimizer, masters, stage = lone_optimizer()
    step(optimizer, masters, stage, 1)
    taken = optimizer.timer.take()
    assert set(taken) == {"adamw", "collect", "newton_schulz", "return"}
    assert all(milliseconds > 0 for milliseconds in taken.values())
    assert optimizer.timer.take() == {}


def test_a_unit_that_is_not_orthogonalised_makes_the_step_refuse() -> None:
    optimizer, masters, stage = lone_optimizer()
    step(optimizer, masters, stage, 1)
    optimizer._planned = (*optimizer._planned, "w::lost")
    with pytest.raises(RuntimeMismatch, match=r"7 matrices, planned were 8: missing \['w::lost'\]"):
        step(optimizer, masters, stage, 2)


def test_tensors_and_shards_must_fit() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    norm = stage.params[VECTOR]
    table = replace(stage.table, rows=tuple(r for r in stage.table.rows if not r.matrices))
    tensor, stray = torch.zeros(5), torch.zeros(5)
    cases = [
        ([tensor], [], "has no shard"),
        ([tensor], [(tensor, Shard(norm, 0, 4))], "flat float32 tensor of 4 elements"),
        ([tensor], [(tensor, Shard(norm, 0, 5)), (stray, Shard(norm, 0, 5))], "missing"),
        ([tensor, stray], [(t, Shard(norm, 0, 5)) for t in (tensor, stray)], "more than once"),
        ([tensor], [(tensor, Shard(replace(norm, name="x"), 0, 5))], "x is not in the parameter"),
    ]
    for params, shards, message in cases:
        optimizer = MuonAdamW([{"params": [stray]}], lr=0.1)
        optimizer.param_groups[0]["params"] = params
        with pytest.raises(RuntimeMismatch, match=message):
            optimizer.bind(shards, table, None)


def test_a_rank_without_any_shard_steps() -> None:
    stage = Stage.even(GQA, HIDDEN, 1, 1)
    layout = [*stage.layout, type(stage.layout[0])(0, {})]
    stage = replace(stage, layout=layout).owned_by_one()
    expected = train_in_threads(Stage.even(GQA, HIDDEN, 1, 1), 2, **OPTIONS)
    trained = train_in_threads(stage, 2, **OPTIONS)
    for key, piece in expected.items():
        assert_equal(trained[key], piece)


def test_no_nan_from_tiny_or_rank_deficient_momentum() -> None:
    optimizer, masters, _ = lone_optimizer(matrix_update=BF16)
    for scale in (1e-38, 1e-20, 1e20):
        for master in masters.values():
            master.grad = torch.full_like(master, scale)
        optimizer.step()
        assert all(master.isfinite().all() for master in masters.values())
