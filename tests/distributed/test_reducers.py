"""Means over real ranks: right, the same bits everywhere, blind to weight 0, honestly counted."""

import math
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muloco.comm.consistency import check_equal, digests
from megatron_muloco.comm.reducers import ReplicaSum, build_plain_reducer_for
from megatron_muloco.errors import SyncError
from megatron_muloco.outer.reducer import Reducer
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_close, assert_equal, integer_tensor

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "deterministic": {"deterministic": True},
    "bf16": {"wire_dtype": "bf16"},
}
# Nothing, one element, fewer than K, not divisible by K, several tensors with an empty one.
SIZES: dict[str, dict[str, int]] = {
    "none": {},
    "empty": {"a": 0},
    "one": {"a": 1},
    "three": {"a": 3},
    "many": {"a": 7, "b": 0, "c": 30, "d": 1},
}


def everyone() -> Any:
    return dist.group.WORLD


def reduce_once(
    reducer: Reducer, tensors: dict[str, Tensor], weight: float, metadata: Tensor
) -> tuple[dict[str, Tensor], list[float], list[list[float]], int]:
    reduced = reducer.wait(reducer.launch(0, tensors, weight, metadata, round_index=1))
    own = {name: tensor.clone() for name, tensor in reduced.mean.items()}
    stats = reduced.stats
    return own, stats.weights.tolist(), stats.metadata.tolist(), stats.wire_bytes


def reduce_integers(kind: str, weights: list[float]) -> list[Any]:
    """Every size, with integers that sum exactly; a replica of weight 0 sends NaN."""
    rank = dist.get_rank()
    reducer = build_plain_reducer_for(everyone(), CPU, **KINDS[kind])
    results = []
    for sizes in SIZES.values():
        tensors = {name: integer_tensor(n, seed=rank * 7 + n) for name, n in sizes.items()}
        if not weights[rank]:
            tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}
        metadata = torch.tensor([float(rank), math.nan if rank == 1 else 0.5])
        results.append(reduce_once(reducer, tensors, weights[rank], metadata))
        in_place = reducer.memory(sizes, len(metadata))
        for name, tensor in tensors.items():
            in_place[name].copy_(tensor)
        again, *_ = reduce_once(reducer, in_place, weights[rank], metadata)
        reducer.memory(sizes, len(metadata))  # not used: the next launch has memory of its own
        third, *_ = reduce_once(reducer, tensors, weights[rank], metadata)
        for name, mean in results[-1][0].items():
            assert_equal(again[name], mean, f"in the reducer's memory, {name}")
            assert_equal(third[name], mean, f"beside the reducer's memory, {name}")
    return results


def test_an_all_reduce_is_made_in_the_memory_that_it_gave() -> None:
    reducer = build_plain_reducer_for(None, CPU)
    tensors = reducer.memory({"a": 3, "b": 2}, 1)
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.fill_(3.0)
    reduced = reducer.wait(reducer.launch(0, tensors, 1.0, torch.zeros(1), round_index=1))
    assert {name: mean.data_ptr() for name, mean in reduced.mean.items()} == places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0]], ids=str
)
def test_the_mean_is_exact_on_integers(kind: str, weights: list[float]) -> None:
    by_rank = run_ranks(reduce_integers, len(weights), kind, weights)
    members = [rank for rank, weight in enumerate(weights) if weight]
    for case, sizes in enumerate(SIZES.values()):
        for rank, results in enumerate(by_rank):
            mean, seen_weights, metadata, _ = results[case]
            assert list(mean) == list(sizes)
            for name, n in sizes.items():
                terms = [integer_tensor(n, seed=member * 7 + n) for member in members]
                total = torch.stack(terms).sum(0) if terms else torch.zeros(n)
                assert_equal(mean[name], total / max(1, len(terms)), f"{name} on rank {rank}")
            assert seen_weights == weights
            assert [row[0] for row in metadata] == list(range(len(weights)))
            assert math.isnan(metadata[1][1])
            assert metadata[0][1] == 0.5


