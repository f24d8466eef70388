"""Saves in the background: the same files as a save that training waits for, and no less safe."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.background import SaveResult
from megatron_muloco.checkpoint.directory import PlannedWrite
from megatron_muloco.checkpoint.layout import INDEX_FILE, STATE_FILE, find_latest
from megatron_muloco.checkpoint.store import CheckpointStore
from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.config.schema import CheckpointConfig
from megatron_muloco.errors import CheckpointError
from megatron_muloco.planning.memory import checkpoint_bytes, memory_plan
from tests.distributed.test_checkpoint import STREAMING, everything, started, state_of
from tests.support.faults import kill_at_call
from tests.support.spawn import RankFailure, run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, NESTEROV, TinyRun, finish_tiny

CODED = {**NESTEROV, "compression": {"kind": "statistical", "bits": 2}}
K2 = {"num_replicas": 2}
RUNS: dict[str, tuple[int, dict[str, Any], int]] = {  # world, sections, step of the save
    "without-outer-dp2": (2, {"inner": MUON, "outer": {"kind": "none"}}, 1),
    "k2-at-a-sync-point": (2, {"inner": MUON, "parallel": K2}, 2),
    "k2-codec": (2, {"inner": MUON, "outer": CODED, "parallel": K2}, 3),
    "k2-dp2-in-flight": (4, {"inner": ADAMW, "parallel": K2, "outer": STREAMING}, 2),
    "k2-tp2": (4, {"inner": MUON, "parallel": {**K2, "tensor_model_parallel_size": 2}}, 1),
}


def behind(run: TinyRun, path: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(path, run.groups, background=True, **options)


def contents(path: Path) -> dict[str, bytes]:
    """Return all files but torch's index, which holds a random name, and without its digest."""
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.name != INDEX_FILE}
    description = json.loads(files[STATE_FILE])
    del description["index_digest"], description["content_digest"]
    return files | {STATE_FILE: json.dumps(description).encode()}


def save_both_ways(tmp_path: Path, sections: dict[str, Any], step: int) -> None:
    run = started(sections).train(step)
    state = state_of(run, consumed_samples=8)
    waited = CheckpointStore(tmp_path / "waited", run.groups).save(step, state)
    store = behind(run, tmp_path / "beside")
    path = store.save(step, state)
    run.train(2)  # the copy must not see it
    assert store.wait()
    torch.distributed.barrier()
    first, second = contents(waited), contents(path)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name
    before = everything(run)
    # A second save, into memory that the first one has used, and a load of each.
    store.save(step + 2, state)
    assert store.wait()
    store.load(path, state)
    store.load(layout.checkpoint_path(store.directory, step + 2), state)
    for key, tensor in everything(run).items():
        assert_equal(tensor, before[key], key)
    finish_tiny()


@pytest.mark.parametrize("name", RUNS)
def test_a_background_save_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    world, sections, step = RUNS[name]
    run_ranks(save_both_ways, world, tmp_path, sections, step)


# ---- while the file is written -----------------------------------------------------------------


@contextmanager
def held_back(owner: Any, name: str) -> Iterator[threading.Event]:
    """Make a call of the writer wait for the event."""
    may_go, plain = threading.Event(), getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        assert may_go.wait(60)
        return plain(*args, **kwargs)

    with mock.patch.object(owner, name, call):
        yield may_go


def until_news(store: CheckpointStore) -> SaveResult:
    """Poll as the training loop does between steps; on rank 0, where the news arrives first."""
    while (result := store.poll()) is None:
        time.sleep(0.01)
    return result


def train_while_writing(path: Path) -> None:
    run = started({"inner": MUON, "parallel": K2})
    store = behind(run, path)
    run.train(2)
    with held_back(PlannedWrite, "write") as may_go:
        store.save(2, state_of(run))
        for _ in range(3):
            run.train(1)
            assert store.poll() is None
        assert not list(path.glob("iter_*"))
        may_go.set()
        assert store._saving is not None
        store._saving._writing.join()
    run.train(1)
    torch.distributed.barrier()
    if torch.distributed.get_rank():
        assert store.poll() is None, "it posts, and hears of the end when it waits"
    else:
        assert until_news(store) == SaveResult(path / "iter_0000002", 2)
        assert find_latest(path) == layout.Found(path / "iter_0000002", 2)
        assert store.poll() is None, "news comes once"
    assert store.wait()
    news = store.poll()
    assert (news is None) == (torch.distributed.get_rank() == 0)
    assert store.wait(), "nothing is left to wait for"
    finish_tiny()


