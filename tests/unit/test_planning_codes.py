"""What codes cost, from arithmetic: memory, bytes, and the words of the plan."""

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.comm.chunking import ring_bytes
from megatron_muloco.comm.costs import reducer_cost
from megatron_muloco.compress.format import CodingUnit
from megatron_muloco.config import RunConfig, load_config, topology_of
from megatron_muloco.config.derived import parameter_counts
from megatron_muloco.config.outer import (
    CompressionConfig,
    E3M0Compression,
    LinearCompression,
    NoCompression,
    StatisticalCompression,
    TopKCompression,
)
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.planning import memory_plan, render_plan, traffic_plan
from megatron_muloco.topology import Topology

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = CONFIGS / "cpu_k2.yaml"


def config_of(*overrides: str) -> RunConfig:
    return load_config(CPU, ["model.num_attention_heads=4", *overrides])


CODES: dict[str, CompressionConfig] = {
    "fp32": NoCompression(),
    "fp32-in-chunks": NoCompression(deterministic=True),
    "bf16": NoCompression(wire_dtype="bf16"),
    "linear-4": LinearCompression(kind="linear", bits=4),
    "linear-2-no-feedback": LinearCompression(kind="linear", bits=2, error_feedback=False),
    "statistical-2-rows": StatisticalCompression(kind="statistical", bits=2, granularity="row"),
    "statistical-8-raw": StatisticalCompression(
        kind="statistical", bits=8, granularity="block", block_size=256
    ),
    "statistical-4-small": StatisticalCompression(
        kind="statistical", bits=4, granularity="block", block_size=32
    ),
    "linear-8-small": LinearCompression(kind="linear", bits=8, granularity="block", block_size=16),
    "e3m0-blocks": E3M0Compression(kind="e3m0", granularity="block"),
    "topk": TopKCompression(kind="topk", density=0.01),
    "topk-dense": TopKCompression(kind="topk", density=0.4, value_bits=4),
}


def whole_shards() -> list[Shard]:
    """Return three matrices and a norm, not cut."""
    shapes = [(512, 256), (300, 512), (256, 256), (512,)]
    names = [*(f"decoder.layers.0.{letter}.weight" for letter in "abc"), "decoder.norm.weight"]
    params = [
        ParamInfo.from_name(name, shape, None) for name, shape in zip(names, shapes, strict=True)
    ]
    return [Shard(param, 0, param.numel) for param in params]


@pytest.mark.parametrize("name", CODES)
def test_planned_buffers_and_residuals_are_those_of_the_reducers(name: str) -> None:
    import torch

    from megatron_muloco.comm.chunking import row_places
    from megatron_muloco.comm.compressed import build_compressed_reducer_for
    from megatron_muloco.comm.reducers import build_plain_reducer_for

    code, shards, device = CODES[name], whole_shards(), torch.device("cpu")
    reducer: Any
    if isinstance(code, NoCompression):
        wire, deterministic = code.wire_dtype, code.deterministic
        reducer = build_plain_reducer_for(
            None, device, wire_dtype=wire, deterministic=deterministic
        )
    else:
        kinds = {shard.name: shard.param.kind for shard in shards}
        reducer = build_compressed_reducer_for(None, device, code, row_places(shards), kinds)
    metadata = torch.zeros(3)
    tensors = {shard.name: torch.randn(shard.numel) for shard in shards}
    flight = reducer.launch(0, tensors, 1.0, metadata, round_index=1)
    held = {buffer.data_ptr(): buffer.nbytes for buffer in flight.buffers}
    cost = reducer_cost(code, shards, 1)
    # in each of two buffers a row of weight and metadata; a chunk is even
    row = 4 * (1 + len(metadata))
    assert cost.buffers <= sum(held.values()) <= cost.buffers + 2 * row + 3 * 4
    reducer.wait(flight)
    kept = reducer.residuals([{shard.name: shard.numel for shard in shards}])
    residuals = sum(tensor.nbytes for kind in kept.values() for tensor in kind.values())
    assert cost.residuals == residuals


@pytest.mark.parametrize(
    "name", [name for name, code in CODES.items() if not isinstance(code, NoCompression)]
)
def test_planned_temporaries_cover_those_of_the_codecs(name: str) -> None:
    """Encoding the largest unit with error feedback, from what is allocated on the way."""
    import torch

    from megatron_muloco.compress.codec import encode
    from megatron_muloco.compress.codecs import codec_lookup
    from tests.support.allocated import AllocatedBytes

    code = CODES[name]
    assert not isinstance(code, NoCompression)
    unit = CodingUnit(1 << 20, 256)
    codec = codec_lookup(code, {"a": "fc1"})("a")
    values, residual = torch.randn(2, unit.numel)
    payload = torch.empty(codec.payload_bytes(unit), dtype=torch.uint8)
    with AllocatedBytes() as allocated:
        encode(codec, unit, values, payload, residual, 0.9)
    most = allocated.most
    param = ParamInfo.from_name("decoder.layers.0.a.weight", (1 << 12, 256), None)
    whole = reducer_cost(code, [Shard(param, 0, param.numel)], 1).launching
    planned = whole - 4 * param.numel  # the pseudogradient
    assert most <= planned <= 2 * most


# What the bars below allow, and what a value takes in fp32: both ways, 32 bits.
BARS: dict[Literal[4, 2], float] = {4: 7.8, 2: 15.0}


