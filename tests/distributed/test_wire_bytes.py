"""Relation 9: the bytes that reducers count are those that the plan predicts, exactly.

Every code over the real stack: model, Megatron's shards, fragments, chunks, metadata.
"""

import itertools
from typing import Any

import pytest
import torch

from megatron_muloco.config import RunConfig, with_compression
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.outer.schedule import LineCalendar
from megatron_muloco.planning import render_plan, traffic_plan
from megatron_muloco.planning.layout import rank_shards
from megatron_muloco.planning.report import human_bytes
from megatron_muloco.planning.traffic import round_bytes, uncoded_bytes
from megatron_muloco.topology import Coords, Topology
from tests.support.own_codec import SignCompression
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

Sections = dict[str, Any]
Sizes = tuple[int, int, int, int]  # K, tp, pp, dp
TIED = {"untie_embeddings_and_output_weights": False}
# Only kinds with a number of bits can have another one for some parameters.
EXCEPTIONS: list[Sections] = [
    {},
    {"norm": "none"},
    {"norm": 8, "embedding": 1, "output": "none"},
]
EXCEPTIONS_IN_FP32: list[Sections] = [{}, {"norm": "none"}, {"embedding": "none"}]


def config_of(sizes: Sizes, outer: Sections | None = None, **sections: Any) -> RunConfig:
    replicas, tensor, pipeline, data = sizes
    base = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 2}
    return tiny_config(
        parallel={
            "num_replicas": replicas,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
        },
        training={"global_batch_size": replicas * data, "train_iters": 4},
        outer=base | (outer or {}),
        monitor={"log_interval": 3, "pseudogradient_interval": 2, **sections.pop("monitor", {})},
        **sections,
    )


def counted(config: RunConfig) -> list[tuple[int, int]]:
    """Return what this rank counted in each of two rounds, with the monitor's metadata.

    That is bytes on the wire, and those that an fp32 all-reduce of the values would have sent.
    """
    assert not isinstance(config.outer, NoOuter)
    run = start_tiny(config)
    calendar = LineCalendar(config.monitor.log_interval, run.optimizer.schedule)
    metadata = torch.zeros(calendar.value_count())
    rounds = [[0, 0], [0, 0]]
    outer_step = run.optimizer.outer_step
    run.optimizer.outer_step = lambda: outer_step(metadata)  # type: ignore[method-assign]
    reports = []
    for _ in range(4):
        run.optimizer.last_outer = None
        run.train(1)
        reports.append(run.optimizer.last_outer)
    if config.outer.overlap_steps:  # the last launch is still under way
        reports.append(run.optimizer.flush())
    for part in itertools.chain.from_iterable(report.applied for report in reports if report):
        index = (part.launched_at - 1) // 2
        uncoded, sent = part.measurements["muloco/compression_ratio"].numbers.tolist()
        rounds[index][0] += int(sent)
        rounds[index][1] += int(uncoded)
    finish_tiny()
    return [(sent, uncoded) for sent, uncoded in rounds]


def counted_of_all(configs: list[RunConfig]) -> list[list[tuple[int, int]]]:
    return [counted(config) for config in configs]


def planned(config: RunConfig, topology: Topology, place: Coords) -> list[tuple[int, int]]:
    """Return the same from arithmetic; every second round compares replicas."""
    shards = rank_shards(config, topology, place)
    uncoded = uncoded_bytes(config, topology, shards)
    return [
        (round_bytes(config, topology, shards, sketch=compares)[place.replica], uncoded)
        for compares in (False, True)
    ]


