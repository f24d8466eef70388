"""Encoded means over real ranks: bitwise the reference, equal everywhere, honestly counted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muloco.comm.chunks import (
    chunk_pieces,
    encoded_wire_bytes,
    payload_sizes,
)
from megatron_muloco.comm.digests import check_equal
from megatron_muloco.comm.quantised import EncodedMean
from megatron_muloco.comm.reducers import mean_reducer
from megatron_muloco.compress.codec import Codec, Uncoded
from megatron_muloco.compress.float4 import E3M0
from megatron_muloco.compress.linear import Linear
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.compress.topk import TopK
from megatron_muloco.compress.units import CodingUnit, Grouping
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from tests.support.replicas import Replica, synchronizer_of
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal

CPU = torch.device("cpu")
# Lengths that no K divides: chunks end inside tensors.
SIZES = {"a": 301, "b": 40, "c": 131, "d": 1}
ROW_WIDTH = 20
ONE = [["a", "b", "c", "d"]]
THREE = [["a"], ["b", "d"], ["c"]]
CODECS: dict[str, Codec] = {
    "linear 4 tensor": Linear(4, Grouping()),
    "linear 8 block": Linear(8, Grouping("block", 32)),
    "linear 1 tensor": Linear(1, Grouping()),
    "statistical 2 tensor": Statistical(2, Grouping()),
    "statistical 4 block": Statistical(4, Grouping("block", 64)),
    "e3m0": E3M0(Grouping("block", 50)),
    "top-k": TopK(0.1, "bf16", 64),
    "uncoded": Uncoded(),
}
# codec, fragments, overlap, error feedback, what changes
CASES: list[tuple[str, list[list[str]], int, bool, dict[str, Any]]] = [
    ("linear 4 tensor", ONE, 0, True, {}),
    ("linear 8 block", THREE, 1, True, {"mixing_weight": 0.5}),
    ("linear 1 tensor", ONE, 5, True, {"mixing_weight": 0.5}),
    ("statistical 2 tensor", ONE, 0, True, {"error_decay": 1.0}),
    ("statistical 2 tensor", THREE, 1, True, {"additive": True}),
    ("statistical 2 tensor", ONE, 0, False, {}),
    ("statistical 4 block", THREE, 0, True, {}),
    ("e3m0", ONE, 5, True, {"additive": True}),
    ("top-k", THREE, 1, True, {}),
    ("uncoded", ONE, 1, True, {}),
]


def normal(size: int, *seed: int) -> Tensor:
    number = sum(part * 1009**place for place, part in enumerate(seed))
    return torch.randn(size, generator=torch.Generator().manual_seed(number))


def start() -> Parameters:
    return {name: normal(size, size) for name, size in SIZES.items()}


def inner(replica: int) -> Any:
    def step(local: Parameters, t: int) -> None:
        for name, tensor in local.items():
            tensor.sub_(0.1 * normal(tensor.numel(), replica, t, ord(name)))

    return step


def settings_of(case: int, num_replicas: int) -> Settings:
    name, fragments, overlap, feedback, changes = CASES[case]
    codec = CODECS[name]

    def round_trip(tensor: str, start: int, values: Tensor) -> Tensor:
        unit, out = CodingUnit(values.numel()), torch.empty_like(values)
        codec.decode(codec.encode(values, unit), unit, out)
        return out

    base = Settings(
        sync_interval=6,
        train_iters=20,
        fragments=fragments,
        overlap_steps=overlap,
        outer_lr=0.7,
        outer_momentum=0.9,
        codec=round_trip,
        error_feedback=feedback,
        coding_units=coding_units(fragments, num_replicas),
    )
    return replace(base, **changes)


def coding_units(
    fragments: Sequence[Sequence[str]], num_replicas: int
) -> Mapping[str, Sequence[tuple[int, int]]]:
    units: dict[str, list[tuple[int, int]]] = {}
    for names in fragments:
        for pieces in chunk_pieces([(name, SIZES[name]) for name in names], num_replicas, {}):
            for piece in pieces:
                units.setdefault(piece.name, []).append((piece.start, piece.end))
    return units


def train(cases: range) -> list[tuple[Parameters, Parameters, Parameters]]:
    """One rank a replica, through the whole run of each case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    results = []
    for case in cases:
        s, codec = settings_of(case, size), CODECS[CASES[case][0]]
        replica = Replica(start())
        decay = s.error_decay if s.error_feedback else None
        reducer = EncodedMean(group, CPU, lambda name, codec=codec: codec, {}, decay)
        synchronizer = synchronizer_of(replica.port(), s, reducer, size, mean_reducer(group, CPU))
        for t in range(1, s.train_iters + 1):
            inner(rank)(replica.parameters, t)
            if synchronizer.after_inner_step(t) is not None:
                check_equal(synchronizer.anchors(), group, CPU, what="the anchor", round_index=t)
        residual = reducer.residual.state_dict() if reducer.residual else {}
        results.append((dict(synchronizer.anchors()), replica.parameters, residual))
    return results


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_a_spawned_run_is_the_reference(num_replicas: int) -> None:
    by_rank = run_ranks(train, num_replicas, range(len(CASES)))
    for case, description in enumerate(CASES):
        s = settings_of(case, num_replicas)
        reference = Reference(start(), [inner(k) for k in range(num_replicas)], s)
        for t in range(1, s.train_iters + 1):
            reference.step(t)
        for k, results in enumerate(by_rank):
            anchor, local, residual = results[case]
            for name in SIZES:
                message = f"{description}, replica {k}, {name}"
                assert_equal(anchor[name], reference.anchor[name], f"anchor: {message}")
                assert_equal(local[name], reference.local[k][name], f"local: {message}")
                if s.error_feedback:
                    assert_equal(residual[name], reference.residual[k][name], f"e: {message}")