def reduce_normals(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    tensors = {"a": torch.randn(1001, generator=generator)}
    reducer = build_plain_reducer_for(everyone(), CPU, **KINDS[kind])
    return reduce_once(reducer, tensors, 1.0, torch.zeros(1))[0]["a"]


@pytest.mark.parametrize("world_size", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_all_replicas_hold_the_same_bits(kind: str, world_size: int) -> None:
    first, *others = run_ranks(reduce_normals, world_size, kind)
    for other in others:
        assert_equal(other, first)
    values = [
        torch.randn(1001, generator=torch.Generator().manual_seed(rank))
        for rank in range(world_size)
    ]
    exact = torch.stack(values).double().mean(0).float()
    # fp32: one rounding (6e-8) a term of sums below 16. bf16 (2**-9 relative): each term once,
    # below 4, and the mean once more.
    bound = 2 * 4 * 2**-9 if kind == "bf16" else world_size * 16 * 6e-8
    assert_close(first, exact, rtol=0.0, atol=bound)


def reduce_equal_values() -> bool:
    values = torch.randn(500, generator=torch.Generator().manual_seed(5))
    reducer = build_plain_reducer_for(everyone(), CPU, deterministic=True)
    mean = reduce_once(reducer, {"a": values}, 1.0, torch.zeros(1))[0]["a"]
    return torch.equal(mean, values)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_equal_replicas_have_themselves_as_mean(world_size: int) -> None:
    assert all(run_ranks(reduce_equal_values, world_size))


def overlap_fragments(kind: str) -> list[Tensor]:
    """Three fragments in flight at once, over several rounds, through one set of buffers."""
    rank = dist.get_rank()
    reducer = build_plain_reducer_for(everyone(), CPU, **KINDS[kind])
    results = []
    for round_index in (1, 2, 3):
        handles = [
            reducer.launch(
                i,
                {"x": integer_tensor(n, seed=100 * round_index + 10 * i + rank)},
                1.0,
                torch.zeros(1),
                round_index=round_index,
            )
            for i, n in enumerate((5, 40, 12))
        ]
        results += [reducer.wait(handle).mean["x"].clone() for handle in handles]
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_fragments_in_flight_do_not_share_memory(kind: str) -> None:
    for results in run_ranks(overlap_fragments, 2, kind):
        expected = [
            sum(integer_tensor(n, seed=100 * r + 10 * i + rank) for rank in (0, 1)) / 2
            for r in (1, 2, 3)
            for i, n in enumerate((5, 40, 12))
        ]
        for index, (mean, wanted) in enumerate(zip(results, expected, strict=True)):
            # Halves of integers up to 8 are exact in bf16 as well.
            assert_equal(mean, wanted, f"result {index}")


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_what_the_convention_says(kind: str) -> None:
    (*_, wire_bytes) = run_ranks(reduce_integers, 4, kind, [1.0] * 4)[0][-1]
    # 38 elements and rows of 3 numbers (weight, two metadata).
    assert (
        wire_bytes
        == {
            "fp32": 2 * 3 * 13 * 4,  # 38 + 4 * 3 = 50 elements, padded to 52: 13 for each of four
            "deterministic": 3 * (3 * 4 + 10 * 4) + 3 * 10 * 4,  # row and chunk out, chunk out
            "bf16": 3 * (3 * 4 + 10 * 2) + 3 * 10 * 2,
        }[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_single_replica_needs_no_group(kind: str, weight: float) -> None:
    reducer = build_plain_reducer_for(None, CPU, **KINDS[kind])
    for sizes in SIZES.values():
        tensors = {name: integer_tensor(n, seed=n) for name, n in sizes.items()}
        mean, weights, _, wire_bytes = reduce_once(reducer, tensors, weight, torch.zeros(1))
        for name, tensor in tensors.items():
            assert_equal(mean[name], tensor if weight else torch.zeros_like(tensor), name)
        assert (weights, wire_bytes) == ([weight], 0)


@pytest.mark.parametrize("weight", [-0.5, 1.5, math.nan])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    reducer = build_plain_reducer_for(None, CPU)
    with pytest.raises(AssertionError):
        reducer.launch(0, {"a": torch.ones(4)}, weight, torch.zeros(1), round_index=1)


def miss_a_peer(kind: str) -> str:
    """Rank 1 does not come to the second reduction."""
    pair = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    reducer = build_plain_reducer_for(pair, CPU, **KINDS[kind])
    reduce_once(reducer, {"a": torch.ones(8)}, 1.0, torch.zeros(1))
    message = ""
    if dist.get_rank() == 0:
        try:
            reducer.wait(
                reducer.launch(3, {"a": torch.ones(8)}, 1.0, torch.zeros(1), round_index=7)
            )
        except SyncError as error:
            message = str(error)
    dist.barrier()
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_peer_is_an_error_that_names_the_place(kind: str) -> None:
    message, _ = run_ranks(miss_a_peer, 2, kind)
    assert "round 7: the apply of fragment 3 failed on rank 0 of outer group [0, 1]" in message


def sum_in_replica() -> list[float]:
    rank = float(dist.get_rank())
    own = torch.tensor([1.0, rank], dtype=torch.float64)
    total = ReplicaSum(everyone())(own)
    assert own.tolist() == [1.0, rank]
    return total.tolist()


def test_replica_sums_leave_their_input() -> None:
    assert run_ranks(sum_in_replica, 3) == [[3.0, 3.0]] * 3


def compare_digests(odd_rank: int | None) -> str:
    tensors = {
        "b": torch.arange(5.0),
        "a": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0),
    }
    if dist.get_rank() == odd_rank:
        tensors["b"][0] = -0.0  # equal as a number, another bit pattern
    try:
        check_equal(tensors, everyone(), CPU, what="the anchor", round_index=4)
    except SyncError as error:
        return str(error)
    return ""


def test_equal_bits_pass() -> None:
    assert run_ranks(compare_digests, 2, None) == [""] * 2


def test_one_different_bit_is_named_on_every_rank() -> None:
    messages = run_ranks(compare_digests, 3, 1)
    assert len(set(messages)) == 1
    assert "round 4: the anchor of b differs" in messages[0]
    assert "ranks [0, 2] against [1]" in messages[0]


def test_digests_see_every_bit_and_no_order() -> None:
    one = digests({"a": torch.zeros(3), "b": torch.ones(2)})
    assert_equal(one, digests({"b": torch.ones(2), "a": torch.zeros(3)}))
    assert not torch.equal(one, digests({"a": torch.tensor([0.0, -0.0, 0.0]), "b": torch.ones(2)}))
