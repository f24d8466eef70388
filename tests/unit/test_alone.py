"""A group of one rank: torch knows it, and every collective is a copy."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _coalescing_manager

from megatron_muloco.comm.alone import AloneGroup, make_alone

RANK = 5


@pytest.fixture
def alone() -> Iterator[AloneGroup]:
    """Yield a group and leave torch's tables as they were; no job is needed for it."""
    world = distributed_c10d._world
    tables = (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config)
    group = make_alone(RANK)
    yield group
    for table in tables:
        del table[group]


def test_torch_knows_its_ranks(alone: AloneGroup) -> None:
    assert (alone.size(), alone.rank()) == (1, 0)
    assert dist.get_process_group_ranks(alone) == [RANK]
    assert dist.get_group_rank(alone, RANK) == 0
    assert dist.get_global_rank(alone, 0) == RANK
    assert dist.get_backend(alone) == "alone"


@pytest.mark.parametrize("op", [dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX])
@pytest.mark.parametrize("async_op", [False, True])
def test_reductions_are_the_identity(alone: AloneGroup, op: Any, async_op: bool) -> None:
    value = torch.randn(7)
    reduced, part = value.clone(), torch.empty(7)
    works = [
        dist.all_reduce(reduced, op=op, group=alone, async_op=async_op),
        dist.reduce_scatter_tensor(part, value, op=op, group=alone, async_op=async_op),
    ]
    for work in works:
        assert (work is not None) == async_op
        if work is not None:
            work.wait()
            assert work.is_completed()
    assert torch.equal(reduced, value)
    assert torch.equal(part, value)


def test_gathers_and_exchanges_are_copies(alone: AloneGroup) -> None:
    value = torch.arange(6.0)
    flat, listed, exchanged = torch.empty(1, 6), [torch.empty(6)], torch.empty(6)
    scattered, swapped = torch.empty(6), [torch.empty(6)]
    dist.all_gather_into_tensor(flat, value, group=alone)
    dist.all_gather(listed, value, group=alone)
    dist.all_to_all_single(exchanged, value, [6], [6], group=alone)
    dist.all_to_all(swapped, [value], group=alone)
    dist.reduce_scatter(scattered, [value], group=alone)
    dist.broadcast(value, src=RANK, group=alone)
    dist.barrier(group=alone)
    for copy in (flat[0], listed[0], exchanged, swapped[0], scattered):
        assert torch.equal(copy, value)


def test_a_buffer_that_is_gathered_in_place_is_kept(alone: AloneGroup) -> None:
    """As Megatron gathers parameters: the source is a view of the result."""
    buffer = torch.arange(8.0)
    dist.all_gather_into_tensor(buffer, buffer[0:8], group=alone)
    assert torch.equal(buffer, torch.arange(8.0))


@pytest.mark.parametrize("kind", ["reduce", "scatter", "gather"])
def test_several_collectives_at_once(alone: AloneGroup, kind: str) -> None:
    """As Megatron sends its gradient buckets."""
    values = [torch.randn(4), torch.randn(9)]
    results = [value.clone() if kind == "reduce" else torch.empty_like(value) for value in values]
    with _coalescing_manager(alone, async_ops=True) as manager:
        for result, value in zip(results, values, strict=True):
            if kind == "reduce":
                dist.all_reduce(result, group=alone)
            elif kind == "scatter":
                dist.reduce_scatter_tensor(result, value, group=alone)
            else:
                dist.all_gather_into_tensor(result, value, group=alone)
    manager.wait()
    assert all(torch.equal(*pair) for pair in zip(results, values, strict=True))


def test_there_is_nobody_to_send_to(alone: AloneGroup) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        dist.send(torch.zeros(1), group=alone, group_dst=0)
