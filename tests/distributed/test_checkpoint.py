"""Checkpoints of a real tiny model: stopped and resumed is never stopped, on any layout."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_muloco.checkpoint.state import RunState, read_description
from megatron_muloco.checkpoint.store import CheckpointStore
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, TinyRun, finish_tiny, start_tiny, tiny_config

STREAMING = {
    "kind": "nesterov",
    "lr": 0.7,
    "momentum": 0.6,
    "sync_interval": 4,
    "fragments": {"count": 2},
    "overlap_steps": 1,
}


def started(sections: dict[str, Any]) -> TinyRun:
    """Start a run, also one that the configuration does not offer yet: the state below is general."""
    with mock.patch("megatron_muloco.api.check"):
        return start_tiny(tiny_config(**sections))


def state_of(run: TinyRun, **scalars: Any) -> RunState:
    optimizer = run.optimizer
    return RunState(
        run.groups, optimizer.view, optimizer.inner, optimizer.synchronizer, run.config, scalars
    )


def store_of(run: TinyRun, directory: Path) -> CheckpointStore:
    return CheckpointStore(directory, run.groups)


def everything(run: TinyRun) -> dict[str, torch.Tensor]:
    """Return every tensor that training depends on, on this rank."""
    found = {f"parameter {name}": t for name, t in run.whole_parameters().items()}
    found |= {f"master {name}": t for name, (_, t) in run.masters().items()}
    for kind, tensors in run.optimizer.inner.named_state().items():
        found |= {f"{kind} {name}": t.clone() for name, t in tensors.items()}
    if run.optimizer.synchronizer is not None:
        for kind, tensors in run.optimizer.synchronizer.state_dict()["tensors"].items():
            found |= {f"outer {kind} {name}": t.clone() for name, t in tensors.items()}
    return found


def save_after(steps: int, more: int, sections: dict[str, Any], directory: Path) -> Any:
    """Train, save, train on; return what followed the save and the seconds that it took."""
    run = started(sections).train(steps)
    clock = time.perf_counter()
    store_of(run, directory).save(steps, state_of(run, consumed_samples=steps * 8))
    seconds = time.perf_counter() - clock
    run.train(more)
    finish_tiny()
    return run.losses[steps:], everything(run), seconds


def resume(path: Path, more: int, sections: dict[str, Any]) -> Any:
    run = started(sections)
    state = state_of(run)
    run.optimizer.steps = store_of(run, path).load(path, state).step
    assert state.scalars == {"consumed_samples": run.optimizer.steps * 8}
    run.train(more)
    finish_tiny()
    return run.losses, everything(run)


RUNS: dict[str, tuple[int, dict[str, Any], int]] = {
    # world, sections, step at which it stops
    "dp-muon-without-outer": (2, {"inner": MUON, "outer": {"kind": "none"}}, 3),
    "k1-at-a-sync-point": (1, {"inner": MUON}, 2),
    "k2-muon-between-sync-points": (2, {"inner": MUON, "parallel": {"num_replicas": 2}}, 3),
    "k2-dp2-adamw-in-flight": (
        4,
        {"inner": ADAMW, "parallel": {"num_replicas": 2}, "outer": STREAMING},
        2,
    ),
    "tp2-pp2-tied": (
        4,
        {
            "inner": MUON,
            "model": {"untie_embeddings_and_output_weights": False},
            "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        },
        3,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_never_stopped(name: str, tmp_path: Path) -> None:
    world, sections, step = RUNS[name]
    unstopped = run_ranks(save_after, world, step, 3, sections, tmp_path)
    resumed = run_ranks(resume, world, tmp_path, 3, sections)
    for (losses, state, _), (losses_again, state_again) in zip(unstopped, resumed, strict=True):
        assert losses_again == losses
        assert state_again.keys() == state.keys()
        for key in state:
            assert_equal(state_again[key], state[key], key)


def load_and_save_again(source: Path, target: Path, sections: dict[str, Any]) -> None:
    run = started(sections)
    state = state_of(run)
    step = store_of(run, source).load(source, state).step
    store_of(run, target).save(step, state)
    finish_tiny()
