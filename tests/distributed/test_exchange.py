"""The exchange over real ranks: gloo, uneven splits, ranks that hold or own nothing."""

import pytest
import torch
import torch.distributed as dist

from megatron_muloco.comm.collectives import AllToAll
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.matrices import LayerShape, MuonMatrix, split
from megatron_muloco.optim.routing import RankShards
from tests.support.scattered import cut, matrix_params, shards_of, whole
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal, integer_tensor

LAYER = LayerShape(6, 2, 3, 10)
HIDDEN = 5


Seen = dict[str, torch.Tensor]


def negate(exchange: ShardExchange, shards: Seen) -> tuple[Seen, Seen]:
    """Return the matrices that this rank owns, and the pieces of the negated ones."""
    seen: Seen = {}

    def function(matrices: tuple[MuonMatrix, ...], stacked: torch.Tensor) -> torch.Tensor:
        seen.update({u.name: m.float() for u, m in zip(matrices, stacked.clone(), strict=True)})
        return -stacked

    return seen, exchange.transform(shards, function)


def round_trip(
    cuts: list[list[float]], owners: list[int], wire_dtype: torch.dtype, buckets: int
) -> int:
    tensor_size = len(cuts)
    params = matrix_params(LAYER, HIDDEN, tensor_size)
    matrices = [u for p in params for u in split(p, LAYER, tensor_size=tensor_size)]
    layout = cut(params, tensor_size, cuts)
    pieces = {
        (p.name, t): integer_tensor(*p.local_shape, seed=10 * i + t)  # exact in bf16 too
        for i, p in enumerate(params)
        for t in range(tensor_size)
    }
    transport = AllToAll(dist.group.WORLD)
    assert (transport.size, transport.rank) == (dist.get_world_size(), dist.get_rank())
    exchange = ShardExchange(
        matrices,
        owners,
        layout,
        rank=transport.rank,
        transport=transport,
        wire_dtype=wire_dtype,
        buckets=buckets,
    )
    for _ in range(2):
        stacked, returned = negate(exchange, shards_of(pieces, layout[transport.rank]))
        for matrix, owner in zip(matrices, owners, strict=True):
            if owner == transport.rank:
                assert_equal(stacked[matrix.name], whole(matrix, pieces), matrix.name)
        expected = shards_of(pieces, layout[transport.rank])
        assert list(returned) == list(expected)
        for name, shard in expected.items():
            assert_equal(returned[name], -shard, name)
    assert exchange.bytes_sent == 2 * exchange.planned_bytes
    return exchange.bytes_sent


@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("cuts", "owners"),
    [
        ([[0.37], [0.61]], [0, 1, 2, 3, 0, 1, 2]),
        ([[0.37], [0.37]], [3] * 7),
        ([[0.0, 0.5, 0.5]], [1, 2, 1, 2, 1, 2, 1]),
    ],
    ids=["cut-inside-rows", "one-owner", "ranks-without-elements"],
)
def test_matrices_arrive_and_come_back(
    cuts: list[list[float]], owners: list[int], wire_dtype: torch.dtype, buckets: int
) -> None:
    sent = run_ranks(round_trip, 4, cuts, owners, wire_dtype, buckets)
    assert sum(sent) > 0


def sub_group_round_trip() -> None:
    """Two stage groups of two ranks at once, as with pipeline stages or replicas."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    transport = AllToAll(groups[dist.get_rank() % 2])
    assert (transport.size, transport.rank) == (2, dist.get_rank() // 2)
    params = matrix_params(LAYER, HIDDEN, 1)
    matrices = [u for p in params for u in split(p, LAYER, tensor_size=1)]
    layout: list[RankShards] = cut(params, 1, [[0.4]])
    pieces = {(p.name, 0): torch.full(p.local_shape, float(dist.get_rank() % 2)) for p in params}
    exchange = ShardExchange(matrices, [0] * 7, layout, rank=transport.rank, transport=transport)
    stacked, _ = negate(exchange, shards_of(pieces, layout[transport.rank]))
    for value in stacked.values():
        assert_equal(value, torch.full(value.shape, float(dist.get_rank() % 2)))


def test_stage_groups_do_not_mix() -> None:
    run_ranks(sub_group_round_trip, 4)