@given(
    replicas=st.sampled_from([2, 3, 4, 16]),
    units=st.lists(st.integers(8192, 40_000), min_size=1, max_size=4),
    kind=st.sampled_from(["linear", "statistical"]),
    bits=st.sampled_from([4, 2]),
)
def test_four_bits_send_an_eighth_and_two_a_sixteenth(
    replicas: int,
    units: list[int],
    kind: Literal["linear", "statistical"],
    bits: Literal[4, 2],
) -> None:
    code: LinearCompression | StatisticalCompression
    if kind == "linear":
        code = LinearCompression(kind="linear", bits=bits)
    else:
        code = StatisticalCompression(kind="statistical", bits=bits)
    # K equal tensors for each size, in turn: every chunk has whole tensors, each one unit
    params = [
        ParamInfo.from_name(f"decoder.layers.{index}.weight", (size,), None)
        for index, size in enumerate(units * replicas)
    ]
    shards = [Shard(param, 0, param.numel) for param in params]
    cost = reducer_cost(code, shards, replicas)
    assert len(set(cost.sent)) == 1
    sent = cost.sent[0] - (replicas - 1) * 4  # without the weight
    assert sent * BARS[bits] <= ring_bytes(sum(units) * replicas, replicas)


@pytest.mark.parametrize("kind", ["linear", "statistical"])
@pytest.mark.parametrize("bits", [4, 2])
def test_the_15b_run_meets_the_same_bars(kind: str, bits: Literal[4, 2]) -> None:
    overrides = [f"outer.compression.kind={kind}", f"outer.compression.bits={bits}"]
    config = load_config(CONFIGS / "15b_k16.yaml", overrides)
    traffic = traffic_plan(config, topology_of(config, 1024))
    # metadata and the ends of chunks included
    assert traffic.outer_per_replica * BARS[bits] <= traffic.outer_uncoded
    assert traffic.outer_per_replica * 32 / bits >= traffic.outer_uncoded


def test_chunk_owners_send_different_bytes() -> None:
    code = LinearCompression(kind="linear", bits=4)
    (first, *_) = whole_shards()
    # 2^17 values in thirds of 43,691, the last one of 43,690: half a byte each, and a head of 8
    sizes = [21_846 + 8, 21_846 + 8, 21_845 + 8]
    # the weight and another's chunk to each of two, and the own mean to both
    sent = tuple(2 * 4 + sum(sizes) + size for size in sizes)
    assert reducer_cost(code, [first], 3).sent == sent


def test_the_plan_shows_the_code_and_what_it_costs() -> None:
    overrides = [
        "outer.compression.kind=statistical",
        "outer.compression.bits=2",
        "outer.compression.granularity=row",
        "outer.compression.exceptions={norm: none, embedding: 8}",
    ]
    text = render_plan(load_config(CPU, overrides))
    for words in (
        "statistical  2 bits; a table per row",
        "but norms fp32, embedding 8 bits",
        "0.9  compression error of this replica and of the means it owns",
        "fp32, error feedback",
        "to 1 other replica, statistical, 2 bits\n",
        "what fp32 all-reduces would send",
    ):
        assert words in text
    plain = render_plan(load_config(CPU))
    for words in ("residuals", "ratio", "compression", "error feedback"):
        assert words not in plain
    sparse = ["outer.compression.kind=topk", "outer.compression.density=0.01"]
    text = render_plan(load_config(CPU, [*sparse, "outer.compression.error_feedback=false"]))
    assert "1 %; the largest of every 4096 values, fp32, and their indices" in text
    assert "none  compression errors are dropped" in text
    assert "residuals" not in text


def test_error_feedback_costs_memory() -> None:
    overrides = ["outer.compression.kind=linear", "outer.compression.bits=4"]
    total = parameter_counts(config_of().model).total
    topology = Topology(2, 1, 1, 1)
    kept = memory_plan(config_of(*overrides), topology)
    lost = memory_plan(config_of(*overrides, "outer.compression.error_feedback=false"), topology)
    # e of all values, f of half of them
    assert kept.outer_step.residuals == 4 * total + 4 * -(-total // 2)
    assert kept.device - lost.device == kept.outer_step.residuals


def test_a_communication_thread_keeps_what_it_works_on() -> None:
    code = ["outer.compression.kind=linear", "outer.compression.bits=4"]
    parts = ["outer.fragments.count=4", "model.num_layers=4", "outer.max_in_flight=4"]
    topology = Topology(2, 1, 1, 1)
    late = memory_plan(config_of(*code, *parts, "outer.overlap_steps=3"), topology).outer_step
    now = memory_plan(config_of(*code, *parts), topology).outer_step
    assert late.in_flight == 2
    assert 0 < late.buffers <= now.temporary  # one fragment is reduced after the other
    assert (now.buffers, now.queued, late.queued) == (0, 0, late.at_launch)
    # an all-reduce works by itself, unless it goes through the host
    plain = memory_plan(config_of(*parts, "outer.overlap_steps=3"), topology)
    assert (plain.outer_step.queued, plain.host) == (0, 0)
    host = memory_plan(config_of(*parts, "outer.overlap_steps=3", "outer.transport=host"), topology)
    assert host.outer_step.queued == late.queued
    assert host.host == host.outer_step.buffers == plain.outer_step.buffers // 2
    # on an accelerator the main thread reduces, unless the host sends: every flight has buffers
    gpu = [*parts, "outer.overlap_steps=3", "training.precision=bf16"]
    stepped = memory_plan(config_of(*code, *gpu), topology).outer_step
    assert (stepped.queued, stepped.buffers) == (0, 2 * late.buffers)
    sent_from_host = memory_plan(config_of(*code, *gpu, "outer.transport=host"), topology)
    assert sent_from_host.outer_step.queued == late.queued