def reduce_with_rows() -> Parameters:
    codec = Linear(4, Grouping("row"))
    rows = dict.fromkeys(SIZES, (ROW_WIDTH, 7))  # shards begin inside a row
    reducer = EncodedMean(dist.group.WORLD, CPU, lambda name: codec, rows, None)
    tensors = {name: normal(size, dist.get_rank()) for name, size in SIZES.items()}
    reduced = reducer.wait(reducer.launch(0, tensors, 1.0, torch.zeros(0), round_index=1))
    return dict(reduced.mean)


def test_rows_of_the_tensor_share_a_scale_also_in_pieces() -> None:
    """The smallest and largest value of a row of one chunk are exact, twice, for equal replicas."""
    first, second = run_ranks(reduce_with_rows, 2)
    values = [{name: normal(size, rank) for name, size in SIZES.items()} for rank in range(2)]
    for pieces in chunk_pieces(list(SIZES.items()), 2, dict.fromkeys(SIZES, (ROW_WIDTH, 7))):
        for piece in pieces:
            assert_equal(first[piece.name], second[piece.name])
            for row in range(-1, piece.end // ROW_WIDTH + 1):
                begin = max(piece.start, row * ROW_WIDTH + ROW_WIDTH - 7)
                end = min(piece.end, (row + 1) * ROW_WIDTH + ROW_WIDTH - 7)
                if begin >= end:
                    continue
                members = torch.stack([each[piece.name][begin:end] for each in values])
                error = first[piece.name][begin:end] - members.mean(0)
                # Half a step of either replica's row on average, half a step of their mean's row.
                ranges = members.amax(1) - members.amin(1)
                assert error.abs().max() <= float(ranges.mean()) / 15 * (1 + 1 / 15) + 1e-5


def reduce_unevenly(weights: list[float], sizes: dict[str, int]) -> Any:
    rank = dist.get_rank()
    codec = Statistical(2, Grouping())
    reducer = EncodedMean(dist.group.WORLD, CPU, lambda name: codec, {}, 0.9)
    tensors = {name: normal(size, rank) for name, size in sizes.items()}
    if not weights[rank]:
        tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}
    riders = torch.tensor([float(rank), 0.5])
    reduced = reducer.wait(reducer.launch(0, tensors, weights[rank], riders, round_index=1))
    assert reducer.owner_residual is not None
    own = sum(residual.numel() for residual in reducer.owner_residual.state_dict().values())
    stats = reduced.stats
    return dict(reduced.mean), stats.weights.tolist(), stats.riders.tolist(), stats.wire_bytes, own


@pytest.mark.parametrize("sizes", [{}, {"a": 0}, {"a": 1}, {"a": 5, "b": 0, "c": 200}], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 1.0], [0.0, 0.0]], ids=str)
def test_shapes_weights_and_bytes(weights: list[float], sizes: dict[str, int]) -> None:
    by_rank = run_ranks(reduce_unevenly, len(weights), weights, sizes)
    chunks = chunk_pieces(list(sizes.items()), len(weights), {})
    payloads = payload_sizes(chunks, lambda name: Statistical(2, Grouping()))
    for rank, (mean, seen, riders, wire_bytes, own) in enumerate(by_rank):
        assert seen == weights
        assert riders == [[float(k), 0.5] for k in range(len(weights))]
        assert wire_bytes == encoded_wire_bytes(payloads, rank, 2)
        assert own == (sum(p.unit.numel for p in chunks[rank]) if any(weights) else 0)
        for name, size in sizes.items():
            assert mean[name].shape == (size,)
            assert mean[name].isfinite().all()
            assert_equal(mean[name], by_rank[0][0][name])
            if not any(weights):
                assert not mean[name].any()


