"""Names of the files and directories of checkpoints, and the order in which they appear.

::

    DIR/latest_checkpointed_iteration.txt     the step to resume from; replaced last
    DIR/iter_0000100/                         one published checkpoint
    DIR/.tmp-iter_0000200/                    being written, or left by a killed save
    DIR/.old-iter_0000100/                    set aside while a new save takes its place

A checkpoint is written under its temporary name and synced, then renamed, and only then does the
latest file name it. So a kill or a power failure at any moment leaves the previous checkpoint
complete and named. Only one run at a time may write to a directory (`checkpoint.lease`). Only rank
0 calls the functions here, and `probe` every rank; they use neither torch nor collectives.
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
    "INDEX_FILE",
    "LATEST_FILE",
    "STATE_FILE",
    "Found",
    "abandon",
    "begin",
    "checkpoint_path",
    "discard",
    "find_latest",
    "is_complete",
    "probe",
    "prune",
    "publish",
    "resolve",
    "room_for",
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
INDEX_FILE = ".metadata"
_INDEX_FILES = (INDEX_FILE, "metadata.json")  # of the torch_dist format
_PUBLISHED = re.compile(r"^iter_(\d{7,})$")
_STEP = re.compile(r"[0-9]{1,18}")
_TEMPORARY, _ASIDE = ".tmp-", ".old-"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        path: Its directory.
        step: The inner step after which it was saved.
        note: Message to the user about an unexpected choice, or an empty string.
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
    """Return ``path`` if it is a checkpoint, or the latest checkpoint inside it.

    Raises:
        CheckpointError: ``path`` does not exist, or holds nothing that this package wrote.
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
    """Return the checkpoint to resume from, or ``None`` if no run has saved anything yet.

    That is the one that the latest file names. If it is missing or incomplete, it is the newest
    complete one, with a note.

    Raises:
        CheckpointError: There are checkpoints, but none can be loaded. Starting from scratch beside
            them would look like a resume and lose the run.
    """
    published = _published(directory)
    whole = {step: path for step, path in published.items() if is_complete(path)}
    named, problem = _named_step(directory)
    if named is not None and named in whole:
        return Found(whole[named], named)
    if not published and named is None and not problem:
        return None
    if not whole:
        names = ", ".join(path.name for path in published.values())
        seen = f"it has only {names}" if names else problem or f"{LATEST_FILE} names step {named}"
        raise CheckpointError(
            f"{directory} holds no complete checkpoint of this package (an iter_* directory with "
            f"{STATE_FILE}): {seen}. A run does not start from scratch beside it; set "
            "checkpoint.resume to another directory, or checkpoint.dir to an empty one."
        )
    step = max(whole)
    lost = f"step {named}, which {LATEST_FILE} names, is not there"
    reason = problem or (f"there is no {LATEST_FILE}" if named is None else lost)
    note = f"{directory}: {reason}; using the newest complete checkpoint, {whole[step].name}"
    return Found(whole[step], step, note)


