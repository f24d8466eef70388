"""Process groups are those of the topology, and Megatron's implicit readers see the same ones."""

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_muloco.config import RunConfig
from megatron_muloco.errors import ConfigError, RuntimeMismatch
from megatron_muloco.topology import Topology
from megatron_muloco.training import start
from megatron_muloco.training.start import initialize_replicas
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, tiny_config

# Getter -> field of the collection; a pair when an argument chooses. Getters that a Megatron
# version lacks are skipped, and one that is not listed here fails the test.
GETTERS: dict[str, str | dict[str, str]] = {
    "get_model_parallel_group": "mp",
    "get_tensor_model_parallel_group": "tp",
    "get_pipeline_model_parallel_group": "pp",
    "get_data_parallel_group": {"": "dp", "cp": "dp_cp", "cp partial": "intra_dp_cp"},
    "get_context_parallel_group": "cp",
    "get_embedding_group": "embd",
    "get_position_embedding_group": "pos_embd",
    "get_amax_reduction_group": {
        "": "tp_dp",
        "cp": "tp_dp_cp",
        "tp_only": "tp",
        "cp tp_only": "tp_cp",
    },
    "get_tensor_and_data_parallel_group": {"": "tp_dp", "cp": "tp_dp_cp"},
    "get_tensor_and_context_parallel_group": "tp_cp",
    "get_expert_model_parallel_group": "ep",
    "get_expert_tensor_parallel_group": "expt_tp",
    "get_expert_tensor_and_model_parallel_group": "tp_ep",
    "get_expert_tensor_model_pipeline_parallel_group": "tp_ep_pp",
    "get_expert_data_parallel_group": {"": "expt_dp", "partial": "intra_expt_dp"},
    "get_data_modulo_expert_parallel_group": {"": "expt_dp", "partial": "intra_expt_dp"},
    "get_intra_distributed_optimizer_instance_group": "intra_dist_opt",
    "get_gtp_weight_remat_group": "gtp_remat",
    "get_expert_gtp_weight_remat_group": "expt_gtp_remat",
}
# What this package never builds: gloo twins, hierarchical and hybrid context parallelism, several
# instances of the distributed optimizer.
ABSENT = (
    "get_data_parallel_group_gloo",
    "get_expert_data_parallel_group_gloo",
    "get_hierarchical_context_parallel_groups",
    "get_hybrid_data_context_parallel_groups",
    "get_inter_distributed_optimizer_instance_group",
)
ARGUMENTS = {
    "cp": {"with_context_parallel": True},
    "partial": {"partial_data_parallel": True, "partial_expert_data_parallel": True},
    "tp_only": {"tp_only_amax_red": True},
}
SWITCHES = ("with_gtp_remat", "with_egtp_remat")  # 0.17 on: the axis has one rank, no difference


def _calls(getter: Any, wanted: str) -> Iterator[Any]:
    """Yield what ``getter`` returns with the arguments that ``wanted`` names."""
    known = inspect.signature(getter).parameters
    named = {k: v for word in wanted.split() for k, v in ARGUMENTS[word].items() if k in known}
    switches = [name for name in SWITCHES if name in known]
    for values in product([False, True], repeat=len(switches)):
        yield getter(**named, **dict(zip(switches, values, strict=True)))


def _getters() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("get_") and name.endswith(("_group", "_groups", "_group_gloo"))
    }


def _mirror_of(config: RunConfig) -> list[str]:
    """Return the getters of this rank that do not give the collection's group."""
    pg = initialize_replicas(config).pg
    wrong = []
    for name, getter in _getters().items():
        fields = GETTERS.get(name, {})
        for wanted, field in ({"": fields} if isinstance(fields, str) else fields).items():
            expected = getattr(pg, field)
            if expected is None:  # a middle stage has no embedding group
                continue
            if any(group is not expected for group in _calls(getter, wanted)):
                wrong.append(f"{name}({wanted}) is not {field}")
    finish_tiny()
    return wrong


LAYOUTS = {  # tp, pp, dp, replicas, cp
    "2-1-1-2": Topology(num_replicas=2, tensor=2, pipeline=1, data=1),
    "2-2-1-2": Topology(num_replicas=2, tensor=2, pipeline=2, data=1),
    "1-3-1-1": Topology(num_replicas=1, tensor=1, pipeline=3, data=1),
    "1-1-2-3": Topology(num_replicas=3, tensor=1, pipeline=1, data=2),
    "1-1-2-1-2": Topology(num_replicas=1, tensor=1, pipeline=1, data=2, context=2),
}


