"""Rows of the memory plan are the bytes of the tensors that a run really holds, by kind."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.planning.memory import memory_plan
from tests.support.spawn import run_ranks
from tests.support.tiny_models import MUON, NESTEROV, finish_tiny, start_tiny, tiny_config

# Sizes (tp, pp, dp, replicas), and sections of the config.
CASES: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "bf16-adamw": ((1, 1, 1, 1), {"training": {"precision": "bf16"}}),
    "fp32-muon": ((1, 1, 1, 1), {"inner": MUON}),
    "muon-dp2-bf16": ((1, 1, 2, 1), {"inner": MUON, "training": {"precision": "bf16"}}),
    "muon-tp2": ((2, 1, 1, 1), {"inner": MUON}),
    "pp2-bf16-sums": (
        (1, 2, 1, 1),
        {"training": {"precision": "bf16", "accumulate_dtype": "bf16"}},
    ),
    "two-replicas": ((1, 1, 1, 2), {"inner": MUON}),
    "outer-state-on-host": (
        (1, 1, 1, 1),
        {"outer": {**NESTEROV, "state_device": "cpu"}},
    ),
}


def config_of(sizes: tuple[int, int, int, int], **sections: Any) -> RunConfig:
    tensor, pipeline, _, replicas = sizes
    return tiny_config(
        # Large enough that Megatron's padding, 128 elements a parameter, is below a per cent.
        model={
            "num_layers": 2,
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "num_query_groups": 4,
            "kv_channels": 32,
            "vocab_size": 512,
        },
        parallel={
            "num_replicas": replicas,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
        },
        **sections,
    )


def held(configs: list[RunConfig]) -> list[dict[str, int]]:
    """Return the bytes of this rank's tensors by kind, after two steps, for every config."""
    return [held_of(config) for config in configs]


def held_of(config: RunConfig) -> dict[str, int]:
    run = start_tiny(config).train(2)
    optimizer = run.optimizer
    assert optimizer.synchronizer is not None
    weights = list(run.model.parameters())
    of_weights = {tensor.untyped_storage()._cdata for tensor in weights}
    masters = [
        tensor
        for tensor in optimizer.view.masters.values()
        if tensor.untyped_storage()._cdata not in of_weights
    ]
    states = optimizer.view.optimizer.optimizer.state.values()
    state = optimizer.synchronizer._state
    found = {
        "weights": storages(weights),
        "gradients": storages(buffer.grad_data for buffer in run.model.buffers),
        "masters": storages(masters),
        "inner_state": storages(
            value
            for state in states
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        ),
        "outer_state": storages([*state.anchor.values(), *state.momentum.values()]),
    }
    finish_tiny()
    return found


def storages(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all distinct storages."""
    distinct = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in distinct.values())


@pytest.mark.parametrize("world", [1, 2])
def test_planned_rows_are_the_tensors_of_a_run(world: int) -> None:
    cases = {
        name: config_of(sizes, **sections)
        for name, (sizes, sections) in CASES.items()
        if sizes[0] * sizes[1] * sizes[2] * sizes[3] == world
    }
    by_rank = run_ranks(held, world, list(cases.values()))
    for index, (name, config) in enumerate(cases.items()):
        plan = memory_plan(config, topology_of(config, world))
        fullest = max((of[index] for of in by_rank), key=lambda found: sum(found.values()))
        planned = {kind: getattr(plan, kind) for kind in fullest}
        assert fullest == pytest.approx(planned, rel=0.05), name
        if plan.outer_on_host:
            assert fullest["outer_state"] == plan.host, name
