"""Encoded means over real ranks: bitwise the reference, equal everywhere, honestly counted."""

import math
import threading
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muloco.comm.background import BackgroundReducer, SteppedReducer
from megatron_muloco.comm.chunking import chunk_pieces, payload_sizes, two_way_bytes
from megatron_muloco.comm.compressed import CompressedAllReduce, build_compressed_reducer_for
from megatron_muloco.comm.reducers import PhasedReducer, build_plain_reducer_for
from megatron_muloco.compress.format import CodingUnit, Grouping
from megatron_muloco.compress.quantizers import Linear
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.config.outer import (
    LinearCompression,
    LossyCompression,
    NesterovOuter,
    NoCompression,
)
from megatron_muloco.outer.guard import Guard
from megatron_muloco.outer.reducer import Reducer
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from megatron_muloco.params import ParamKind
from tests.support.compressed import reference_keys
from tests.support.replicas import Replica, synchronizer_of
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal

CPU = torch.device("cpu")
# Lengths that no K divides: chunks end inside tensors.
SIZES = {"embedding.a": 301, "b": 40, "norm.c": 131, "d": 1}
CLASSES: dict[str, ParamKind | None] = {
    "embedding.a": "embedding",
    "b": None,
    "norm.c": "norm",
    "d": None,
}
ROW_WIDTH = 20
ONE = [list(SIZES)]
THREE = [["embedding.a"], ["b", "d"], ["norm.c"]]
KINDS: list[dict[str, Any]] = [
    *({"kind": kind, "bits": bits} for kind in ("linear", "statistical") for bits in (8, 4, 2, 1)),
    {"kind": "e3m0"},
    {"kind": "topk", "density": 0.1, "block_size": 64},
    {"kind": "topk", "density": 0.2, "block_size": 32, "wire_dtype": "bf16"},
    {"kind": "topk", "density": 0.3, "block_size": 128, "value_bits": 2},
]
GRANULARITIES: list[dict[str, Any]] = [
    {"granularity": "tensor"},
    {"granularity": "row"},
    {"granularity": "block", "block_size": 50},
]
MERGES: list[dict[str, Any]] = [{}, {"mixing_weight": 0.5}, {"additive": True}]
OVERLAPS = (0, 1, 5)
FRAGMENTS = (ONE, THREE, [[name] for name in SIZES])
EXCEPTIONS: list[dict[str, Any]] = [{}, {"norm": "none"}, {"embedding": "none", "norm": "none"}]
ROWS = {"embedding.a": (ROW_WIDTH, 7), "norm.c": (0, 3), "d": (7, 0)}  # shards begin inside rows


@dataclass(frozen=True)
class Case:
    """One run: a code, when it is used, and what carries it."""

    code: LossyCompression
    fragments: list[list[str]]
    overlap: int
    merge: dict[str, Any]
    beside_training: bool
    through_host: bool

    @property
    def settings(self) -> Settings:
        keys = {"overlap_steps": self.overlap, **self.merge}
        return Settings(6, 20, self.fragments, outer_lr=0.7, outer_momentum=0.9, **keys)

    def reference_settings(self, num_replicas: int) -> Settings:
        sizes = [{name: SIZES[name] for name in names} for names in self.fragments]
        return replace(
            self.settings, **reference_keys(self.code, ROWS, CLASSES, sizes, num_replicas)
        )

    def reducer(self) -> Reducer:
        reducer = build_compressed_reducer_for(
            dist.group.WORLD, CPU, self.code, ROWS, CLASSES, through_host=self.through_host
        )
        return BackgroundReducer(reducer, CPU) if self.beside_training else reducer


