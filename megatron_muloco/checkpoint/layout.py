"""What a checkpoint directory looks like, and how one becomes visible. No torch.

    DIR/latest_checkpointed_iteration.txt     the step to resume from; replaced last
    DIR/iter_0000100/                         one published checkpoint
    DIR/.tmp-iter_0000200/                    being written, or left by a killed save
    DIR/.old-iter_0000100/                    set aside while a new save takes its place

A checkpoint is written under its temporary name, renamed, and only then named by the latest file,
so that a kill at any moment leaves the previous one whole and named. One run at a time writes to a
directory.
"""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_muloco.errors import CheckpointError

__all__ = [
    "COMMON_FILE",
    "CONFIG_FILE",
    "FINAL_ANCHOR",
    "LATEST_FILE",
    "STATE_FILE",
    "Found",
    "abandon",
    "begin",
    "checkpoint_path",
    "discard",
    "find_latest",
    "is_complete",
    "prune",
    "publish",
    "resolve",
    "set_latest",
    "step_of",
    "sync_directory",
    "temporary_path",
    "write_file",
]

STATE_FILE = "muloco.json"
CONFIG_FILE = "run_config.yaml"
COMMON_FILE = "common.pt"
FINAL_ANCHOR = "final_anchor"
LATEST_FILE = "latest_checkpointed_iteration.txt"  # Megatron's name
_INDEX_FILES = (".metadata", "metadata.json")  # of the torch_dist format
_PUBLISHED = re.compile(r"^iter_(\d{7,})$")
_TEMPORARY, _ASIDE = ".tmp-", ".old-"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: Its directory.
        step: The inner step after which it was saved.
        note: What the user should know about the choice, or an empty string.
    """

    path: Path
    step: int
    note: str = ""


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the published name of the checkpoint of ``step``."""
    return directory / f"iter_{step:07d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(path.name.rpartition("_")[2])


def temporary_path(path: Path) -> Path:
    """Return the name under which ``path`` is written."""
    return path.with_name(_TEMPORARY + path.name)


def is_complete(path: Path) -> bool:
    """Whether ``path`` has the files that every checkpoint of this package has."""
    return all((path / name).is_file() for name in (STATE_FILE, *_INDEX_FILES))


def resolve(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, the latest one in it if it is a directory of them.

    Raises:
        CheckpointError: There is nothing at ``path``, or nothing that this package wrote.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"there is no checkpoint directory {path}. Give a directory that holds iter_* "
            "directories, or one of them."
        )
    if _PUBLISHED.match(path.name) or is_complete(path):
        return path
    found = find_latest(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: neither {LATEST_FILE} nor an iter_* directory. Give the "
            "checkpoint.dir of the run, or one of its iter_* directories."
        )
    return found.path


def find_latest(directory: Path) -> Found | None:
    """Return the checkpoint to resume from, ``None`` where no run has saved anything yet.

    Raises:
        CheckpointError: There are checkpoints, but none that can be loaded: starting from scratch
            beside them would be a surprise.
    """
    published = _published(directory)
    whole = {step: path for step, path in published.items() if is_complete(path)}
    named, problem = _named_step(directory)
    if named is not None and named in whole:
        return Found(whole[named], named)
    if not published and named is None and not problem:
        return None
    if not whole:
        seen = problem or f"{LATEST_FILE} names step {named}" if not published else "it has only "
        raise CheckpointError(
            f"{directory} holds no complete checkpoint of this package (an iter_* directory with "
            f"{STATE_FILE}): {seen}{', '.join(path.name for path in published.values())}. A run "
            "does not start over beside it; point checkpoint.resume at another directory, or "
            "checkpoint.dir at an empty one."
        )
    step = max(whole)
    lost = f"step {named}, which {LATEST_FILE} names, is not there"
    reason = problem or (f"there is no {LATEST_FILE}" if named is None else lost)
    note = f"{directory}: {reason}; using the newest complete checkpoint, {whole[step].name}"
    return Found(whole[step], step, note)


def begin(path: Path) -> Path:
    """Create the empty temporary directory of ``path``; remove what killed saves have left.

    Returns:
        The temporary directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in path.parent.iterdir():
        superseded = entry.name.startswith(_ASIDE) and is_complete(_real(entry))
        if superseded or entry.name.startswith(_TEMPORARY):
            _remove(entry)
    temporary = temporary_path(path)
    temporary.mkdir()
    return temporary


def publish(path: Path) -> None:
    """Give a finished temporary directory its name; an older one of that name is replaced."""
    temporary = temporary_path(path)
    sync_directory(temporary)
    aside = path.with_name(_ASIDE + path.name)
    if is_complete(path):
        discard(aside)
        path.rename(aside)
    discard(path)
    temporary.rename(path)
    sync_directory(path.parent)


def set_latest(directory: Path, step: int) -> None:
    """Name the checkpoint to resume from, atomically."""
    temporary = directory / f"{_TEMPORARY}{LATEST_FILE}"
    write_file(temporary, f"{step}\n")
    temporary.replace(directory / LATEST_FILE)
    sync_directory(directory)


def prune(directory: Path, *, step: int, keep: int) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints up to ``step``; return what was deleted.

    Later ones, of a run that was continued from an earlier step, stay until that step is reached.
    """
    discard(directory / f"{_ASIDE}{checkpoint_path(directory, step).name}")
    past = sorted(s for s in _published(directory) if s <= step)
    superseded = [checkpoint_path(directory, s) for s in past[:-keep]]
    for path in superseded:
        # Away by one rename first: a half-deleted directory must not look like a checkpoint.
        doomed = temporary_path(path)
        path.rename(doomed)
        _remove(doomed)
    return superseded


def discard(path: Path) -> None:
    """Delete a directory, if it is there."""
    if path.exists():
        _remove(path)


def abandon(temporary: Path) -> None:
    """Delete what a failed save has written, as far as possible: a full disk needs the space."""
    shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Write a directory's own entries through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _published(directory: Path) -> dict[int, Path]:
    """Return step -> directory; one set aside counts while nothing has taken its place."""
    entries: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    found: dict[int, Path] = {}
    for entry in sorted(entries):  # ".old-iter_" sorts before "iter_", which wins
        match = _PUBLISHED.match(entry.name.removeprefix(_ASIDE))
        if match and entry.is_dir():
            found[int(match.group(1))] = entry
    return found


def _real(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(_ASIDE))


def _named_step(directory: Path) -> tuple[int | None, str]:
    """Return the step in the latest file, or ``None`` and what is wrong with it."""
    path = directory / LATEST_FILE
    if not path.is_file():
        return None, ""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        return None, f"{LATEST_FILE} holds {text[:40]!r}, which is no step"
    return int(text), ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
