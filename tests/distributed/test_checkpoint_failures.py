"""What goes wrong with checkpoints, and what the user is told."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from megatron_muloco.checkpoint import layout, loading, store
from megatron_muloco.checkpoint.store import CheckpointStore
from megatron_muloco.errors import CheckpointError, SyncError
from tests.distributed.test_checkpoint import (
    everything,
    resume,
    save_after,
    started,
    state_of,
    store_of,
)
from tests.support.faults import describe_again, fail_call
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, NESTEROV, finish_tiny

CODED = {**NESTEROV, "compression": {"kind": "statistical", "bits": 2}}
SECTIONS: dict[str, Any] = {"inner": MUON, "outer": CODED, "parallel": {"num_replicas": 2}}


def read_otherwise_on_one_rank(directory: Path) -> str:
    """Load where rank 1 alone reads moments that differ from those that were saved."""
    run = started(SECTIONS).train(1)
    checkpoints = store_of(run, directory)
    path = checkpoints.save(1, state_of(run))
    original = loading.digests_of

    def digests_of(*given: Any) -> dict[str, str]:
        found = original(*given)
        if torch.distributed.get_rank() == 1:
            found |= {kind: "0" * 16 for kind in found if kind.startswith("replica_1.inner")}
        return found

    with (
        mock.patch.object(loading, "digests_of", digests_of),
        pytest.raises(CheckpointError) as refusal,
    ):
        checkpoints.load(path, state_of(run))
    finish_tiny()
    return str(refusal.value)


def test_all_ranks_refuse_a_checkpoint_that_one_rank_reads_otherwise(tmp_path: Path) -> None:
    first, second = run_ranks(read_otherwise_on_one_rank, 2, tmp_path)
    assert first == second
    assert "replica_1.inner" in first


def fail_to_save(directory: Path) -> list[str]:
    """Save at step 1; fill the disk at different moments of the save of step 2; train on."""
    run = started(SECTIONS).train(1)
    checkpoints = store_of(run, directory)
    checkpoints.save(1, state_of(run))
    run.train(1)
    before = everything(run)
    full = OSError(errno.ENOSPC, "No space left on device")
    rank = torch.distributed.get_rank()
    moments: list[tuple[int, Any, str, int]] = [
        (0, layout, "begin", 1),
        (1, filesystem, "_write_item", 5),  # a tensor in the middle, on one rank
        (0, store, "write_description", 1),
        (0, layout, "publish", 1),
    ]
    messages = []
    for victim, owner, method, number in moments:
        owner_here, name = (owner, method) if rank == victim else (Path, "__str__")
        with (
            fail_call(owner_here, name, number=number if rank == victim else -1, error=full),
            pytest.raises(CheckpointError) as failure,
        ):
            checkpoints.save(2, state_of(run))
        messages.append(str(failure.value))
        found = checkpoints.latest()
        assert found is not None
        assert (found.step, found.note) == (1, "")
        torch.distributed.barrier()
        assert [p.name for p in sorted(directory.iterdir()) if p.is_dir()] == ["iter_0000001"]
    for key, tensor in everything(run).items():
        assert_equal(tensor, before[key], key)
    checkpoints.save(2, state_of(run))
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 2
    finish_tiny()
    return messages


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    messages = run_ranks(fail_to_save, 2, tmp_path)
    assert messages[0] == messages[1]
    for rank, message in zip((0, 1, 0, 0), messages[0], strict=True):
        assert f"{tmp_path / 'iter_0000002'} could not be written: rank {rank}:" in message
        assert "No space left on device" in message
        assert "earlier checkpoints are unchanged" in message


def drift_apart(directory: Path, background: bool) -> str:
    run = started(SECTIONS).train(1)
    anchor = next(iter(run.optimizer.synchronizer.anchors().values()))
    if torch.distributed.get_rank() == 1:
        anchor.view(torch.int32)[0] ^= 1
    with pytest.raises(SyncError) as failure:
        CheckpointStore(directory, run.groups, background=background).save(1, state_of(run))
    finish_tiny()
    return str(failure.value)


@pytest.mark.parametrize("background", [False, True], ids=["waited-for", "background"])
def test_replicas_with_different_anchors_are_not_saved(tmp_path: Path, background: bool) -> None:
    message, _ = run_ranks(drift_apart, 2, tmp_path / "run", background)
    assert "replicas hold different values of the anchor that they share" in message
    assert not (tmp_path / "run").exists()


def refuse(path: Path, sections: dict[str, Any]) -> str:
    run = started(sections)
    with pytest.raises(CheckpointError) as failure:
        store_of(run, path).load(path, state_of(run))
    finish_tiny()
    return str(failure.value)


def truncate(path: Path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(path: Path, prefix: str) -> None:
    """Flip one bit in the middle of a tensor, where no length changes."""
    from torch.distributed.checkpoint import FileSystemReader

    places = FileSystemReader(path).read_metadata().storage_data
    place = next(p for i, p in places.items() if i.fqn == f"{prefix}.output_layer.weight")
    file = path / place.relative_path
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    file.write_bytes(content)


def lose(path: Path, prefix: str) -> None:
    """Take one tensor out of the index of the tensors."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(path).read_metadata()
    name = f"{prefix}.output_layer.weight"
    del metadata.state_dict_metadata[name]
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != name}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    describe_again(path)


