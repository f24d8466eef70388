"""Host and device wires carry the same bits; uneven, empty, and alone."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muloco.comm.collectives import DeviceWire, HostWire, Wire
from megatron_muloco.comm.reducers import build_plain_reducer_for
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal

CPU = torch.device("cpu")


def wires(group: Any) -> tuple[Wire, Wire]:
    return DeviceWire(group), HostWire(group, CPU)


def splits_of(rank: int, size: int) -> list[int]:
    """Elements that a rank sends to each other one; some nothing."""
    return [(rank + to) % 3 for to in range(size)]


def collectives(through_host: bool) -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    wire = wires(dist.group.WORLD)[through_host]
    total = torch.arange(5.0) + rank
    wire.all_reduce(total).wait()
    sent = torch.arange(sum(splits_of(rank, size)), dtype=torch.uint8) + 10 * rank
    receive_splits = [splits_of(other, size)[rank] for other in range(size)]
    received = torch.empty(sum(receive_splits), dtype=torch.uint8)
    # Two under way at once: the second does not get the memory of the first.
    gathered = torch.empty(size * 3)
    pending = wire.all_gather(gathered, torch.full((3,), float(rank)))
    wire.all_to_all(
        received, sent, receive_splits=receive_splits, send_splits=splits_of(rank, size)
    ).wait()
    pending.wait()
    nothing = torch.empty(0)
    wire.all_gather(nothing, torch.empty(0)).wait()
    return [total, received, gathered, nothing]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_wires_carry_the_same(size: int) -> None:
    device, host = (run_ranks(collectives, size, through_host) for through_host in (False, True))
    for rank in range(size):
        for one, other in zip(device[rank], host[rank], strict=True):
            assert_equal(one, other)
        total, received, gathered, _ = device[rank]
        assert_equal(total, size * torch.arange(5.0) + sum(range(size)))
        assert_equal(gathered, torch.arange(float(size)).repeat_interleave(3))
        expected = [
            10 * other + sum(splits_of(other, size)[:rank]) + index
            for other in range(size)
            for index in range(splits_of(other, size)[rank])
        ]
        assert received.tolist() == expected


def test_alone_nothing_is_sent() -> None:
    for wire in wires(None):
        sent, received = torch.arange(4.0), torch.empty(4)
        wire.all_to_all(received, sent, receive_splits=[4], send_splits=[4]).wait()
        assert_equal(received, sent)


def weighted(deterministic: bool, through_host: bool) -> tuple[Tensor, list[float]]:
    rank = dist.get_rank()
    reducer = build_plain_reducer_for(
        dist.group.WORLD, CPU, deterministic=deterministic, through_host=through_host
    )
    tensors = {"a": torch.tensor([8.0, -16.0]) * (rank + 1)}
    weight = (1.0, 0.5, 0.25)[rank]
    reduced = reducer.wait(reducer.launch(0, tensors, weight, torch.zeros(0), round_index=1))
    return reduced.mean["a"].clone(), reduced.stats.weights.tolist()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("through_host", [True, False])
def test_weights_may_be_parts(deterministic: bool, through_host: bool) -> None:
    # (1 * 8 + 0.5 * 16 + 0.25 * 24) / 1.75 = 22 / 1.75, one rounding; sums and products are exact.
    expected = torch.tensor([22.0, -44.0]) / 1.75
    for mean, weights in run_ranks(weighted, 3, deterministic, through_host):
        assert_equal(mean, expected)
        assert weights == [1.0, 0.5, 0.25]
