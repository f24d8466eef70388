"""Checkpoints of a real tiny model: stopped and resumed is never stopped, on any layout."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_muloco.checkpoint.state import RunState, read_description
from megatron_muloco.checkpoint.store import CheckpointStore
from megatron_muloco.runtime.megatron import wrap_data_parallel
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
    """Start a run, also one that the configuration does not offer yet: the state below is general.

    Buckets are small and of odd size, so that shards end inside rows and buckets are padded.
    """
    wrap = partial(wrap_data_parallel, bucket_size=3001)
    with (
        mock.patch("megatron_muloco.training.start.check"),
        mock.patch("tests.support.tiny_models.wrap_data_parallel", wrap),
    ):
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
        {
            "inner": ADAMW,
            "parallel": {"num_replicas": 2},
            "outer": STREAMING,
            "training": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        },
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


def load_elsewhere(path: Path, again: Path, sections: dict[str, Any]) -> None:
    """Load into this layout and save from it."""
    run = started(sections)
    state = state_of(run)
    step = store_of(run, path).load(path, state).step
    store_of(run, again).save(step, state)
    finish_tiny()


def stored_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint but generator states, whole, read without our code."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors,
        storage_reader=FileSystemReader(directory),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    flat: dict[str, torch.Tensor] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                visit(f"{prefix}.{name}", child)
        else:
            flat[prefix] = node

    visit("", tensors)
    return {key: tensor for key, tensor in flat.items() if not key.startswith(".rng")}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-uneven": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1},
    ),
    "dp3": (3, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "tp2-dp2": (4, {"tensor_model_parallel_size": 2}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_layout_reads_and_writes_the_same_model_space(tied: bool, tmp_path: Path) -> None:
    """Relation 7: a change of TP, PP or DP keeps every stored tensor and the anchor's digest."""
    model = {"num_layers": 4, "untie_embeddings_and_output_weights": not tied}
    sections = {"inner": MUON, "model": model, "training": {"global_batch_size": 12}}
    source = tmp_path / "source"
    run_ranks(save_after, 1, 3, 0, sections, source)
    expected = stored_tensors(source / "iter_0000003")
    digest = read_description(source / "iter_0000003").anchor_digest
    for name, (world, parallel) in LAYOUTS.items():
        target = tmp_path / name
        run_ranks(load_elsewhere, world, source, target, sections | {"parallel": parallel})
        written = stored_tensors(target / "iter_0000003")
        assert written.keys() == expected.keys()
        for key in expected:
            assert_equal(written[key], expected[key], f"{name}: {key}")
        assert read_description(target / "iter_0000003").anchor_digest == digest


def flush_and_store(directory: Path, sections: dict[str, Any]) -> tuple[Any, Any, Any]:
    run = started(sections).train(3)
    store, state = store_of(run, directory), state_of(run)
    path = store.save(3, state)
    before = dict(run.optimizer.synchronizer.state_dict()["tensors"]["anchor"])
    before = {name: tensor.clone() for name, tensor in before.items()}
    run.optimizer.flush()
    store.save_final_anchor(path, state)
    flushed = {name: t.clone() for name, (_, t) in run.masters().items()}
    store.load_anchor(path, run.optimizer.view)
    final = {name: t for name, (_, t) in run.masters().items()}
    store.load_anchor(path, run.optimizer.view, flushed=False)
    unflushed = {name: t for name, (_, t) in run.masters().items()}
    finish_tiny()
    for name in before:
        assert_equal(final[name], flushed[name], name)
        assert_equal(unflushed[name], before[name], name)
    return final["output_layer.weight"], unflushed["output_layer.weight"], None


def test_the_flushed_anchor_is_stored_beside_the_state_before_it(tmp_path: Path) -> None:
    sections = {"parallel": {"num_replicas": 2}, "training": {"train_iters": 3}}
    for final, unflushed, _ in run_ranks(flush_and_store, 2, tmp_path, sections):
        assert not torch.equal(final, unflushed)


OBJECT_COLLECTIVES = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
)


def messages(directory: Path) -> list[str]:
    """Save and load; return the object collectives that are not over groups of the package."""
    outside: list[str] = []
    control = set()

    def spy(name: str) -> Any:
        original = getattr(torch.distributed, name)

        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group in (None, torch.distributed.group.WORLD):
                outside.append(name)
            elif group.size() == torch.distributed.get_world_size():
                control.add(group)
            return original(*args, group=group, **kwargs)

        return mock.patch.object(torch.distributed, name, call)

    with ExitStack() as stack:
        for name in OBJECT_COLLECTIVES:
            stack.enter_context(spy(name))
        run = started({"parallel": {"num_replicas": 2}, "inner": MUON}).train(1)
        path = store_of(run, directory).save(1, state_of(run))
        store_of(run, directory).load(path, state_of(run))
    assert control == {run.groups.control}
    finish_tiny()
    return outside


def test_no_small_message_uses_the_default_group(tmp_path: Path) -> None:
    for outside in run_ranks(messages, 4, tmp_path, timeout_s=240):
        assert outside == []