def later_format(path: Path) -> None:
    file = path / layout.STATE_FILE
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"format": 7, "a new key": 1}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"iter_0000001 is incomplete: __0_0.distcp has \d+ bytes of \d+"),
    "flipped-anchor": (partial(corrupt, prefix="anchor"), "the anchor tensors that were read have"),
    "flipped-moment": (
        partial(corrupt, prefix="replica_0.inner.exp_avg"),
        "the replica_0.inner.exp_avg tensors that were read have digest",
    ),
    "flipped-e": (
        partial(corrupt, prefix="replica_0.outer.residual"),
        "the replica_0.outer.residual tensors that were read have digest",
    ),
    "lost-e": (
        partial(lose, prefix="replica_0.outer.residual"),
        "the replica_0.outer.residual tensors that were read have digest",
    ),
    "flipped-f": (
        partial(corrupt, prefix="outer.owner_residual"),
        "the outer.owner_residual tensors that were read have digest",
    ),
    "lost-f": (
        partial(lose, prefix="outer.owner_residual"),
        "the outer.owner_residual tensors that were read have digest",
    ),
    "lost-file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "bad-index": (
        lambda p: (p / ".metadata").write_bytes(b"\x80"),
        "is not the index that was saved",
    ),
    "bad-state": (lambda p: (p / layout.STATE_FILE).write_text("{"), "muloco.json is damaged"),
    "later-format": (
        later_format,
        "has format 7, but this version of the package reads formats 1 and 2",
    ),
    "foreign": (lambda p: (p / layout.STATE_FILE).unlink(), "is a checkpoint of another program"),
}


def test_a_damaged_or_foreign_checkpoint_is_refused_with_its_reason(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"inner": MUON, "outer": CODED}
    run_ranks(save_after, 1, 1, 0, sections, tmp_path / "whole")
    for name, (damage, expected) in DAMAGE.items():
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        path = tmp_path / name / "iter_0000001"
        damage(path)
        (message,) = run_ranks(refuse, 1, path, sections)
        with pytest.raises(CheckpointError, match=expected):
            raise CheckpointError(message)
    run_ranks(resume, 1, tmp_path / "whole", 0, sections)


def test_a_run_that_means_something_else_is_refused_with_its_keys(tmp_path: Path) -> None:
    run_ranks(save_after, 1, 1, 0, {"inner": MUON}, tmp_path)
    other = {"inner": ADAMW, "model": {"num_layers": 1}, "data": {"seed": 43}}
    (message,) = run_ranks(refuse, 1, tmp_path, other)
    for key in ("inner.kind: 'muon' when saved, 'adamw' now", "model.num_layers", "data.seed"):
        assert key in message
    two = {"inner": MUON, "parallel": {"num_replicas": 2}}
    message, _ = run_ranks(refuse, 2, tmp_path, two)
    assert "parallel.num_replicas: 1 when saved, 2 now (replicas)" in message
    assert "allow_changes: [replicas]" in message
