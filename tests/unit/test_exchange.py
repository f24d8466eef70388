"""The exchange: shards become whole matrices at their owners and come back, for any cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.assignment import assign
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.segments import RankShards, check_coverage, plan_paths
from megatron_muloco.optim.units import LayerShape, Unit, split
from megatron_muloco.shards import ParamInfo
from tests.support.scattered import (
    VECTOR,
    Mailbox,
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
) -> tuple[list[ParamInfo], list[Unit], list[RankShards], list[int]]:
    tensor_size = draw(st.sampled_from([1, 2, 3]))
    groups = tensor_size * draw(st.integers(1, 2))
    layer = LayerShape(
        groups * draw(st.integers(1, 3)),
        groups,
        draw(st.integers(1, 3)),
        tensor_size * draw(st.integers(1, 5)),
    )
    params = matrix_params(layer, draw(st.integers(1, 7)), tensor_size)
    units = [u for p in params for u in split(p, layer, tensor_size=tensor_size)]
    dp = draw(st.integers(1, 4))
    fractions = st.lists(st.floats(0, 1), min_size=dp - 1, max_size=dp - 1)
    cuts = [draw(fractions) for _ in range(tensor_size)]
    layout = cut([norm_param(), *params], tensor_size, cuts)
    owners = [draw(st.integers(0, len(layout) - 1)) for _ in units]
    return params, units, layout, owners


@given(scattered_layers())
def test_owners_see_whole_matrices_and_shards_come_back(
    case: tuple[list[ParamInfo], list[Unit], list[RankShards], list[int]],
) -> None:
    params, units, layout, owners = case
    pieces = {
        (param.name, t): integer_tensor(*param.local_shape, seed=17 * i + t, low=-999, high=999)
        for i, param in enumerate(params)
        for t in range(units[0].tensor_size)
    }
    mailbox = Mailbox(len(layout))

    def one_rank(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], ShardExchange]:
        exchange = ShardExchange(
            units, owners, layout, rank=rank, transport=mailbox.transport(rank)
        )
        matrices = exchange.collect(shards_of(pieces, layout[rank]))
        return matrices, exchange.return_({n: 2 * m for n, m in matrices.items()}), exchange

    results = mailbox.run(one_rank, len(layout))
    collected = {name: matrix for matrices, _, _ in results for name, matrix in matrices.items()}
    assert sum(len(matrices) for matrices, _, _ in results) == len(units) == len(collected)
    for unit, owner in zip(units, owners, strict=True):
        assert unit.name in results[owner][0]
        assert_equal(collected[unit.name], whole(unit, pieces), unit.name)
    for rank, (_, returned, exchange) in enumerate(results):
        expected = shards_of(pieces, layout[rank])
        assert sorted(returned) == sorted(expected)
        for name, shard in expected.items():
            assert_equal(returned[name], 2 * shard, name)
        assert exchange.bytes_sent == exchange.planned_bytes


@given(scattered_layers())
def test_what_is_sent_is_what_is_received(
    case: tuple[list[ParamInfo], list[Unit], list[RankShards], list[int]],
) -> None:
    _, units, layout, owners = case
    paths = [plan_paths(units, owners, layout, rank) for rank in range(len(layout))]
    for sender, sent in enumerate(paths):
        for receiver, received in enumerate(paths):
            assert sent.shard_splits[receiver] == received.owner_splits[sender]
    assert sum(sum(p.shard_splits) for p in paths) == sum(unit.numel for unit in units)


def tiny_case() -> tuple[list[Unit], list[RankShards]]:
    layer = LayerShape(2, 2, 1, 2)
    params = matrix_params(layer, 2, 1)
    units = [u for p in params for u in split(p, layer, tensor_size=1)]
    return units, cut_evenly([norm_param(), *params], 1, 2)


def test_bytes_are_those_that_leave_a_rank() -> None:
    units, layout = tiny_case()
    owners = [0] * len(units)  # rank 1 sends all it holds, and gets all of it back from rank 0
    held = sum(end - start for name, (start, end) in layout[1].ranges.items() if name != VECTOR)
    exchanges = [
        ShardExchange(
            units, owners, layout, rank=r, transport=lambda *a, **k: None, wire_dtype=torch.bfloat16
        )
        for r in (0, 1)
    ]
    assert [exchange.planned_bytes for exchange in exchanges] == [2 * held, 2 * held]


def test_a_group_of_one_rank_needs_no_transport_but_rounds_like_the_others() -> None:
    layer = LayerShape(2, 1, 3, 4)
    params = matrix_params(layer, 5, 1)
    units = [u for p in params for u in split(p, layer, tensor_size=1)]
    layout = [RankShards(0, {p.name: (0, p.numel) for p in params})]
    exchange = ShardExchange(
        units, [0] * len(units), layout, rank=0, transport=None, wire_dtype=torch.bfloat16
    )
    shards = {p.name: torch.randn(p.numel) for p in params}
    returned = exchange.return_(exchange.collect(shards))
    for name, shard in shards.items():
        assert_equal(returned[name], shard.bfloat16().float())
    assert exchange.bytes_sent == exchange.planned_bytes == 0


def test_a_later_call_does_not_change_earlier_results() -> None:
    layer = LayerShape(1, 1, 2, 2)
    params = matrix_params(layer, 3, 1)
    units = [u for p in params for u in split(p, layer, tensor_size=1)]
    layout = [RankShards(0, {p.name: (0, p.numel) for p in params})]
    exchange = ShardExchange(units, [0] * len(units), layout, rank=0, transport=None)
    first = exchange.collect({p.name: torch.ones(p.numel) for p in params})
    exchange.collect({p.name: torch.zeros(p.numel) for p in params})
    assert all(torch.equal(m, torch.ones_like(m)) for m in first.values())


def test_elements_held_by_nobody_or_twice_are_refused() -> None:
    units, layout = tiny_case()
    with pytest.raises(RuntimeMismatch, match="is held by no rank"):
        check_coverage(units, layout[:1])
    with pytest.raises(RuntimeMismatch, match="is held twice"):
        check_coverage(units, [*layout, layout[1]])
    halved = replace(layout[1], ranges=dict(list(layout[1].ranges.items())[1:]))
    with pytest.raises(RuntimeMismatch, match="is held by no rank"):
        ShardExchange(
            units,
            [0] * len(units),
            [layout[0], halved],
            rank=0,
            transport=lambda *args, **kwargs: None,
        )


def test_an_exchange_of_only_some_units_of_a_parameter_is_refused() -> None:
    units, layout = tiny_case()
    without_k = [unit for unit in units if unit.kind != "k"]
    with pytest.raises(RuntimeMismatch, match=r"only part of the shards of .*linear_qkv"):
        ShardExchange(
            without_k,
            [0] * len(without_k),
            layout,
            rank=0,
            transport=lambda *args, **kwargs: None,
        )


def test_tensors_that_were_not_planned_are_refused() -> None:
    units, layout = tiny_case()
    owners = assign(units, 2).owners
    exchange = ShardExchange(units, owners, layout, rank=0, transport=lambda *a, **k: None)
    with pytest.raises(RuntimeMismatch, match=r"unknown \['other'\]"):
        exchange.collect({"other": torch.zeros(1)})
    with pytest.raises(RuntimeMismatch, match="planned were"):
        exchange.collect({name: torch.zeros(1) for name in exchange.shard_names})
    with pytest.raises(RuntimeMismatch, match="missing"):
        exchange.return_({})
    with pytest.raises(RuntimeMismatch, match="needs an all-to-all"):
        ShardExchange(units, owners, layout, rank=0, transport=None)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        ShardExchange(
            units,
            owners,
            layout,
            rank=0,
            transport=lambda *a, **k: None,
            wire_dtype=torch.float16,
        )
