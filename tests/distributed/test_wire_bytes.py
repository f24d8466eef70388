"""Relation 9, uncompressed: the bytes that reducers count are those that the plan predicts."""

from typing import Any

import pytest
import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.monitor.lines import LineCalendar
from megatron_muloco.planning import render_plan, traffic_plan
from megatron_muloco.planning.outer_traffic import outer_bytes
from megatron_muloco.planning.text import human_bytes
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

INTERVAL = 4


def config_of(replicas: int, **sections: Any) -> RunConfig:
    outer = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": INTERVAL}
    return tiny_config(
        parallel={"num_replicas": replicas, **sections.pop("parallel", {})},
        training={"global_batch_size": 4 * replicas, "train_iters": 2 * INTERVAL},
        outer=outer | sections.pop("outer", {}),
        monitor={"log_interval": 3, "pseudogradient_interval": 2, **sections.pop("monitor", {})},
        **sections,
    )


def counted(config: RunConfig) -> list[int]:
    """Return the bytes that this rank counted in each of two rounds, with the monitor's riders."""
    run = start_tiny(config)
    calendar = LineCalendar(config.monitor.log_interval, run.optimizer.schedule)
    riders = torch.zeros(calendar.rider_count())
    rounds = [0, 0]
    inner_step = run.optimizer.outer_step
    run.optimizer.outer_step = lambda: inner_step(riders)  # type: ignore[method-assign]
    for step in range(1, 2 * INTERVAL + 1):
        run.optimizer.last_outer = None
        run.train(1)
        if run.optimizer.last_outer is not None:
            for part in run.optimizer.last_outer.applied:
                rounds[(part.launched_at - 1) // INTERVAL] += part.wire_bytes
        assert run.optimizer.steps == step
    finish_tiny()
    return rounds


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "k2": (2, {}),
    "k3-bf16-wire": (3, {"outer": {"compression": {"kind": "none", "wire_dtype": "bf16"}}}),
    "k4": (4, {}),
    "k2-tp2-fragments": (
        2,
        {
            "parallel": {"tensor_model_parallel_size": 2},
            "outer": {"fragments": {"count": 2}},
        },
    ),
    "k2-pp2-tied-fragments": (
        2,
        {
            "parallel": {"pipeline_model_parallel_size": 2},
            "model": {"untie_embeddings_and_output_weights": False},
            "outer": {"fragments": {"count": 2, "pattern": "strided"}},
        },
    ),
    "k2-without-sketch": (2, {"monitor": {"pseudogradient_interval": 0}}),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_counted_are_the_planners(case: str) -> None:
    replicas, sections = CASES[case]
    config = config_of(replicas, **sections)
    sizes = config.parallel
    world = replicas * sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size
    topology = topology_of(config, world)
    per_rank = run_ranks(counted, world, config)
    for rank, rounds in enumerate(per_rank):
        place = topology.coords(rank)
        assert rounds == [
            outer_bytes(config, topology, stage=place.pp, tp_rank=place.tp, sketch=compares)
            for compares in (False, True)  # every second round
        ]
    plan = traffic_plan(config, topology)
    busiest = max(rounds[1] for rounds in per_rank)
    assert plan.outer_per_rank == busiest
    first_replica = per_rank[: topology.replica_size]
    assert plan.outer_per_replica == sum(rounds[1] for rounds in first_replica)
    (line,) = [line for line in render_plan(config, topology).splitlines() if "each round" in line]
    assert human_bytes(busiest) in line


def test_shards_of_data_parallel_ranks_differ_by_padding_only() -> None:
    config = config_of(2)
    topology = topology_of(config, 4)
    planned = outer_bytes(config, topology, stage=0, tp_rank=0)
    counts = [rounds[1] for rounds in run_ranks(counted, 4, config)]
    # Megatron starts every parameter at a multiple of 64 elements and ends the flat buffer at a
    # multiple of 128: a shard is longer than the even cut by at most that padding.
    parameters = 2 * 10 + 3
    assert sum(counts[:2]) <= 2 * planned + 4 * 4
    assert max(counts) <= planned + 4 * (64 * parameters + 128)
