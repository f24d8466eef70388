"""Parameters and shards that the planner knows from arithmetic are those that Megatron makes."""

from typing import Any

import pytest

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.params import GPT_NAMES, ParamInfo, Shard
from megatron_muloco.planning.layout import cut_buffer, rank_shards, stage_parameters
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

TIED = {"untie_embeddings_and_output_weights": False}
ALL_NORMS = {"qk_layernorm": True, "post_layernorm": True}

# Sizes (tp, pp, dp) and sections of the config.
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "one-rank": ((1, 1, 1), {"model": ALL_NORMS}),
    "plain-norms-bf16": (
        (1, 1, 2),
        {
            "model": {"qk_layernorm": False, "post_layernorm": False},
            "training": {"precision": "bf16"},
        },
    ),
    "tied": ((1, 1, 2), {"model": TIED}),
    "tp2": ((2, 1, 1), {"model": ALL_NORMS | {"num_query_groups": 4}}),
    "tp2-dp2": ((2, 1, 2), {"model": {"qk_layernorm": True, "post_layernorm": False}}),
    "pp2": ((1, 2, 1), {"model": {"num_layers": 4, "post_layernorm": True}}),
    "pp2-uneven": (
        (1, 2, 2),
        {
            "model": TIED | {"num_layers": 4},
            "parallel": {"num_layers_in_last_pipeline_stage": 1},
        },
    ),
    "pp3-uneven": (
        (1, 3, 1),
        {
            "model": {"num_layers": 4},
            "parallel": {
                "num_layers_in_first_pipeline_stage": 1,
                "num_layers_in_last_pipeline_stage": 1,
            },
        },
    ),
    "cp2-dp2": ((1, 1, 2), {"parallel": {"context_parallel_size": 2}}),
    "pp2-dp2-tied": ((1, 2, 2), {"model": TIED | ALL_NORMS}),
    "dp3": ((1, 1, 3), {"training": {"overlap_grad_reduce": True}}),
    "dp4": ((1, 1, 4), {"model": {"hidden_size": 24, "kv_channels": 6}}),
}


def config_of(sizes: tuple[int, int, int], **sections: Any) -> RunConfig:
    tensor, pipeline, data = sizes
    return tiny_config(
        parallel={
            "num_replicas": 1,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            **sections.pop("parallel", {}),
        },
        training={"global_batch_size": 2 * data, **sections.pop("training", {})},
        **sections,
    )


def held(config: RunConfig, bucket_size: int | None) -> tuple[list[ParamInfo], list[Shard]]:
    """Return this rank's parameters and shards, as Megatron made them."""
    view = start_tiny(config, bucket_size=bucket_size).optimizer.view
    finish_tiny()
    return list(view.infos.values()), list(view.shards)


@pytest.mark.parametrize("case", CASES)
def test_planned_shards_are_those_of_the_run(case: str) -> None:
    sizes, sections = CASES[case]
    config = config_of(sizes, **sections)
    world = sizes[0] * sizes[1] * sizes[2] * config.parallel.context_parallel_size
    topology = topology_of(config, world)
    for rank, (infos, shards) in enumerate(run_ranks(held, world, config, None)):
        place = topology.coords(rank)
        planned = stage_parameters(config, topology, stage=place.pp, tp_rank=place.tp)
        assert list(planned) == infos
        assert list(rank_shards(config, topology, place)) == shards


@pytest.mark.parametrize(("bucket_size", "tied"), [(1, False), (3000, False), (2500, True)])
def test_planned_shards_of_many_buckets(bucket_size: int, tied: bool) -> None:
    sizes = (1, 1 + tied, 3 - tied)
    config = config_of(
        sizes,
        model={"untie_embeddings_and_output_weights": not tied, "hidden_size": 24, "num_layers": 4},
        training={"overlap_grad_reduce": True},
    )
    world = sizes[1] * sizes[2]
    topology = topology_of(config, world)
    for rank, (infos, shards) in enumerate(run_ranks(held, world, config, bucket_size)):
        place = topology.coords(rank)
        cut = cut_buffer(
            infos,
            ranks=sizes[2],
            bucket_elements=bucket_size if place.pp == 0 else None,
            alone=(GPT_NAMES.embedding,) if tied else (),
        )
        assert list(cut[place.dp]) == shards
