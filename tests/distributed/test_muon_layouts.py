"""MuonAdamW over real ranks equals one process, whatever the layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_muloco.comm.collectives import AllToAll
from megatron_muloco.config.inner import MuonConfig
from megatron_muloco.optim.matrices import LayerShape
from megatron_muloco.optim.muon import Muon, StepReport
from tests.support.scattered import VECTOR, Stage, gather, train, train_in_threads, whole
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal

GQA = LayerShape(8, 4, 3, 20)
HIDDEN = 7
SQUARE = LayerShape(4, 4, 3, 12)
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.3,
    "matrix_update": Muon(MuonConfig(ns_dtype="fp32")),
}


def identity(batch: torch.Tensor) -> torch.Tensor:
    return batch


IDENTITY = {**OPTIONS, "matrix_update": Muon(MuonConfig(), identity)}


def train_here(
    stage: Stage, steps: int, options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], StepReport]:
    transport = AllToAll(dist.group.WORLD)
    return train(stage, transport.rank, transport, steps, **options)


def run(stage: Stage, steps: int, options: dict[str, Any]) -> tuple[Any, list[StepReport]]:
    results = run_ranks(train_here, len(stage.layout), stage, steps, options)
    held = [masters for masters, _ in results]
    return gather(stage.layout, held, stage.random(0)), [report for _, report in results]


@pytest.mark.parametrize(("tensor_size", "dp"), [(1, 4), (2, 2), (4, 1), (1, 3)])
def test_the_update_does_not_depend_on_the_layout(tensor_size: int, dp: int) -> None:
    alone = Stage.even(GQA, HIDDEN, 1, 1)
    spread = Stage.even(GQA, HIDDEN, tensor_size, dp)
    expected = train_in_threads(alone, 2, **OPTIONS)
    same_batches, _ = run(spread.owned_by_one(), 2, OPTIONS)
    balanced, reports = run(spread, 2, OPTIONS)
    for mine, reference in zip(spread.table.matrices, alone.table.matrices, strict=True):
        theta = whole(reference, expected)
        assert_equal(whole(mine, same_batches), theta, mine.name)
        error = (whole(mine, balanced) - theta).norm() / theta.norm()
        assert error <= 1e-4, mine.name  # batches of other sizes may sum in another order
    assert_equal(same_batches[VECTOR, 0], expected[VECTOR, 0])
    calls = [report.newton_schulz_calls for report in reports]
    assert calls == [len(spread.table.owned_by(rank)) for rank in range(len(spread.layout))]
    assert sum(calls) == 7  # no matrix is computed twice


def test_muon_with_identity_is_sgd_with_momentum_bit_for_bit() -> None:
    stage = Stage.even(SQUARE, 12, 2, 2)  # all matrices are square: scaled by 1
    trained, _ = run(stage, 3, IDENTITY)
    for matrix in stage.table.matrices:
        theta = torch.nn.Parameter(whole(matrix, stage.random(0)))
        sgd = torch.optim.SGD([theta], lr=OPTIONS["lr"], momentum=0.9)
        for step in (1, 2, 3):
            theta.grad = whole(matrix, stage.random(step))
            theta.data.mul_(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
            sgd.step()
        assert_equal(whole(matrix, trained), theta.data, matrix.name)


def test_buckets_do_not_change_what_is_computed() -> None:
    """Bit for bit where matrices are not mixed; batches of other sizes may sum in another order."""
    stage = Stage.even(GQA, HIDDEN, 2, 2)
    exact, exact_again = (
        run(stage, 3, IDENTITY | {"exchange_chunks": buckets})[0] for buckets in (1, 3)
    )
    whole_batches, _ = run(stage, 2, OPTIONS)
    bucketed, _ = run(stage, 2, OPTIONS | {"exchange_chunks": 3})
    for matrix in stage.table.matrices:
        assert_equal(whole(matrix, exact_again), whole(matrix, exact), matrix.name)
        theta = whole(matrix, whole_batches)
        assert (whole(matrix, bucketed) - theta).norm() / theta.norm() <= 1e-4, matrix.name
