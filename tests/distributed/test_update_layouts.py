"""The update of every matrix is the same however the model is cut: tp, pp, dp on the real stack."""

from functools import cache, partial

import pytest
import torch
from torch import Tensor

from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.newton_schulz import newton_schulz, scale_factor
from tests.support import inner_updates as updates
from tests.support.inner_updates import Held
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

# Odd width and rows that no power of two divides further than tp 4 needs; k and v are not square.
ODD = {
    "hidden_size": 27,
    "ffn_hidden_size": 44,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 6,
}
INNER = {
    "kind": "muon",
    "lr": 0.5,  # a power of two: masters that were zero become updates without another rounding
    "lr_warmup_iters": 0,
    "lr_decay_style": "constant",
    "weight_decay": 0.0,
}
MOMENTUM = 0.9
SAMPLES = 24  # a multiple of every dp

Layout = tuple[int, int, int]  # tp, pp, dp
LAYOUTS = [
    (tp, pp, dp)
    for tp in (1, 2, 4)
    for pp in (1, 2)
    for dp in (1, 2, 3, 4)
    if 1 < tp * pp * dp <= 8
]


def one_update(layers: int, layout: Layout, bucket_size: int | None) -> dict[str, Held]:
    """Return the updates of one step from the same momentum and gradient, by way of computing."""
    tp, pp, _ = layout
    config = tiny_config(
        model=ODD | {"num_layers": layers},
        parallel={"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp},
        inner=INNER,
        outer={"kind": "none"},
        training={
            "clip_grad": 0.0,
            "global_batch_size": SAMPLES,
            "overlap_grad_reduce": bucket_size is not None,
        },
    )
    run = start_tiny(config, bucket_size=bucket_size)
    muon = run.optimizer.inner.matrix_update
    batched = muon.orthogonalise

    def step() -> Held:
        updates.set_masters(run, lambda matrix: torch.zeros(matrix.shape))
        updates.set_momentum(run, partial(updates.named_matrix, seed=0))
        updates.set_gradients(run, partial(updates.named_matrix, seed=1))
        run.optimizer.inner_step()
        return updates.held(run)

    found = {"balanced": step()}
    muon.orthogonalise = lambda batch: torch.stack([batched(M) for M in batch])
    found["one by one"] = step()
    updates.assign_all_to_first(run)
    muon.orthogonalise = batched
    found["same batches"] = step()
    finish_tiny()
    return found


def updates_of(
    layers: int, layout: Layout, bucket_size: int | None = None
) -> tuple[dict[str, dict[str, Tensor]], list[Held]]:
    """Return whole updates by way of computing and matrix, and what the ranks of the run held."""
    tp, pp, dp = layout
    ranks = run_ranks(partial(one_update, layers, layout, bucket_size), tp * pp * dp)
    ways = {way: updates.whole_matrices(rank[way] for rank in ranks) for way in ranks[0]}
    return ways, [rank["balanced"] for rank in ranks]


@cache
def batched_alone(layers: int, pp: int) -> dict[str, Tensor]:
    """Return the updates of stages of one rank each."""
    return updates_of(layers, (1, pp, 1))[0]["same batches"]


def by_definition(matrix: MuonMatrix) -> Tensor:
    """Return what one step does to a matrix that was zero."""
    momentum = updates.named_matrix(matrix, 0) * MOMENTUM + updates.named_matrix(matrix, 1)
    direction = newton_schulz(momentum, dtype=torch.float32)
    return -INNER["lr"] * (direction * scale_factor("unit_rms_norm", *matrix.shape))


def assert_same_updates(
    ways: dict[str, dict[str, Tensor]], ranks: list[Held], layers: int, stages: int
) -> None:
    """Bit for bit where the same matrices are multiplied together, otherwise to 1e-4.

    A batch of another size may sum in another order, and five steps amplify that.
    """
    matrices = {matrix.name: matrix for rank in ranks for matrix in rank.matrices}
    assert len(matrices) == 7 * layers
    for name, matrix in matrices.items():
        expected = by_definition(matrix)
        assert_equal(ways["one by one"][name], expected, name)
        assert_equal(ways["same batches"][name], batched_alone(layers, stages)[name], name)
        for way in ("balanced", "same batches"):
            error = (ways[way][name] - expected).norm() / expected.norm()
            assert error <= 1e-4, (way, name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "tp{}-pp{}-dp{}".format(*x))
def test_a_layout_does_not_change_any_update(layout: Layout) -> None:
    """Given the same momentum, for all sizes of tp, pp and dp that eight ranks allow."""
    ways, ranks = updates_of(2, layout)
    assert_same_updates(ways, ranks, 2, stages=layout[1])
    if layout[2] > 2:  # two data-parallel ranks cut these sizes between the two layers
        assert any(rank.cuts_inside_a_row() for rank in ranks), "choose other sizes"


@pytest.mark.parametrize("layout", [(4, 1, 2), (2, 1, 4)], ids=["tp4-dp2", "tp2-dp4"])
def test_a_rank_that_owns_nothing_takes_part(layout: Layout) -> None:
    """Seven matrices over eight ranks."""
    ways, ranks = updates_of(1, layout)
    assert 0 in [rank.planned_calls for rank in ranks]
    assert sum(rank.planned_calls for rank in ranks) == 7
    assert_same_updates(ways, ranks, 1, stages=1)


def test_buckets_do_not_change_any_update() -> None:
    """Each bucket is cut over dp by itself, so a rank's shards lie elsewhere than in one buffer."""
    ways, ranks = updates_of(2, (2, 1, 2), bucket_size=3000)
    _, unbucketed = updates_of(2, (2, 1, 2))
    assert any(rank.cuts_inside_a_row() for rank in ranks), "choose another bucket size"
    places = [[(name, start) for name, (start, _) in r.shards.items()] for r in ranks]
    assert places != [[(name, start) for name, (start, _) in r.shards.items()] for r in unbucketed]
    assert_same_updates(ways, ranks, 2, stages=1)
