"""Muon without orthogonalisation is SGD with momentum, through Megatron's distributed optimizer."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.newton_schulz import scale_factor
from megatron_muloco.optim.routing import RankShards
from tests.support import inner_updates as updates
from tests.support.inner_updates import Held
from tests.support.scattered import whole
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

STEPS, LR, WEIGHT_DECAY = 3, 0.1, 0.3
TENSOR, DATA = 2, 2

# Every matrix is 12 x 12, 48 x 12 or 12 x 48: sqrt(rows / columns) is 1, 2 or 1/2, so that the
# scale does not round wherever it is multiplied in.
MODEL = {
    "num_layers": 2,
    "hidden_size": 12,
    "ffn_hidden_size": 48,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 6,
}
INNER = {
    "kind": "muon",
    "lr": LR,
    "lr_warmup_iters": 0,
    "lr_decay_style": "constant",
    "weight_decay": WEIGHT_DECAY,
}


def gradient(matrix: MuonMatrix, step: int, dp: int) -> Tensor:
    """Return what backward of data-parallel rank ``dp`` gives: integers, whose mean is exact."""
    return updates.named_integers(matrix, DATA * step + dp)


def train() -> tuple[Held, dict[str, Tensor]]:
    config = tiny_config(
        model=MODEL,
        parallel={"tensor_model_parallel_size": TENSOR},
        inner=INNER,
        outer={"kind": "none"},
        training={"clip_grad": 0.0},
    )
    run = start_tiny(config)
    run.optimizer.inner.matrix_update.orthogonalise = lambda batch: batch
    updates.set_masters(run, partial(updates.named_matrix, seed=-1))
    run.optimizer.view.publish()
    for step in range(STEPS):
        updates.set_gradients(run, partial(gradient, step=step, dp=run.groups.coords.dp))
        run.model.finish_grad_sync()  # Megatron's reduce-scatter
        run.optimizer.step()
    result = updates.held(run), run.whole_parameters()
    finish_tiny()
    return result


def test_identity_muon_is_sgd_with_momentum_bit_for_bit() -> None:
    """At tp 2 x dp 2: reduce-scatter, shards, exchange, momentum, decay, scale and descent."""
    results = run_ranks(train, TENSOR * DATA)
    ranks = [held for held, _ in results]
    masters, matrices = updates.whole_matrices(ranks), ranks[0].matrices
    models = [  # of each data-parallel rank, which has gathered what the others updated
        {
            (name, held.tensor_rank): tensor
            for held, parameters in results[TENSOR * dp : TENSOR * (dp + 1)]
            for name, tensor in parameters.items()
        }
        for dp in range(DATA)
    ]
    assert len(matrices) == 7 * MODEL["num_layers"]
    assert {matrix.shape for matrix in matrices} == {(12, 12), (48, 12), (12, 48)}
    for matrix in matrices:
        theta = torch.nn.Parameter(updates.named_matrix(matrix, -1))
        scaled = LR * scale_factor("unit_rms_norm", *matrix.shape)
        sgd = torch.optim.SGD([theta], lr=scaled, momentum=0.9)
        for step in range(STEPS):
            theta.grad = sum(gradient(matrix, step, dp) for dp in range(DATA)) / DATA
            theta.data.mul_(1 - LR * WEIGHT_DECAY)
            sgd.step()
        assert_equal(masters[matrix.name], theta.data, matrix.name)
        for model in models:
            assert_equal(whole(matrix, model), theta.data, matrix.name)


def refusals() -> dict[str, str]:
    """Return what is said when one matrix at a time is left out of what is exchanged."""
    run = start_tiny(tiny_config(model=MODEL, inner=INNER, outer={"kind": "none"}))
    inner, view = run.optimizer.inner, run.optimizer.view
    pairs = [(view.raw_masters[shard.name], shard) for shard in view.shards]
    ranges = {shard.name: (shard.start, shard.end) for shard in view.shards}
    layout = [RankShards(0, ranges)]

    def bind_without(left_out: MuonMatrix) -> None:
        matrices = [matrix for matrix in inner.table.matrices if matrix != left_out]
        exchange = ShardExchange(matrices, [0] * len(matrices), layout, rank=0, transport=None)
        inner.bind(pairs, inner.table, exchange)

    said = {}
    for left_out in inner.table.matrices:
        with pytest.raises(RuntimeMismatch) as refusal:
            bind_without(left_out)
        said[left_out.name] = str(refusal.value)
    finish_tiny()
    return said


def test_a_unit_left_out_makes_the_run_refuse() -> None:
    """Each of a real model's, before anything is trained; its parameter is named."""
    (said,) = run_ranks(refusals, 1)
    assert len(said) == 7 * MODEL["num_layers"]
    for name, message in said.items():
        assert name.split("::")[0] in message
