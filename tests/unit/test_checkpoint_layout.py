"""Checkpoint directories: a kill between any two operations leaves a whole checkpoint."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.layout import find_latest
from megatron_muloco.errors import CheckpointError

WHOLE = (layout.STATE_FILE, ".metadata", "metadata.json")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """Kill at the ``number``-th operation on the file system; yields the operations made."""
    made: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == number:
                if name == "rmtree":  # killed while deleting: part of the directory is gone
                    next(f for f in Path(args[0]).iterdir() if f.is_file()).unlink()
                raise Killed
            return original(*args, **kwargs)

        return call

    with (
        mock.patch.object(Path, "mkdir", counted("mkdir", Path.mkdir)),
        mock.patch.object(Path, "rename", counted("rename", Path.rename)),
        mock.patch.object(Path, "replace", counted("replace", Path.replace)),
        mock.patch.object(os, "fsync", counted("fsync", os.fsync)),
        mock.patch.object(shutil, "rmtree", counted("rmtree", shutil.rmtree)),
    ):
        yield made


def save(
    directory: Path, step: int, *, keep: int = 2, mark: str = "", retain: int | None = None
) -> Path:
    """Do what `CheckpointStore.save` does to the directory, without tensors."""
    path = layout.checkpoint_path(directory, step)
    temporary = layout.begin(path)
    for name in WHOLE:
        layout.write_file(temporary / name, mark)
    layout.publish(path)
    layout.set_latest(directory, step)
    layout.prune(directory, step=step, keep=keep, retain_interval=retain)
    return path


def operations(directory: Path, step: int) -> int:
    shutil.copytree(directory, directory.with_name("dry"))
    with killed_at(0) as made:
        save(directory.with_name("dry"), step)
    shutil.rmtree(directory.with_name("dry"))
    return len(made)


@pytest.mark.parametrize("step", [30, 20], ids=["a new step", "the latest step once more"])
def test_a_kill_anywhere_leaves_a_whole_checkpoint(step: int, tmp_path: Path) -> None:
    count = 1 + 10
    number = 1
    while number <= count:
        directory = tmp_path / f"killed-at-{number}"
        save(directory, 10)
        save(directory, 20, mark="old")
        count = operations(directory, step)
        with killed_at(number), pytest.raises(Killed):
            save(directory, step, mark="new")
        found = find_latest(directory)
        assert found is not None
        assert layout.is_complete(found.path)
        assert found.step in (20, step)
        # The next save repairs everything.
        save(directory, step, mark="newer")
        assert find_latest(directory) == layout.Found(directory / f"iter_{step:07d}", step)
        assert (directory / f"iter_{step:07d}" / layout.STATE_FILE).read_text() == "newer"
        kept = {10, 20} if step == 20 else {20, 30}
        assert sorted(os.listdir(directory)) == [
            *(f"iter_{s:07d}" for s in sorted(kept)),
            layout.LATEST_FILE,
        ]
        number += 1
    assert count >= 10


def test_the_newest_are_kept_and_an_abandoned_future_is_left_alone(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert find_latest(tmp_path) == layout.Found(tmp_path / "iter_0000040", 40)
    save(tmp_path, 35, keep=1)  # the run was continued from 30
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert names == ["iter_0000035", "iter_0000040"]
    assert find_latest(tmp_path) == layout.Found(tmp_path / "iter_0000035", 35)


def test_multiples_of_the_retain_interval_are_kept_for_ever(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(tmp_path, step, keep=2, retain=30)
    steps = sorted(layout.step_of(path) for path in tmp_path.glob("iter_*"))
    assert steps == [30, 60, 80, 90]


def test_a_probe_writes_and_leaves_nothing(tmp_path: Path) -> None:
    layout.probe(tmp_path, "0")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        layout.probe(tmp_path / "gone", "0")
    with pytest.raises(OSError, match="/proc"):  # not writable, also for root
        layout.probe(Path("/proc"), "0")


def test_room_is_counted_with_what_the_run_deletes_in_time(tmp_path: Path) -> None:
    def room(free: int, needed: int) -> str:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with mock.patch.object(shutil, "disk_usage", return_value=usage):
            return layout.room_for(tmp_path, needed=needed, keep=2)

    assert room(300, 100) == ""
    assert "has 299 bytes free. checkpoint.keep 2 needs about 300" in room(299, 100)
    with pytest.raises(CheckpointError, match=r"99 bytes free, and one checkpoint .* 100\."):
        room(99, 100)
    save(tmp_path, 10, mark="x" * 50)  # three files: 150 bytes that a later save replaces
    assert room(150, 100) == ""
    assert "WARNING" in room(149, 100)
    (tmp_path / ".tmp-iter_0000020").write_text("x" * 20)  # the next save removes it
    assert "WARNING" in room(80, 100)
    with pytest.raises(CheckpointError):
        room(79, 100)


def test_an_empty_or_missing_directory_has_nothing_to_resume(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "there is no latest_"), ("50\n", "step 50, which"), ("release", "holds 'release'")],
)
def test_without_a_usable_latest_file_the_newest_complete_is_taken(
    text: str | None, said: str, tmp_path: Path
) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "iter_0000030").mkdir()
    file = tmp_path / layout.LATEST_FILE
    file.unlink() if text is None else file.write_text(text)
    found = find_latest(tmp_path)
    assert found is not None
    assert found.path == tmp_path / "iter_0000020"
    assert said in found.note


def test_a_run_does_not_start_over_beside_checkpoints_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "iter_0000030").mkdir()
    with pytest.raises(CheckpointError, match=r"iter_0000030.*does not start from scratch"):
        find_latest(tmp_path)


def test_a_directory_of_checkpoints_stands_for_its_latest(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    assert layout.resolve(tmp_path) == layout.resolve(path) == path
    with pytest.raises(CheckpointError, match="there is no checkpoint directory"):
        layout.resolve(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        layout.resolve(tmp_path / "empty")