def begin(path: Path) -> Path:
    """Create the empty temporary directory of ``path`` and remove what killed saves have left.

    Returns:
        The temporary directory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in path.parent.iterdir():
        # A save that was killed inside `publish` leaves ``.old-X``. It may be the only copy of X,
        # so it goes only when X is there again and complete.
        superseded = entry.name.startswith(_ASIDE) and is_complete(_real(entry))
        if superseded or entry.name.startswith(_TEMPORARY):
            _remove(entry)
    temporary = temporary_path(path)
    temporary.mkdir()
    return temporary


def publish(path: Path) -> None:
    """Rename a finished temporary directory to ``path``, replacing an older one of that name.

    A directory cannot be renamed onto another that is not empty, so the old one is set aside first.
    If a kill separates the two renames, readers find the old one under its ``.old-`` name
    (`_published`).
    """
    temporary = temporary_path(path)
    # The names of the files must be on disk before the directory gets its final name; their
    # contents were synced as they were written.
    sync_directory(temporary)
    aside = path.with_name(_ASIDE + path.name)
    if is_complete(path):
        discard(aside)
        path.rename(aside)
    discard(path)  # an incomplete one, of a copy that was cut short
    temporary.rename(path)
    # Makes both renames durable before `set_latest` names the result.
    sync_directory(path.parent)


def set_latest(directory: Path, step: int) -> None:
    """Make the latest file name ``step``, atomically: readers see the old or the new step."""
    temporary = directory / f"{_TEMPORARY}{LATEST_FILE}"
    write_file(temporary, f"{step}\n")
    temporary.replace(directory / LATEST_FILE)
    sync_directory(directory)


def prune(
    directory: Path, *, step: int, keep: int, retain_interval: int | None = None
) -> list[Path]:
    """Delete all but the ``keep`` newest checkpoints up to ``step``; return what was deleted.

    Later checkpoints stay until their step is reached again: they belong to a run that was resumed
    from an earlier step. Those whose step is a multiple of ``retain_interval`` stay for ever.
    """
    # `publish` has put the new checkpoint in place and `set_latest` names it, so the copy that was
    # set aside is no longer needed.
    discard(directory / f"{_ASIDE}{checkpoint_path(directory, step).name}")
    past = sorted(s for s in _published(directory) if s <= step)
    superseded = [
        checkpoint_path(directory, s)
        for s in past[:-keep]
        if retain_interval is None or s % retain_interval
    ]
    for path in superseded:
        # Rename first: a kill during the deletion must not leave half a directory that looks like a
        # checkpoint. The next `begin` removes the rest.
        doomed = temporary_path(path)
        path.rename(doomed)
        _remove(doomed)
    return superseded


def probe(directory: Path, name: str) -> None:
    """Write a small file, fsync it and delete it again, as a save would.

    Args:
        directory: The checkpoint directory.
        name: Name of the caller, different for each rank.

    Raises:
        OSError: The directory is not there, is read-only, is full, or belongs to somebody else.
    """
    path = directory / f"{_TEMPORARY}probe-{name}"
    write_file(path, "can this be written?\n")
    path.unlink()


def room_for(directory: Path, *, needed: int, keep: int) -> str:
    """Return a warning if the disk is too small for the checkpoints of a run, else an empty text.

    While a checkpoint is written, the ``keep`` newest ones are still there. What the directory
    already holds counts as room, because a run deletes it in time.

    Args:
        directory: The checkpoint directory.
        needed: Bytes of one checkpoint.
        keep: Number of newest checkpoints that are kept.

    Raises:
        CheckpointError: There is not even room for one more checkpoint.
    """
    free = shutil.disk_usage(directory).free
    leftovers = sum(_bytes_in(entry) for entry in directory.glob(f"{_TEMPORARY}*"))
    if free + leftovers < needed:
        raise CheckpointError(
            f"checkpoint.dir {directory}: the disk has {free:,} bytes free, and one checkpoint of "
            f"this run has about {needed:,}. Free space, or give another directory."
        )
    kept = sum(_bytes_in(path) for path in _published(directory).values())
    if free + leftovers + kept < (keep + 1) * needed:
        return (
            f"WARNING: checkpoint.dir {directory} has {free:,} bytes free. checkpoint.keep {keep} "
            f"needs about {(keep + 1) * needed:,}, because a new checkpoint is written before the "
            "oldest is deleted. Later saves will fail."
        )
    return ""


def discard(path: Path) -> None:
    """Delete a directory, if it is there."""
    if path.exists():
        _remove(path)


def abandon(temporary: Path) -> None:
    """Delete what a failed save has written, ignoring errors: the disk may be full."""
    shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small file and fsync it."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Fsync a directory, so that the names in it survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _published(directory: Path) -> dict[int, Path]:
    """Return step -> directory; a directory set aside counts until its name is taken again."""
    entries: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    found: dict[int, Path] = {}
    for entry in sorted(entries):  # ".old-iter_" sorts before "iter_", which wins
        match = _PUBLISHED.match(entry.name.removeprefix(_ASIDE))
        if match and entry.is_dir():
            found[int(match.group(1))] = entry
    return found


def _bytes_in(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _real(aside: Path) -> Path:
    return aside.with_name(aside.name.removeprefix(_ASIDE))


def _named_step(directory: Path) -> tuple[int | None, str]:
    """Return the step in the latest file, or ``None`` and what is wrong with it."""
    path = directory / LATEST_FILE
    if not path.is_file():
        return None, ""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(text):
        return None, f"{LATEST_FILE} holds {text[:40]!r}, which is no step"
    return int(text), ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