def test_training_goes_on_and_rank_0_publishes_between_two_steps(tmp_path: Path) -> None:
    run_ranks(train_while_writing, 2, tmp_path)


def save_twice(path: Path) -> None:
    run = started({"inner": MUON}).train(1)
    store, state = behind(run, path), state_of(run)
    with held_back(layout, "publish") as may_go:
        store.save(1, state)
        run.train(1)
        threading.Timer(0.2, may_go.set).start()
        store.save(2, state)  # waits for the first one
        assert store.poll() == SaveResult(path / "iter_0000001", 1)
    assert store.wait()
    assert store.poll() == SaveResult(path / "iter_0000002", 2)
    finish_tiny()


def test_a_new_save_waits_for_the_one_before_it(tmp_path: Path) -> None:
    run_ranks(save_twice, 1, tmp_path)


# ---- failures ----------------------------------------------------------------------------------


def flip(planned: PlannedWrite) -> list[Any]:
    """Write, and change one bit on disk before the file is read back."""
    written = PLAIN_WRITE(planned)
    # The largest chunk is mostly values, the others mostly what torch adds to them.
    place = max((chunk.storage_data for chunk in written), key=lambda place: place.length)
    file = planned.directory / place.relative_path
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    file.write_bytes(content)
    return written


PLAIN_WRITE = PlannedWrite.write


def fail_behind(path: Path) -> list[str]:
    run = started({"inner": MUON, "outer": CODED, "parallel": K2}).train(1)
    store, state = behind(run, path), state_of(run)
    store.save(1, state)
    run.train(1)
    rank = torch.distributed.get_rank()
    error = OSError(28, "No space left on device")
    faults: list[tuple[int, Any]] = [
        (1, mock.patch.object(filesystem, "_write_item", side_effect=error)),
        (1, mock.patch.object(PlannedWrite, "write", flip)),
        (0, mock.patch.object(layout, "publish", side_effect=error)),
        (0, mock.patch.object(PlannedWrite, "finish", side_effect=RuntimeError("index"))),
    ]
    messages = []
    for victim, fault in faults:
        assert store.wait()
        store.poll()
        with fault if rank == victim else mock.patch.object(Path, "__str__", Path.__str__):
            store.save(2, state)
            done = store.wait()
        news = store.poll()
        assert news is not None
        messages.append(news.error)
        assert not done, messages
        torch.distributed.barrier()
        assert [p.name for p in sorted(path.iterdir()) if p.is_dir()] == ["iter_0000001"]
        torch.distributed.barrier()
        store.save(1, state)
    store.save(2, state)
    assert store.wait()
    assert find_latest(path) == layout.Found(path / "iter_0000002", 2)
    finish_tiny()
    return messages


def test_a_failed_background_save_leaves_the_older_one_and_is_told(tmp_path: Path) -> None:
    messages, others = run_ranks(fail_behind, 2, tmp_path)
    assert messages == others
    full, flipped, unpublished, index = messages
    assert full.startswith("rank 1: No space left on device: the disk of ")
    assert "bytes there, and" in full
    assert flipped.startswith("rank 1: ")
    assert "does not hold what was written" in flipped or "PytorchStreamReader" in flipped
    assert unpublished == "rank 0: [Errno 28] No space left on device"
    assert index == "rank 0: RuntimeError: index"


def fill_dev_full(path: Path, background: bool) -> str:
    """Let torch write into a device that is always full."""
    run = started({"inner": MUON}).train(1)
    store = CheckpointStore(path, run.groups, background=background)
    begin = layout.begin

    def begin_full(final: Path) -> Path:
        temporary = begin(final)
        (temporary / "__0_0.distcp").symlink_to("/dev/full")
        return temporary

    with mock.patch.object(layout, "begin", begin_full):
        if background:
            store.save(1, state_of(run))
            assert not store.wait()
            news = store.poll()
            assert news is not None
            message = news.error
        else:
            with pytest.raises(CheckpointError) as failure:
                store.save(1, state_of(run))
            message = str(failure.value)
    assert store.standing() == f"There is no whole checkpoint in {path}."
    finish_tiny()
    return message


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_called_full_with_what_is_needed_and_free(
    background: bool, tmp_path: Path
) -> None:
    (message,) = run_ranks(fill_dev_full, 1, tmp_path, background)
    assert "rank 0: No space left on device: the disk of" in message
    assert re.search(r"This rank writes [\d,]+ bytes there, and [\d,]+ bytes are free", message)