def cases() -> list[Case]:
    """Every code with every granularity, with and without error feedback.

    When, how merged, exceptions and transport go round with periods that share no factor, so that
    each meets each code.
    """
    codes = [
        kind if kind["kind"] == "topk" else {**kind, **each}
        for kind in KINDS
        for each in (GRANULARITIES[:1] if kind["kind"] == "topk" else GRANULARITIES)
    ]
    found = []
    for number, (code, feedback) in enumerate(product(codes, (True, False))):
        overlap = OVERLAPS[number % 3]
        merges = MERGES if overlap else MERGES[:2]
        keys = {"error_feedback": feedback, "exceptions": EXCEPTIONS[number % 7 % 3]}
        if feedback:
            keys["error_decay"] = (0.9, 1.0, 0.5)[number % 5 % 3]
        found.append(
            Case(
                NesterovOuter(
                    kind="nesterov", lr=0.7, momentum=0.9, compression={**code, **keys}
                ).compression,
                FRAGMENTS[number // 3 % 3],
                overlap,
                merges[number // 9 % len(merges)],
                beside_training=overlap > 0 and number % 4 > 0,
                through_host=number % 5 == 0,
            )
        )
    return found


CASES = cases()


def normal(size: int, *seed: int) -> Tensor:
    number = sum(part * 1009**place for place, part in enumerate(seed))
    return torch.randn(size, generator=torch.Generator().manual_seed(number))


def start() -> Parameters:
    return {name: normal(size, size) for name, size in SIZES.items()}


def inner(replica: int) -> Any:
    def step(local: Parameters, t: int) -> None:
        for name, tensor in local.items():
            tensor.sub_(0.1 * normal(tensor.numel(), replica, t, len(name)))

    return step


def train(numbers: range) -> list[tuple[Parameters, ...]]:
    """One rank a replica, through the whole run of each case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    results = []
    for number in numbers:
        case = CASES[number]
        s = case.settings
        replica = Replica(start())
        plain = build_plain_reducer_for(group, CPU, deterministic=True)
        # No norm band: the norm of a single value may be anything.
        guard = Guard(size, max_norm_ratio=math.inf)
        port, reducer = replica.port(), case.reducer()
        synchronizer = synchronizer_of(port, s, reducer, size, plain, guard=guard)
        anchors = {}
        for t in range(1, s.train_iters + 1):
            inner(rank)(replica.parameters, t)
            if synchronizer.after_inner_step(t) is not None:
                anchors = {name: tensor.clone() for name, tensor in synchronizer.anchors().items()}
        kept = synchronizer.state_dict()["tensors"]
        results.append(
            (anchors, replica.parameters, kept.get("residual", {}), kept.get("owner_residual", {}))
        )
    return results


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
def test_a_spawned_run_is_the_reference(num_replicas: int) -> None:
    """Bit for bit on every rank, hence the same bits on all of them."""
    by_rank = run_ranks(train, num_replicas, range(len(CASES)), timeout_s=240.0)
    for number, case in enumerate(CASES):
        s = case.reference_settings(num_replicas)
        reference = Reference(start(), [inner(k) for k in range(num_replicas)], s)
        for t in range(1, s.train_iters + 1):
            reference.step(t)
        for k, results in enumerate(by_rank):
            anchor, local, _, _ = results[number]
            assert_same(anchor, reference.anchor, f"anchor, replica {k}, {case}")
            assert_same(local, reference.local[k], f"local, replica {k}, {case}")
        reference.flush()  # saving waits for the fragments in flight, and owners encode their mean
        for k, results in enumerate(by_rank):
            _, _, residual, owner_residual = results[number]
            assert bool(residual) == case.code.error_feedback
            assert_same(residual, reference.residual[k], f"e, replica {k}, {case}")
            assert_same(owner_residual, reference.f, f"f, replica {k}, {case}")


# ---- in steps of the main thread ----------------------------------------------------------------

BESIDE: dict[str, dict[str, Any]] = {
    "linear-4": {"kind": "linear", "bits": 4, "error_feedback": True, "error_decay": 0.9},
    "statistical-2": {"kind": "statistical", "bits": 2, "error_feedback": True},
    "top-k": {"kind": "topk", "density": 0.1, "block_size": 64, "error_feedback": True},
    "bf16": {"kind": "none", "wire_dtype": "bf16"},
    "deterministic": {"kind": "none", "deterministic": True},
}
TWO = [["embedding.a", "d"], ["b", "norm.c"]]


class NotedWire:
    """A wire that notes each collective, the thread that starts it, and the inner step."""

    def __init__(self, wire: Any, noted: list[tuple[str, int, int]]) -> None:
        self.wire, self.noted, self.step = wire, noted, 0

    def __getattr__(self, name: str) -> Any:
        def start(*args: Any, **kwargs: Any) -> Any:
            self.noted.append((name, threading.get_ident(), self.step))
            return getattr(self.wire, name)(*args, **kwargs)

        return start


def train_beside(keys: dict[str, Any], overlap: int, way: str) -> tuple[Any, ...]:
    """Anchors, local parameters and residuals at the end, and what was noted of each collective."""
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    code = NesterovOuter(kind="nesterov", lr=0.7, momentum=0.9, compression=keys).compression
    phased: PhasedReducer
    if isinstance(code, NoCompression):
        wire, deterministic = code.wire_dtype, code.deterministic
        phased = build_plain_reducer_for(group, CPU, wire_dtype=wire, deterministic=deterministic)
    else:
        phased = build_compressed_reducer_for(group, CPU, code, ROWS, CLASSES)
    reducer: Reducer = phased
    if way == "thread":
        reducer = BackgroundReducer(phased, CPU)
    elif way == "steps":
        reducer = SteppedReducer(phased, overlap_steps=overlap)
    outer, noted = phased._outer, []  # type: ignore[attr-defined]
    outer.wire = NotedWire(outer.wire, noted)
    settings = Settings(6, 21, TWO, outer_lr=0.7, outer_momentum=0.9, overlap_steps=overlap)
    replica = Replica(start())
    plain = build_plain_reducer_for(group, CPU, deterministic=True)
    guard = Guard(size, max_norm_ratio=math.inf)
    synchronizer = synchronizer_of(replica.port(), settings, reducer, size, plain, guard=guard)
    for t in range(1, settings.train_iters + 1):
        inner(rank)(replica.parameters, t)
        outer.wire.step = t
        synchronizer.after_inner_step(t)
    kept = synchronizer.state_dict()["tensors"]
    return kept, replica.parameters, noted, threading.get_ident()


def train_all_beside() -> list[dict[str, Any]]:
    return [
        {way: train_beside(keys, overlap, way) for way in ("foreground", "thread", "steps")}
        for keys in BESIDE.values()
        for overlap in (1, 2, 3)
    ]


@pytest.mark.parametrize("num_replicas", [2, 3])
def test_steps_threads_and_the_foreground_give_the_same_bits(num_replicas: int) -> None:
    by_rank = run_ranks(train_all_beside, num_replicas, timeout_s=240.0)
    for number, (name, overlap) in enumerate(product(BESIDE, (1, 2, 3))):
        issued = []
        for rank, results in enumerate(by_rank):
            expected, local, _, _ = results[number]["foreground"]
            for way in ("thread", "steps"):
                found, theirs, noted, main = results[number][way]
                message = f"{name}, overlap {overlap}, rank {rank}, {way}"
                assert found.keys() == expected.keys()
                for kind, tensors in expected.items():
                    assert_same(tensors, found[kind], f"{message}, {kind}")
                assert_same(local, theirs, message)
                assert noted
                assert all((thread == main) == (way == "steps") for _, thread, _ in noted)
            issued.append([(what, step) for what, _, step in results[number]["steps"][2]])
        assert all(each == issued[0] for each in issued), f"{name}: ranks differ in their order"
        if name != "top-k" and overlap > 1:
            # Launches after steps 3 and 6 of a round; the second crossing half the overlap later.
            half = -(-overlap // 2)
            assert [step for _, step in issued[0]][:4] == [3, 3 + half, 6, 6 + half]


def assert_same(actual: Parameters, expected: Parameters, message: str) -> None:
    for name, tensor in actual.items():
        assert_equal(tensor, expected[name], f"{message}, {name}")


def reduce_with_rows() -> Parameters:
    codec = Linear(4, Grouping("row"))
    rows = dict.fromkeys(SIZES, (ROW_WIDTH, 7))  # shards begin inside a row
    reducer = CompressedAllReduce(dist.group.WORLD, CPU, lambda name: codec, rows, None)
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
    reducer = CompressedAllReduce(dist.group.WORLD, CPU, lambda name: codec, {}, 0.9)
    tensors = {name: normal(size, rank) for name, size in sizes.items()}
    if not weights[rank]:
        tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}
    metadata = torch.tensor([float(rank), 0.5])
    reduced = reducer.wait(reducer.launch(0, tensors, weights[rank], metadata, round_index=1))
    assert reducer.owner_residual is not None
    own = sum(residual.numel() for residual in reducer.owner_residual.residuals.values())
    stats = reduced.stats
    return (
        dict(reduced.mean),
        stats.weights.tolist(),
        stats.metadata.tolist(),
        stats.wire_bytes,
        own,
    )


@pytest.mark.parametrize("sizes", [{}, {"a": 0}, {"a": 1}, {"a": 5, "b": 0, "c": 200}], ids=str)
@pytest.mark.parametrize("weights", [[1.0, 0.0, 1.0], [0.0, 0.0]], ids=str)
def test_shapes_weights_and_bytes(weights: list[float], sizes: dict[str, int]) -> None:
    by_rank = run_ranks(reduce_unevenly, len(weights), weights, sizes)
    chunks = chunk_pieces(list(sizes.items()), len(weights), {})
    payloads = payload_sizes(chunks, lambda name: Statistical(2, Grouping()))
    for rank, (mean, seen, metadata, wire_bytes, own) in enumerate(by_rank):
        assert seen == weights
        assert metadata == [[float(k), 0.5] for k in range(len(weights))]
        assert wire_bytes == two_way_bytes(payloads, rank, row=3)
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
    chunks = chunk_pieces(sizes, chunk_count, {"embedding.a": (ROW_WIDTH, 7)})
    covered = {name: [0] * size for name, size in sizes}
    for pieces in chunks:
        for piece in pieces:
            for i in range(piece.start, piece.end):
                covered[piece.name][i] += 1
            if piece.name == "embedding.a":
                assert piece.unit.row_offset == (7 + piece.start) % ROW_WIDTH
    assert all(count == [1] * len(count) for count in covered.values())
    assert max(sum(p.unit.numel for p in pieces) for pieces in chunks) == math.ceil(
        sum(SIZES.values()) / chunk_count
    )


def test_one_replica_encodes_twice_and_sends_nothing() -> None:
    codec, values = Statistical(2, Grouping()), normal(100, 1)
    reducer = CompressedAllReduce(None, CPU, lambda name: codec, {}, None)
    reduced = reducer.wait(reducer.launch(0, {"a": values}, 1.0, torch.ones(3), round_index=1))
    unit, once, twice = CodingUnit(100), torch.empty(100), torch.empty(100)
    codec.decode(codec.encode(values, unit), unit, once)
    codec.decode(codec.encode(once, unit), unit, twice)
    assert_equal(reduced.mean["a"], twice)
    assert reduced.stats.metadata.tolist() == [[1.0, 1.0, 1.0]]
    assert reduced.stats.wire_bytes == 0


LEFT_OUT = 2  # in the second of three rounds
HUGE = 1e6


def pseudogradient(replica: int, round_index: int) -> torch.Tensor:
    """The same in every round, but far too large where the replica is left out."""
    values = normal(100, replica)
    return values * HUGE if (replica, round_index) == (LEFT_OUT, 2) else values


def weight_of(replica: int, round_index: int) -> float:
    return float((replica, round_index) != (LEFT_OUT, 2))


def leave_one_out() -> list[tuple[Parameters, Parameters]]:
    codec = Linear(4, Grouping())
    reducer = CompressedAllReduce(dist.group.WORLD, CPU, lambda name: codec, {}, 0.9)
    rank, seen = dist.get_rank(), []
    for round_index in (1, 2, 3):
        tensors = {"a": pseudogradient(rank, round_index)}
        weight = weight_of(rank, round_index)
        handle = reducer.launch(0, tensors, weight, torch.zeros(0), round_index=round_index)
        reduced = reducer.wait(handle)
        assert reducer.residual is not None
        residual = reducer.residual.of("a", 100, CPU).clone()
        seen.append(({"a": reduced.mean["a"].clone()}, {"a": residual}))
    return seen


def test_a_replica_left_out_sends_nothing_and_keeps_its_residual() -> None:
    count = 3
    code = LinearCompression(kind="linear", bits=4)
    keys = reference_keys(code, {}, {"a": None}, [{"a": 100}], count)
    settings = Settings(sync_interval=1, train_iters=3, fragments=[["a"]], **keys)

    def by(replica: int) -> Any:
        """The local parameters are the anchor less the pseudogradient of the round."""

        def step(local: Parameters, t: int) -> None:
            local["a"].copy_(-pseudogradient(replica, t))

        return step

    reference = Reference(
        {"a": torch.zeros(100)},
        [by(k) for k in range(count)],
        settings,
        weigh=lambda k, fragment, t, delta: weight_of(k, t),
    )
    by_rank = run_ranks(leave_one_out, count)
    for t in (1, 2, 3):
        before = reference.anchor["a"].zero_().clone()
        reference.step(t)
        for replica, seen in enumerate(by_rank):
            mean, residual = seen[t - 1]
            assert_equal(mean["a"], before - reference.anchor["a"], f"mean of round {t}")
            expected = reference.residual[replica]["a"]
            assert_equal(residual["a"], expected, f"e of replica {replica} after round {t}")
    kept, after = by_rank[LEFT_OUT][0][1]["a"], by_rank[LEFT_OUT][1][1]["a"]
    assert kept.any()
    assert_equal(after, kept, "e of the replica left out")
    # Nothing of the round that did not count comes back: values of about 1, not of a million.
    assert by_rank[0][2][0]["a"].abs().max() < 10


def test_forgetting_keeps_the_owners_residual() -> None:
    codec = Linear(1, Grouping())
    reducer = CompressedAllReduce(None, CPU, lambda name: codec, {}, 0.9)
    tensors = {"a": normal(100, 1)}
    reducer.wait(reducer.launch(0, tensors, 1.0, torch.zeros(0), round_index=1))
    assert reducer.residual is not None
    assert reducer.owner_residual is not None
    assert reducer.residual.residuals["a"].any()
    reducer.owner_residual.load({"a": torch.ones(100)})
    reducer.forget_residual()
    assert not reducer.residual.residuals["a"].any()
    assert reducer.owner_residual.residuals["a"].all()