@pytest.mark.parametrize("chunk_count", [1, 2, 3, 4, 7])
def test_pieces_partition_the_fragment(chunk_count: int) -> None:
    sizes = [*SIZES.items(), ("e", 0)]
    chunks = chunk_pieces(sizes, chunk_count, {"a": (ROW_WIDTH, 7)})
    covered = {name: [0] * size for name, size in sizes}
    for pieces in chunks:
        for piece in pieces:
            for i in range(piece.start, piece.end):
                covered[piece.name][i] += 1
            if piece.name == "a":
                assert piece.unit.row_offset == (7 + piece.start) % ROW_WIDTH
    assert all(count == [1] * len(count) for count in covered.values())
    assert max(sum(p.unit.numel for p in pieces) for pieces in chunks) == math.ceil(
        sum(SIZES.values()) / chunk_count
    )


def test_one_replica_encodes_twice_and_sends_nothing() -> None:
    codec, values = Statistical(2, Grouping()), normal(100, 1)
    reducer = EncodedMean(None, CPU, lambda name: codec, {}, None)
    reduced = reducer.wait(reducer.launch(0, {"a": values}, 1.0, torch.ones(3), round_index=1))
    unit, once, twice = CodingUnit(100), torch.empty(100), torch.empty(100)
    codec.decode(codec.encode(values, unit), unit, once)
    codec.decode(codec.encode(once, unit), unit, twice)
    assert_equal(reduced.mean["a"], twice)
    assert reduced.stats.riders.tolist() == [[1.0, 1.0, 1.0]]
    assert reduced.stats.wire_bytes == 0


def leave_out_the_last() -> tuple[Parameters, Parameters]:
    codec = CODECS["linear 4 tensor"]
    reducer = EncodedMean(dist.group.WORLD, CPU, lambda name: codec, {}, 0.9)
    values = normal(100, dist.get_rank())
    for round_index in (1, 2):
        weight = float(dist.get_rank() < dist.get_world_size() - 1)
        handle = reducer.launch(0, {"a": values}, weight, torch.zeros(0), round_index=round_index)
        reduced = reducer.wait(handle)
    assert reducer.residual is not None
    return dict(reduced.mean), reducer.residual.state_dict()


def test_a_replica_left_out_keeps_what_its_code_lost() -> None:
    count = 3
    settings = Settings(
        sync_interval=1,
        train_iters=2,
        fragments=[["a"]],
        codec=settings_of(0, count).codec,
        error_feedback=True,
        coding_units={"a": [(0, 34), (34, 68), (68, 100)]},
    )

    def by(replica: int) -> Any:
        """The local parameters are the anchor less the same pseudogradient, every round."""

        def step(local: Parameters, t: int) -> None:
            local["a"].copy_(-normal(100, replica))

        return step

    reference = Reference(
        {"a": torch.zeros(100)},
        [by(k) for k in range(count)],
        settings,
        weigh=lambda k, fragment, t, delta: float(k < count - 1),
    )
    for t in (1, 2):
        before = reference.anchor["a"].zero_().clone()
        reference.step(t)
    for replica, (mean, residual) in enumerate(run_ranks(leave_out_the_last, count)):
        assert_equal(mean["a"], before - reference.anchor["a"], "mean")
        assert_equal(residual["a"], reference.residual[replica]["a"], f"e of replica {replica}")


def test_forgetting_keeps_the_owners_residual() -> None:
    codec = Linear(1, Grouping())
    reducer = EncodedMean(None, CPU, lambda name: codec, {}, 0.9)
    tensors = {"a": normal(100, 1)}
    reducer.wait(reducer.launch(0, tensors, 1.0, torch.zeros(0), round_index=1))
    assert reducer.residual is not None
    assert reducer.owner_residual is not None
    assert reducer.residual.state_dict()["a"].any()
    reducer.owner_residual.load_state_dict({"a": torch.ones(100)})
    reducer.forget_residual()
    assert not reducer.residual.state_dict()["a"].any()
    assert reducer.owner_residual.state_dict()["a"].all()
