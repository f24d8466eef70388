"""The exchange: shards become whole matrices at their owners and come back, for any cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange, Transform
from megatron_muloco.optim.matrices import LayerShape, MuonMatrix, split
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.optim.routing import RankShards, check_coverage, divide, plan_routes
from megatron_muloco.params import ParamInfo
from tests.support.scattered import (
    VECTOR,
    Mailbox,
    NoTransport,
    cut,
    cut_evenly,
    matrix_params,
    norm_param,
    shards_of,
    whole,
)
from tests.support.tensors import assert_equal, integer_tensor


@st.composite
def scattered_layers(
    draw: st.DrawFn,
) -> tuple[list[ParamInfo], list[MuonMatrix], list[RankShards], list[int]]:
    tensor_size = draw(st.sampled_from([1, 2, 3]))
    groups = tensor_size * draw(st.integers(1, 2))
    layer = LayerShape(
        groups * draw(st.integers(1, 3)),
        groups,
        draw(st.integers(1, 3)),
        tensor_size * draw(st.integers(1, 5)),
    )
    params = matrix_params(layer, draw(st.integers(1, 7)), tensor_size)
    matrices = [u for p in params for u in split(p, layer, tensor_size=tensor_size)]
    dp = draw(st.integers(1, 4))
    fractions = st.lists(st.floats(0, 1), min_size=dp - 1, max_size=dp - 1)
    cuts = [draw(fractions) for _ in range(tensor_size)]
    layout = cut([norm_param(), *params], tensor_size, cuts)
    owners = [draw(st.integers(0, len(layout) - 1)) for _ in matrices]
    return params, matrices, layout, owners


Seen = dict[str, Tensor]


def doubling(seen: Seen) -> Transform:
    """Return a transform that notes the matrices it is given and doubles them."""

    def double(matrices: tuple[MuonMatrix, ...], stacked: Tensor) -> Tensor:
        seen.update({u.name: m.clone() for u, m in zip(matrices, stacked, strict=True)})
        return 2 * stacked.float()

    return double


@given(scattered_layers(), st.integers(1, 4))
def test_owners_see_whole_matrices_and_shards_come_back(
    case: tuple[list[ParamInfo], list[MuonMatrix], list[RankShards], list[int]], buckets: int
) -> None:
    params, matrices, layout, owners = case
    pieces = {
        (param.name, t): integer_tensor(*param.local_shape, seed=17 * i + t, low=-999, high=999)
        for i, param in enumerate(params)
        for t in range(matrices[0].tensor_size)
    }
    mailbox = Mailbox(len(layout))

    def one_rank(rank: int) -> tuple[Seen, dict[str, Tensor], ShardExchange]:
        exchange = ShardExchange(
            matrices, owners, layout, rank=rank, transport=mailbox.transport(rank), buckets=buckets
        )
        seen: Seen = {}
        returned = exchange.transform(shards_of(pieces, layout[rank]), doubling(seen))
        return seen, returned, exchange

    results = mailbox.run(one_rank, len(layout))
    assert len({exchange.bucket_count for _, _, exchange in results}) == 1
    collected = {name: value for stacked, _, _ in results for name, value in stacked.items()}
    assert sum(len(stacked) for stacked, _, _ in results) == len(matrices) == len(collected)
    for matrix, owner in zip(matrices, owners, strict=True):
        assert matrix.name in results[owner][0]
        assert_equal(collected[matrix.name], whole(matrix, pieces), matrix.name)
    for rank, (_, returned, exchange) in enumerate(results):
        expected = shards_of(pieces, layout[rank])
        assert sorted(returned) == sorted(expected)
        for name, shard in expected.items():
            assert_equal(returned[name], 2 * shard, name)
        assert exchange.bytes_sent == exchange.planned_bytes


@given(scattered_layers())
def test_what_is_sent_is_what_is_received(
    case: tuple[list[ParamInfo], list[MuonMatrix], list[RankShards], list[int]],
) -> None:
    _, matrices, layout, owners = case
    paths = [plan_routes(matrices, owners, layout, rank) for rank in range(len(layout))]
    for sender, sent in enumerate(paths):
        for receiver, received in enumerate(paths):
            assert sent.shard_splits[receiver] == received.owner_splits[sender]
    assert sum(sum(p.shard_splits) for p in paths) == sum(matrix.numel for matrix in matrices)


def tiny_case(ranks: int = 2) -> tuple[list[MuonMatrix], list[RankShards]]:
    layer = LayerShape(2, 2, 1, 2)
    params = matrix_params(layer, 2, 1)
    matrices = [u for p in params for u in split(p, layer, tensor_size=1)]
    return matrices, cut_evenly([norm_param(), *params], 1, ranks)


def test_bytes_are_those_that_leave_a_rank() -> None:
    matrices, layout = tiny_case()
    owners = [0] * len(matrices)  # rank 1 sends all it holds, and gets all of it back from rank 0
    held = sum(end - start for name, (start, end) in layout[1].ranges.items() if name != VECTOR)
    exchanges = [
        ShardExchange(
            matrices, owners, layout, rank=r, transport=NoTransport(), wire_dtype=torch.bfloat16
        )
        for r in (0, 1)
    ]
    assert [exchange.planned_bytes for exchange in exchanges] == [2 * held, 2 * held]


def test_a_group_of_one_rank_needs_no_transport_but_rounds_like_the_others() -> None:
    layer = LayerShape(2, 1, 3, 4)
    params = matrix_params(layer, 5, 1)
    matrices = [u for p in params for u in split(p, layer, tensor_size=1)]
    layout = [RankShards(0, {p.name: (0, p.numel) for p in params})]
    exchange = ShardExchange(
        matrices, [0] * len(matrices), layout, rank=0, transport=None, wire_dtype=torch.bfloat16
    )
    shards = {p.name: torch.randn(p.numel) for p in params}
    returned = exchange.transform(shards, lambda _, stacked: stacked)
    for name, shard in shards.items():
        assert_equal(returned[name], shard.bfloat16().float())
    assert exchange.bytes_sent == exchange.planned_bytes == 0


@given(scattered_layers(), st.integers(1, 5))
def test_buckets_contain_each_matrix_once_and_share_every_owners_work(
    case: tuple[list[ParamInfo], list[MuonMatrix], list[RankShards], list[int]], buckets: int
) -> None:
    _, matrices, layout, owners = case
    divided = divide(matrices, owners, buckets)
    assert len(divided) <= buckets
    assert sorted(index for bucket in divided for index in bucket) == list(range(len(matrices)))
    assert all(bucket and list(bucket) == sorted(bucket) for bucket in divided)
    for owner in range(len(layout)):
        sizes = [
            matrix.numel for matrix, other in zip(matrices, owners, strict=True) if other == owner
        ]
        for bucket in divided:
            share = sum(matrices[index].numel for index in bucket if owners[index] == owner)
            # Cut at the middle of a matrix: at most half of one too many at either end.
            assert share <= sum(sizes) / buckets + max(sizes, default=0)


def test_less_than_one_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one bucket"):
        divide([], [], 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_allocated_once(ranks: int) -> None:
    """Neither buffers nor results move between calls: no allocation is left behind by a step."""
    matrices, layout = tiny_case(ranks)
    owners = assign(matrices, ranks).owners
    mailbox = Mailbox(ranks)

    def one_rank(rank: int) -> list[set[int]]:
        exchange = ShardExchange(
            matrices, owners, layout, rank=rank, transport=mailbox.transport(rank), buckets=3
        )
        seen: list[set[int]] = []
        for _ in range(3):
            shards = {n: torch.ones(b - a) for n, (a, b) in layout[rank].ranges.items()}
            shards.pop(VECTOR, None)
            places: set[int] = set()

            def note(
                _: tuple[MuonMatrix, ...], stacked: Tensor, places: set[int] = places
            ) -> Tensor:
                places.add(stacked.data_ptr())
                return stacked

            returned = exchange.transform(shards, note)
            seen.append(places | {piece.data_ptr() for piece in returned.values()})
        return seen

    for first, *others in mailbox.run(one_rank, ranks):
        assert others == [first, first]


def test_elements_held_by_nobody_or_twice_are_refused() -> None:
    matrices, layout = tiny_case()
    with pytest.raises(RuntimeMismatch, match="is held by no rank"):
        check_coverage(matrices, layout[:1])
    with pytest.raises(RuntimeMismatch, match="is held twice"):
        check_coverage(matrices, [*layout, layout[1]])
    halved = replace(layout[1], ranges=dict(list(layout[1].ranges.items())[1:]))
    with pytest.raises(RuntimeMismatch, match="is held by no rank"):
        ShardExchange(
            matrices,
            [0] * len(matrices),
            [layout[0], halved],
            rank=0,
            transport=NoTransport(),
        )


def test_an_exchange_of_only_some_units_of_a_parameter_is_refused() -> None:
    matrices, layout = tiny_case()
    without_k = [matrix for matrix in matrices if matrix.kind != "k"]
    with pytest.raises(RuntimeMismatch, match=r"only part of the shards of .*linear_qkv"):
        ShardExchange(
            without_k,
            [0] * len(without_k),
            layout,
            rank=0,
            transport=NoTransport(),
        )


def test_tensors_that_were_not_planned_are_refused() -> None:
    matrices, layout = tiny_case()
    owners = assign(matrices, 2).owners
    exchange = ShardExchange(matrices, owners, layout, rank=0, transport=NoTransport())
    with pytest.raises(RuntimeMismatch, match=r"unknown \['other'\]"):
        exchange.transform({"other": torch.zeros(1)}, doubling({}))
    with pytest.raises(RuntimeMismatch, match="planned were"):
        exchange.transform({n: torch.zeros(1) for n in exchange.shard_names}, doubling({}))
    with pytest.raises(RuntimeMismatch, match="needs an all-to-all"):
        ShardExchange(matrices, owners, layout, rank=0, transport=None)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        ShardExchange(
            matrices,
            owners,
            layout,
            rank=0,
            transport=NoTransport(),
            wire_dtype=torch.float16,
        )
