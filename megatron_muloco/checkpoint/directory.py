"""Tensors and small files of one checkpoint directory, in Megatron's torch_dist format.

Megatron's own writer uses forked processes and a spawned manager, which let it save in the
background. A save that training waits for needs neither. They cost a second each, do not work in
daemonic ranks and require a main guard in the user's script. So Megatron's `ShardedTensor`
describes the tensors and Megatron's planner plans the write, but this process does the writing. The
parts of Megatron used here are the same in both supported versions, and so is the format: each
version reads what the other wrote.
"""

import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

from megatron_muloco.checkpoint.layout import (
    COMMON_FILE,
    sync_directory,
)
from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.errors import CheckpointError

__all__ = [
    "everywhere",
    "finish_directory",
    "missing_bytes",
    "read_tensors",
    "write_tensors",
]


@contextmanager
def everywhere(control: ProcessGroup, what: str, remedy: str) -> Iterator[None]:
    """Turn a failure on any rank into the same `CheckpointError` on all ranks.

    Args:
        control: `Groups.control`.
        what: First words of the message, such as ``"the checkpoint X could not be written"``.
        remedy: Last sentence of the message: what is still safe, and what to do.

    Collectives: gathers one short text from every rank of the job when the body ends, so every rank
    must enter and leave it. The body may contain a collective only if a rank that fails there still
    takes part in it; torch's checkpoint functions do, because they agree on failures themselves.
    """
    message: str | None = None
    try:
        yield
    except CheckpointError as error:  # its message is complete
        message = str(error)
    except CheckpointException as error:  # torch's: it lists the failures of all ranks
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        message = f"{what}: rank {rank}: {_describe(cause)}. {remedy}"
    # Reading a damaged file can raise anything. A rank that left here alone would make the others
    # wait in the next collective until its time limit.
    except Exception as error:  # noqa: BLE001
        message = f"{what}: rank {torch.distributed.get_rank()}: {_describe(error)}. {remedy}"
    first = next((text for text in gather_objects(control, message) if text is not None), None)
    if first is not None:
        raise CheckpointError(first)


def write_tensors(
    directory: Path, entries: Iterable[ShardedBase], *, control: ProcessGroup
) -> None:
    """Write this rank's tensors and objects, and fsync them.

    Exactly one rank must give each element of each key.

    Collectives: torch's checkpoint planning gathers and scatters small objects over ``control``,
    which is `Groups.control`; every rank of the job calls it.
    """
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for entry in entries:
        key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
        by_key[key].append(entry)
    state_dict_saver.save(
        mcore_to_pyt_state_dict(by_key),
        storage_writer=FileSystemWriter(directory, sync_files=True),
        planner=MCoreSavePlanner(flatten_state_dict=False),
        process_group=control,
    )


class _IndexedReader(FileSystemReader):
    """torch's reader with an index that is already in memory."""

    def __init__(self, directory: Path, index: Metadata) -> None:
        super().__init__(directory)
        self._index = index

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self._index


def read_tensors(directory: Path, index: Metadata, tensors: Sequence[ShardedTensor]) -> None:
    """Fill the given tensors, each a slab of a stored tensor. No collectives.

    Args:
        directory: The checkpoint.
        index: Its index: each tensor's chunks, and each chunk's place in a file.
        tensors: The tensors to fill.

    Raises:
        KeyError: A key is not in the checkpoint.
        CheckpointingException: Megatron's error for a shape that differs from the stored one.
    """
    if not tensors:
        return
    by_key: dict[str, list[ShardedTensor]] = defaultdict(list)
    for tensor in tensors:
        by_key[tensor.key].append(tensor)
    planner = MCoreLoadPlanner(
        shapes_validation_sharded_tensors=tensors,
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    with warnings.catch_warnings():
        # torch warns about no_dist, which is on purpose: reading needs no coordination, and a rank
        # that fails must not leave the others in a collective; `everywhere` agrees on failures.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_loader.load(
            mcore_to_pyt_state_dict(by_key, is_loading=True),
            storage_reader=_IndexedReader(directory, index),
            planner=planner,
            no_dist=True,
        )


def finish_directory(directory: Path, common: dict[str, Any]) -> None:
    """Write the small files that Megatron's loader expects. One rank calls it.

    Args:
        directory: Directory of the tensors.
        common: Plain values that Megatron calls the common state.
    """
    torch.save(common, directory / COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    for name in (COMMON_FILE, "metadata.json"):
        with (directory / name).open("rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(directory)


def missing_bytes(directory: Path, index: Metadata) -> list[str]:
    """Return a phrase for each file of a checkpoint that is missing or too short."""
    needed: dict[str, int] = defaultdict(int)
    # The index names every stored byte range. A file may be longer than its last range, never
    # shorter.
    for place in index.storage_data.values():
        needed[place.relative_path] = max(needed[place.relative_path], place.offset + place.length)
    problems = []
    for name, size in sorted(needed.items()):
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size < size:
            problems.append(f"{name} has {path.stat().st_size} bytes of {size}")
    return problems


def _describe(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    return first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"