def check(sizes: Sizes, configs: list[RunConfig]) -> None:
    world = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    per_rank = run_ranks(counted_of_all, world, configs, timeout_s=20.0 * len(configs))
    for index, config in enumerate(configs):
        topology = topology_of(config, world)
        found = [per_config[index] for per_config in per_rank]
        for rank, rounds in enumerate(found):
            assert rounds == planned(config, topology, topology.coords(rank)), (config.outer, rank)
        plan = traffic_plan(config, topology)
        sent = [rounds[1][0] for rounds in found]
        assert plan.outer_per_rank == max(sent)
        size = topology.replica_size
        replicas = [sent[first : first + size] for first in range(0, world, size)]
        assert plan.outer_per_replica == max(map(sum, replicas))
        assert plan.outer_uncoded == sum(rounds[1][1] for rounds in found[:size])
        (line,) = [x for x in render_plan(config, topology).splitlines() if "each round" in x]
        assert human_bytes(max(sent)) in line


LAYOUTS: dict[str, tuple[Sizes, Sections]] = {
    "k2": ((2, 1, 1, 1), {}),
    "k3": ((3, 1, 1, 1), {}),
    "k2-tp2": ((2, 2, 1, 1), {}),
    "k2-pp2-tied": ((2, 1, 2, 1), {"model": TIED}),
    "k2-dp2": ((2, 1, 1, 2), {}),
    "k4": ((4, 1, 1, 1), {}),
}

MEANS: list[Sections] = [
    {"kind": "none", "wire_dtype": dtype, "deterministic": deterministic}
    for dtype, deterministic in (("fp32", False), ("fp32", True), ("bf16", False))
]
GROUPED: list[Sections] = [
    {"kind": kind, "granularity": granularity}
    | ({"block_size": 48} if granularity == "block" else {})
    | ({} if bits is None else {"bits": bits})
    for granularity in ("tensor", "row", "block")
    for kind, bits in [("e3m0", None), *itertools.product(("linear", "statistical"), (8, 4, 2, 1))]
]
TOP_K: list[Sections] = [
    {"kind": "topk", "density": density, "block_size": 100} | values
    for density in (0.02, 0.3)
    for values in ({}, {"wire_dtype": "bf16"}, {"value_bits": 4}, {"value_bits": 1})
]


def with_exceptions(code: Sections, index: int) -> Sections:
    """Return a code with exceptions and fragments that change from one to the next."""
    exceptions = EXCEPTIONS if "bits" in code else EXCEPTIONS_IN_FP32
    pattern = "strided" if index % 3 else "sequential"
    return {
        "compression": code | {"exceptions": exceptions[index % 3]},
        "fragments": {"count": 1 + index % 2, "pattern": pattern},
    }


CODES = [with_exceptions(code, index) for index, code in enumerate([*GROUPED, *TOP_K])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uncompressed_bytes_are_the_planners(layout: str) -> None:
    sizes, sections = LAYOUTS[layout]
    outers = [
        {"compression": mean, "fragments": {"count": count, "pattern": "strided"}}
        for mean in MEANS
        for count in (1, 2)
    ]
    configs = [config_of(sizes, outer, **sections) for outer in outers]
    check(sizes, [*configs, config_of(sizes, monitor={"pseudogradient_interval": 0}, **sections)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_coded_bytes_are_the_planners(layout: str) -> None:
    sizes, sections = LAYOUTS[layout]
    others = [name for name in LAYOUTS if name != "k2-tp2"]  # together they have every code again
    codes = CODES if layout not in others else CODES[others.index(layout) :: len(others)]
    check(sizes, [config_of(sizes, outer, **sections) for outer in codes])


def test_bytes_of_a_codec_from_outside_are_the_planners() -> None:
    sections = [SignCompression(), SignCompression(block_size=32, error_feedback=False)]
    check((2, 1, 1, 2), [with_compression(config_of((2, 1, 1, 2)), each) for each in sections])


def test_bytes_do_not_depend_on_how_they_travel() -> None:
    sizes = (2, 1, 1, 1)
    code = {"compression": {"kind": "linear", "bits": 4}}
    ways = [{}, {"transport": "host"}, {"overlap_steps": 1}, {"error_feedback": False}]
    outers = [code | way for way in ways[:3]]
    outers.append({"compression": code["compression"] | ways[3]})
    outers.append({"transport": "host", "overlap_steps": 1})
    check(sizes, [config_of(sizes, outer) for outer in outers])