# ---- kills -------------------------------------------------------------------------------------


@contextmanager
def snapshots(source: Path, target: Path) -> Iterator[list[str]]:
    """Copy the directory before every file operation of the writer: what a kill there leaves."""
    made: list[str] = []
    copying = threading.Lock()

    def before(name: str, plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and copying.acquire(False):
                try:
                    shutil.copytree(source, target / f"{len(made):03d}")
                    made.append(name)
                finally:
                    copying.release()
            return plain(*args, **kwargs)

        return call

    places: list[tuple[Any, str]] = [
        *((Path, name) for name in ("mkdir", "rename", "replace", "open", "unlink")),
        (os, "fsync"),
        (shutil, "rmtree"),
    ]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, before(name, getattr(owner, name))))
        yield made


def killed_anywhere(path: Path, copies: Path) -> list[str]:
    run = started({"inner": MUON, "outer": CODED}).train(1)
    store, state = behind(run, path, keep=1), state_of(run)
    store.save(1, state)
    assert store.wait()
    older = everything(run)
    run.train(1)
    newer = everything(run)
    with snapshots(path, copies) as made:
        store.save(2, state)
        assert store.wait()
    assert find_latest(path) == layout.Found(path / "iter_0000002", 2)
    steps = []
    for number in range(len(made)):
        found = find_latest(copies / f"{number:03d}")
        assert found is not None, made[number]
        store.load(found.path, state)  # compares every digest
        expected = older if found.step == 1 else newer
        for key, tensor in everything(run).items():
            assert_equal(tensor, expected[key], f"{made[number]} {number}: {key}")
        steps.append(found.step)
    assert steps == sorted(steps), "once the new one counts it stays"
    assert set(steps) == {1, 2}
    finish_tiny()
    return made


def test_a_kill_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    (made,) = run_ranks(killed_anywhere, 1, tmp_path / "run", tmp_path / "copies")
    assert {"open", "fsync", "rename", "replace", "rmtree"} <= set(made)


def killed_for_real(path: Path) -> None:
    run = started({"inner": MUON, "parallel": K2}).train(1)
    store, state = behind(run, path), state_of(run)
    store.save(1, state)
    assert store.wait()
    if torch.distributed.get_rank() == 1:
        with kill_at_call(filesystem, "_write_item", number=5):
            store.save(2, state)
            store.wait()
    store.save(2, state)
    store.wait()


def test_a_rank_that_is_killed_while_it_writes_costs_one_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        run_ranks(killed_for_real, 2, tmp_path)
    assert find_latest(tmp_path) == layout.Found(tmp_path / "iter_0000001", 1)


# ---- plan --------------------------------------------------------------------------------------


def planned_and_written(path: Path, sections: dict[str, Any], step: int) -> tuple[int, ...]:
    run = started(sections).train(step)
    config = run.config.model_copy(
        update={"checkpoint": CheckpointConfig(dir=str(path), async_save=True)}
    )
    topology = run.groups.topology
    store = behind(run, path)
    store.save(step, state_of(run))
    assert store.wait()
    assert store._copies is not None
    plan, held = memory_plan(config, topology), store._copies.nbytes
    whole = sum(gather_objects(run.groups.control, held))
    finish_tiny()
    assert plan.saved_copy == plan.saved
    return plan.saved_copy, held, checkpoint_bytes(config, topology), whole


@pytest.mark.parametrize("name", ["without-outer-dp2", "k2-codec", "k2-tp2"])
def test_the_plan_counts_the_copy_and_the_checkpoint(name: str, tmp_path: Path) -> None:
    world, sections, step = RUNS[name]
    ranks = run_ranks(planned_and_written, world, tmp_path, sections, step)
    for copy, held, planned, whole in ranks:
        # Parts are cut at rows, shards where buckets are; the models here have few rows.
        assert held <= 1.1 * copy
        assert whole <= planned <= 1.1 * whole