def _config(topology: Topology) -> RunConfig:
    return tiny_config(
        model={"num_layers": 6},
        parallel={
            "num_replicas": topology.num_replicas,
            "tensor_model_parallel_size": topology.tensor,
            "pipeline_model_parallel_size": topology.pipeline,
            "context_parallel_size": topology.context,
        },
        training={"global_batch_size": 12},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_implicit_readers_see_the_groups_of_this_replica(layout: str) -> None:
    topology = LAYOUTS[layout]
    for wrong in run_ranks(_mirror_of, topology.world_size, _config(topology)):
        assert wrong == []


def test_every_getter_of_this_megatron_is_known() -> None:
    assert _getters().keys() <= GETTERS.keys() | set(ABSENT)


def _ranks_of_groups(config: RunConfig) -> dict[str, tuple[int, ...]]:
    groups = initialize_replicas(config)
    found = {"outer": groups.outer, "stage": groups.stage, "replica": groups.replica}
    found |= {name: getattr(groups.pg, name) for name in ("tp", "pp", "dp", "mp", "intra_dist_opt")}
    ranks = {k: tuple(torch.distributed.get_process_group_ranks(g)) for k, g in found.items()}
    finish_tiny()
    return ranks


AXES = {
    "outer": ("replica",),
    "stage": ("tp", "cp", "dp"),
    "replica": ("tp", "cp", "dp", "pp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
    "tp": ("tp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "mp": ("tp", "pp"),
}


@pytest.mark.parametrize("layout", ["2-2-1-2", "1-1-2-3"])
def test_groups_are_those_of_the_topology(layout: str) -> None:
    topology = LAYOUTS[layout]
    found = run_ranks(_ranks_of_groups, topology.world_size, _config(topology))
    for rank, groups in enumerate(found):
        for name, axes in AXES.items():
            (expected,) = (ranks for ranks in topology.groups(*axes) if rank in ranks)
            assert groups[name] == expected, name


def _twice(config: RunConfig) -> str:
    initialize_replicas(config)
    with pytest.raises(RuntimeMismatch) as refusal:
        initialize_replicas(config)
    finish_tiny()
    return str(refusal.value)


def _after_megatron(config: RunConfig) -> str:
    parallel_state.initialize_model_parallel()
    with pytest.raises(RuntimeMismatch) as refusal:
        initialize_replicas(config)
    return str(refusal.value)


@pytest.mark.parametrize("attempt", [_twice, _after_megatron])
def test_groups_are_made_once(attempt: Any) -> None:
    (message,) = run_ranks(attempt, 1, tiny_config())
    assert "already initialised" in message
    assert "do not call initialize_model_parallel" in message


def _with_its_own_seed(config: RunConfig) -> str:
    mine = config.model_copy(
        update={
            "training": config.training.model_copy(
                update={"seed": config.training.seed + torch.distributed.get_rank()}
            )
        }
    )
    with pytest.raises(ConfigError) as refusal:
        initialize_replicas(mine)
    return str(refusal.value)


def _with_its_own(what: str, config: RunConfig) -> str:
    """Start with another version, another source file or another manifest on rank 1."""
    from unittest import mock

    program, data = start.program_facts(), start.data_facts(config.data)
    if torch.distributed.get_rank() == 1:
        changed = {
            "a version": ("torch", "2.0.0"),
            "a source file": ("megatron_muloco/outer/guard.py", "0" * 16),
            "a dataset": (f"{config.data.train[0].path}.bin", "7 bytes"),
        }
        name, value = changed[what]
        assert name in program | data
        (data if what == "a dataset" else program)[name] = value
    with (
        mock.patch.object(start, "program_facts", return_value=program),
        mock.patch.object(start, "data_facts", return_value=data),
        pytest.raises(ConfigError) as refusal,
    ):
        initialize_replicas(config)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("a version", "torch: 2.0.0, not "),
        ("a source file", "megatron_muloco/outer/guard.py: 0000000000000000, not "),
        ("a dataset", ".bin: 7 bytes, not "),
    ],
)
def test_every_rank_must_run_the_same_program_on_the_same_data(what: str, named: str) -> None:
    for message in run_ranks(_with_its_own, 2, what, tiny_config(parallel={"num_replicas": 2})):
        assert "rank 1 runs another program or reads other data than rank 0" in message
        assert named in message


def test_every_rank_must_have_the_same_configuration() -> None:
    config = tiny_config(parallel={"num_replicas": 2})
    for message in run_ranks(_with_its_own_seed, 2, config):
        assert "rank 1 has a different configuration from rank 0 in training" in message
