"""Error feedback across a stop: the residuals e and f are state like any other."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_muloco.checkpoint.changes import residual_changes
from megatron_muloco.checkpoint.state import read_description
from megatron_muloco.comm.background import SteppedReducer
from megatron_muloco.training import build_optimizer
from tests.distributed.test_checkpoint import (
    everything,
    load_elsewhere,
    started,
    state_of,
    store_of,
    stored_tensors,
)
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, TinyRun, finish_tiny

STEPS = 8
STATISTICAL = {"kind": "statistical", "bits": 2, "granularity": "row"}


def outer(code: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {
        "kind": "nesterov",
        "lr": 0.7,
        "momentum": 0.6,
        "sync_interval": 4,
        "fragments": {"count": 2},
        "compression": code,
        **keys,
    }


# Fragment 0 is launched after steps 2 and 6, fragment 1 after 4 and 8; both are in flight after 4.
IN_FLIGHT = {"overlap_steps": 3, "max_in_flight": 2}
EXCEPTIONS = {"norm": "none", "embedding": 8}

# World, replicas, sections, steps at which it stops, step in which replica 1 is not finite.
CASES: dict[str, tuple[int, int, dict[str, Any], tuple[int, ...], int | None]] = {
    "k2-both-in-flight": (
        2,
        2,
        {"inner": ADAMW, "outer": outer({**STATISTICAL, "exceptions": EXCEPTIONS}, **IN_FLIGHT)},
        (1, 2, 4, 5, 7),
        None,
    ),
    "k2-restarted_from_anchor-by-tokens": (
        2,
        2,
        {"inner": MUON, "outer": outer(STATISTICAL, weighting="tokens", **IN_FLIGHT)},
        (5, 6, 7),
        6,
    ),
    "k3-host": (
        3,
        3,
        {"inner": ADAMW, "outer": outer(STATISTICAL, transport="host", overlap_steps=1)},
        (1, 4, 6),
        None,
    ),
    "k2-dp2-blocking": (4, 2, {"inner": MUON, "outer": outer(STATISTICAL)}, (2, 5), None),
    "k2-dp2-topk": (
        4,
        2,
        {
            "inner": ADAMW,
            "outer": outer(
                {"kind": "topk", "density": 0.1, "block_size": 64, "value_bits": 4},
                overlap_steps=1,
            ),
        },
        (1, 4, 6),
        None,
    ),
}


def sections_of(replicas: int, sections: dict[str, Any]) -> dict[str, Any]:
    training = {"global_batch_size": 4 * replicas, "train_iters": STEPS}
    return {"training": training, "parallel": {"num_replicas": replicas}, **sections}


def advance(run: TinyRun, step: int, poisoned: int | None) -> None:
    """Train up to ``step``; before step ``poisoned`` replica 1 loses a number."""
    while run.optimizer.steps < step:
        if run.optimizer.steps + 1 == poisoned and run.groups.coords.replica == 1:
            next(iter(run.optimizer.view.masters.values())).view(-1)[0] = math.nan
        run.train(1)


def end_of(run: TinyRun, poisoned: int | None) -> dict[str, torch.Tensor]:
    """Train to the end; return everything before and after the flush."""
    advance(run, STEPS, poisoned)
    before = everything(run)
    run.optimizer.flush()
    after = {f"flushed {key}": tensor for key, tensor in everything(run).items()}
    finish_tiny()
    return before | after


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_equal(actual[key], tensor, key)


def residuals_of(run: TinyRun, kind: str) -> dict[str, torch.Tensor]:
    tensors = run.optimizer.synchronizer.state_dict()["tensors"]
    return {name: tensor.clone() for name, tensor in tensors.get(kind, {}).items()}


def residual_names(run: TinyRun) -> list[str]:
    kinds = run.optimizer.synchronizer.kinds()
    return [kind for kind in ("residual", "owner_residual") if kind in kinds]


def any_value(tensors: dict[str, torch.Tensor]) -> bool:
    return any(bool(tensor.any()) for tensor in tensors.values())


def stop_and_resume(
    sections: dict[str, Any], stops: tuple[int, ...], poisoned: int | None, directory: Path
) -> None:
    """Compare, in each rank, an undisturbed run, one that saves often, and resumed ones."""
    undisturbed = end_of(started(sections), poisoned)
    saving = started(sections)
    store = store_of(saving, directory)
    store.keep = len(stops)
    for step in stops:
        advance(saving, step, poisoned)
        store.save(step, state_of(saving))
        forgotten = poisoned and step >= poisoned and saving.groups.coords.replica == 1
        lost_anything = any_value(residuals_of(saving, "residual"))
        if step == 1 or forgotten:
            assert not lost_anything
        elif step >= 4:  # whatever fragments a rank's shards are in, one was launched
            assert lost_anything
    assert_same(end_of(saving, poisoned), undisturbed)
    for kind in residual_names(saving):
        prefix = f"outer {kind} "
        assert any_value({k: t for k, t in undisturbed.items() if k.startswith(prefix)}), kind
    for step in stops:
        run = started(sections)
        path = directory / f"iter_{step:07d}"
        run.optimizer.steps = store_of(run, directory).load(path, state_of(run)).step
        assert run.optimizer.steps == step
        assert_same(end_of(run, poisoned), undisturbed)


@pytest.mark.parametrize("case", CASES)
def test_stopped_with_residuals_and_resumed_is_never_stopped(case: str, tmp_path: Path) -> None:
    world, replicas, sections, stops, poisoned = CASES[case]
    run_ranks(
        stop_and_resume,
        world,
        sections_of(replicas, sections),
        stops,
        poisoned,
        tmp_path,
        timeout_s=240,
    )


def in_the_foreground(*args: Any) -> None:
    with mock.patch.object(build_optimizer, "beside_training", lambda reducer, *_, **__: reducer):
        stop_and_resume(*args)


def in_steps(*args: Any) -> None:
    with mock.patch.object(build_optimizer, "beside_training", stepped):
        stop_and_resume(*args)


def stepped(reducer: Any, device: torch.device, *, overlap_steps: int) -> SteppedReducer:
    return SteppedReducer(reducer, overlap_steps=overlap_steps)


@pytest.mark.parametrize("reduce", [in_the_foreground, in_steps])
def test_f_is_saved_after_the_waits_that_change_it(
    reduce: Callable[..., None], tmp_path: Path
) -> None:
    """Without the communication thread nothing waits before the save or the apply does."""
    world, replicas, sections, _, _ = CASES["k2-both-in-flight"]
    sections = sections_of(replicas, sections)
    run_ranks(reduce, world, sections, (4, 7), None, tmp_path, timeout_s=240)


# ---- another layout -----------------------------------------------------------------------------

TIED = {"untie_embeddings_and_output_weights": False}
CHAIN: dict[str, tuple[int, dict[str, Any]]] = {  # each loads what the one before it wrote
    "tp2": (4, {"tensor_model_parallel_size": 2}),
    "dp2": (4, {}),
    "pp2": (4, {"pipeline_model_parallel_size": 2}),
}


def save_once(sections: dict[str, Any], step: int, directory: Path) -> None:
    run = started(sections)
    advance(run, step, None)
    store_of(run, directory).save(step, state_of(run))
    finish_tiny()


def test_another_layout_takes_over_e_and_f_in_model_space(tmp_path: Path) -> None:
    """Chunks, owners and units differ on each layout; what is stored does not."""
    sections = sections_of(2, {"inner": ADAMW, "model": TIED, "outer": outer(STATISTICAL)})
    sections["outer"] |= IN_FLIGHT
    source = tmp_path / "source"
    run_ranks(save_once, 2, sections, 5, source)
    expected = stored_tensors(source / "iter_0000005")
    digest = read_description(source / "iter_0000005").anchor_digest
    for kind in ("replica_0.outer.residual", "replica_1.outer.residual", "outer.owner_residual"):
        assert any_value({key: t for key, t in expected.items() if f".{kind}." in key}), kind
    for name, (world, parallel) in CHAIN.items():
        target = tmp_path / name
        there = {**sections, "parallel": {"num_replicas": 2, **parallel}}
        run_ranks(load_elsewhere, world, source, target, there)
        assert_same(stored_tensors(target / "iter_0000005"), expected)
        assert read_description(target / "iter_0000005").anchor_digest == digest
        source = target


# ---- another code -------------------------------------------------------------------------------

LINEAR = {"kind": "linear", "bits": 4}
CODES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "linear": LINEAR,
    "linear-without": {**LINEAR, "error_feedback": False},
    "topk": {"kind": "topk", "density": 0.1, "block_size": 64},
}
# Saved with, resumed with, residuals taken over, what is said.
E, F = "compression error of the pseudogradients (e)", "compression error of the mean (f)"
CHANGES = [
    ("linear", "linear", ("residual", "owner_residual"), []),
    ("none", "linear", (), [f"error feedback: {E} and {F}: zero, the checkpoint has none"]),
    ("linear-without", "topk", (), [f"error feedback: {E}: zero, the checkpoint has none"]),
    ("linear", "topk", ("residual",), [f"error feedback: {F}: dropped, this run keeps none"]),
    ("topk", "linear", ("residual",), [f"error feedback: {F}: zero, the checkpoint has none"]),
    ("linear", "none", (), [f"error feedback: {E} and {F}: dropped, this run keeps none"]),
]


def coded(code: str) -> dict[str, Any]:
    return sections_of(2, {"inner": ADAMW, "outer": outer(CODES[code])})


def change_code(directory: Path) -> list[list[str]]:
    """Save with each code, resume with another; return what is said about it."""
    kept: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for code in CODES:
        run = started(coded(code))
        advance(run, 5, None)
        store_of(run, directory / code).save(5, state_of(run))
        kinds = ("anchor", "residual", "owner_residual")
        kept[code] = {kind: residuals_of(run, kind) for kind in kinds}
        finish_tiny()
    said = []
    for before, after, taken, _ in CHANGES:
        run = started(coded(after))
        advance(run, 2, None)  # residuals of its own, which the load must not leave there
        description = store_of(run, directory).load(
            directory / before / "iter_0000005", state_of(run)
        )
        run.optimizer.steps = 5
        synchronizer = run.optimizer.synchronizer
        assert_same(residuals_of(run, "anchor"), kept[before]["anchor"])
        for kind in residual_names(run):
            found = residuals_of(run, kind)
            zeros = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
            assert_same(found, kept[before][kind] if kind in taken else zeros)
        advance(run, STEPS, None)
        finish_tiny()
        said.append(residual_changes(description.replicas[0]["digests"], synchronizer.kinds()))
    return said


def test_a_code_may_change_and_residuals_follow_where_they_can(tmp_path: Path) -> None:
    said = [lines for _, _, _, lines in CHANGES]
    assert run_ranks(change_code, 2, tmp_path, timeout_s=240) == [said, said]
