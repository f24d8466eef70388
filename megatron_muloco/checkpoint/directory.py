"""Tensors and small files of one checkpoint directory, in Megatron's torch_dist format.

Megatron's own writer uses forked processes and a spawned manager. They cost a second each, do not
work in daemonic ranks and require a main guard in the user's script. So Megatron's `ShardedTensor`
describes the tensors and Megatron's planner plans the write, but this process does the writing: in
its main thread, or in one of its own (`checkpoint.background`). The parts of Megatron used here are
the same in both supported versions, and so is the format: each version reads what the other wrote.

The format's index, ``.metadata``, is a pickle, and unpickling it as torch does runs any code that
someone puts there. `read_index` reads it without: it creates inert records only, and makes torch's
objects from values that it has checked.
"""

import errno
import hashlib
import io
import math
import os
import pickle
import shutil
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
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from typing_extensions import override

from megatron_muloco.checkpoint.layout import (
    COMMON_FILE,
    INDEX_FILE,
    sync_directory,
)
from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.errors import CheckpointError

__all__ = [
    "PlannedWrite",
    "cause_of",
    "everywhere",
    "file_digest",
    "finish_directory",
    "full_disk",
    "missing_bytes",
    "plan_write",
    "read_index",
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
        message = f"{what}: rank {rank}: {cause_of(cause)}. {remedy}"
    # Reading a damaged file can raise anything. A rank that left here alone would make the others
    # wait in the next collective until its time limit.
    except Exception as error:  # noqa: BLE001
        message = f"{what}: rank {torch.distributed.get_rank()}: {cause_of(error)}. {remedy}"
    first = next((text for text in gather_objects(control, message) if text is not None), None)
    if first is not None:
        raise CheckpointError(first)


class PlannedWrite:
    """This rank's part of a write that all ranks have planned; `plan_write` makes it.

    `write` and `verify` use no collective and touch no live tensor, so any thread may call them.

    Args:
        directory: Directory of the tensors.
        writer: torch's writer for it.
        planner: The planner that knows this rank's tensors.
        plan: This rank's part of the plan.
        index: The index of the whole checkpoint, without places, on rank 0; ``None`` elsewhere.
    """

    def __init__(
        self,
        directory: Path,
        writer: FileSystemWriter,
        planner: MCoreSavePlanner,
        plan: SavePlan,
        index: Metadata | None,
    ) -> None:
        self.directory = directory
        self._writer, self._planner, self._index = writer, planner, index
        self._plan: SavePlan = planner.finish_plan(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensors."""
        written = (item.tensor_data for item in self._plan.items if item.tensor_data is not None)
        return sum(math.prod(data.chunk.sizes) * data.properties.dtype.itemsize for data in written)

    def write(self) -> list[WriteResult]:
        """Write this rank's file and fsync it; return the place of each chunk.

        Raises:
            CheckpointError: The disk is full: what was needed, and what is free.
            OSError, RuntimeError: Any other failure.
        """
        try:
            written = self._writer.write_data(self._plan, self._planner)
            written.wait()
            found: list[WriteResult] = written.value()
            return found
        except Exception as error:
            if full := full_disk(error, self.directory, self.nbytes):
                raise CheckpointError(full) from error
            raise

    def verify(self, results: Iterable[WriteResult]) -> None:
        """Read back what `write` wrote, and compare it with the tensors bit for bit.

        The kernel is asked to forget its copy of the file first, so that the bytes come from where
        a later load would get them, as far as the file system complies.

        Raises:
            CheckpointError: A chunk differs.
        """
        items = {item.index: item for item in self._plan.items}
        for name, chunks in _by_file(results).items():
            with (self.directory / name).open("rb") as stream:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for chunk in chunks:
                    stream.seek(chunk.storage_data.offset)
                    raw = stream.read(chunk.storage_data.length)
                    stored = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
                    if not _same_bits(stored, self._planner.resolve_data(items[chunk.index])):
                        raise CheckpointError(
                            f"{self.directory / name} does not hold what was written to it: "
                            f"{chunk.index.fqn} differs when it is read back. Check the disk."
                        )

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Write the index and compare the sizes of all files with it. Rank 0 alone calls it.

        Args:
            results: What `write` returned on each rank.

        Raises:
            CheckpointError: A rank's file is not where rank 0 sees the directory.
        """
        assert self._index is not None, "only rank 0 has the index"
        self._writer.finish(self._index, results)
        if problems := missing_bytes(self.directory, self._index):
            raise CheckpointError(
                f"not all that the ranks have written is in {self.directory}, as rank 0 sees it: "
                f"{'; '.join(problems[:4])}. checkpoint.dir must be one directory that all ranks "
                "see."
            )


def plan_write(
    directory: Path, entries: Iterable[ShardedBase], *, control: ProcessGroup
) -> PlannedWrite:
    """Plan the write of this rank's tensors and objects, beside those of the other ranks.

    Exactly one rank must give each element of each key.

    Raises:
        CheckpointException: torch's error, with the failures of all ranks.

    Collectives: torch's checkpoint planning gathers and scatters small objects over ``control``,
    which is `Groups.control`; every rank of the job calls it.
    """
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for entry in entries:
        key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
        by_key[key].append(entry)
    tensors = mcore_to_pyt_state_dict(by_key)
    writer = FileSystemWriter(directory, sync_files=True)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    ranks = _DistWrapper(control, use_dist=True, coordinator_rank=0)
    index: Metadata | None = None

    def own_plan() -> SavePlan:
        planner.set_up_planner(tensors, writer.storage_meta(), ranks.is_coordinator)
        writer.set_up_storage_writer(ranks.is_coordinator)
        return writer.prepare_local_plan(planner.create_local_plan())

    def whole_plan(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal index
        plans, index = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    plan = ranks.reduce_scatter("plan", own_plan, whole_plan)
    return PlannedWrite(directory, writer, planner, plan, index)


def write_tensors(
    directory: Path, entries: Iterable[ShardedBase], *, control: ProcessGroup
) -> None:
    """Write this rank's tensors and objects, and fsync them; rank 0 writes the index.

    Collectives: those of `plan_write`, and a gather of the places of all chunks; every rank of the
    job calls it.
    """
    planned = plan_write(directory, entries, control=control)
    ranks = _DistWrapper(control, use_dist=True, coordinator_rank=0)
    ranks.all_reduce("write", planned.write, planned.finish)


def _by_file(results: Iterable[WriteResult]) -> dict[str, list[WriteResult]]:
    files: dict[str, list[WriteResult]] = defaultdict(list)
    for result in results:
        files[result.storage_data.relative_path].append(result)
    return files


def _same_bits(stored: Any, written: Any) -> bool:
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (stored, written))
    return torch.equal(first, second)


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


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What torch's zip writer says when a write beneath it was cut short.
_CUT_SHORT = ("unexpected pos", "failed writing file", "PytorchStreamWriter failed")


def full_disk(error: BaseException, directory: Path, needed: int) -> str:
    """Return a message if the cause of ``error`` is a full disk, else an empty text.

    torch reports the failed write as an error of its own ("unexpected pos"), with the system's
    error as its context, or without it.

    Args:
        error: What the write raised.
        directory: Where it wrote.
        needed: Bytes that this rank was to write.
    """
    chain: BaseException | None = error
    full = False
    while chain is not None and not full:
        full = isinstance(chain, OSError) and chain.errno in _NO_SPACE
        chain = chain.__cause__ or chain.__context__
    free = _free_bytes(directory)
    cut_short = any(words in str(error) for words in _CUT_SHORT)
    if not full and not (cut_short and free is not None and free < needed):
        return ""
    of_it = "an unknown number of bytes" if free is None else f"{free:,} bytes"
    return (
        f"No space left on device: the disk of {directory} is full. This rank writes {needed:,} "
        f"bytes there, and {of_it} are free (a quota may allow less)"
    )


def _free_bytes(directory: Path) -> int | None:
    for place in (directory, *directory.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def cause_of(error: BaseException) -> str:
    """Return the first line of an error, with its type where that says more."""
    text = str(error).strip().splitlines()
    first = text[0] if text else ""
    plain = isinstance(error, (OSError, CheckpointError))
    return first if plain else f"{type(error).__name__}: {first}"


# ---- the index -----------------------------------------------------------------------------------


class _Record:
    """Inert stand-in for an object in a pickle: holds what the object was made with."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_METADATA, _FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint"
# Classes of the index by module; their stand-ins have no methods, so pickles can call none.
_KNOWN_CLASSES: tuple[tuple[str, str], ...] = (
    *(
        (_METADATA, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    (f"{_FILESYSTEM}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        (module, name)
        for module in ("pathlib", "pathlib._local")  # its place since Python 3.13
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
    ("builtins", "getattr"),  # how some versions of Python pickle the members of an enum
)  # fmt: skip
_STAND_INS: dict[tuple[str, str], type[_Record]] = {
    place: type(place[1], (_Record,), {}) for place in _KNOWN_CLASSES
}


class _IndexUnpickler(pickle.Unpickler):
    """Creates stand-ins, tuples, dtypes and plain values, and nothing else."""

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the stand-in for a class of the index; refuse every other name."""
        if (stand_in := _STAND_INS.get((module_name, global_name))) is not None:
            return stand_in
        if module_name == "torch" and global_name == "Size":
            return tuple
        found = getattr(torch, global_name, None) if module_name == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise CheckpointError(
            f"it names {module_name}.{global_name}, which no index of tensors needs and which may "
            "run code"
        )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; a save crosses no file of the data package."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_index(directory: Path, digest: str | None = None) -> Metadata:
    """Return the index of a checkpoint, reading its pickle without running any of its code.

    Args:
        directory: The checkpoint.
        digest: Digest of the file, as its description has it; ``None`` for a checkpoint of a
            format without one, whose index is then checked for consistency alone.

    Raises:
        CheckpointError: The file is missing, differs from what was saved, or is not an index.
    """
    path = directory / INDEX_FILE
    remedy = "Resume from an older checkpoint (checkpoint.resume: <directory>)."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {remedy}") from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(
            f"{path} is not the index that was saved: its digest differs from the one in the "
            f"checkpoint's description, so tensors could be read from wrong places. {remedy}"
        )
    try:
        return _checked_index(_IndexUnpickler(io.BytesIO(content)).load())
    # Unpickling a damaged file can raise anything.
    except Exception as error:
        raise CheckpointError(
            f"{path} is not an index of tensors: {cause_of(error)}. {remedy}"
        ) from error


def _checked_index(raw: Any) -> Metadata:
    """Return torch's form of an unpickled index; raise `CheckpointError` for what does not fit."""
    top = _fields(raw, "Metadata")
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, place in _entries(top.get("storage_data")):
        fields = _fields(key, "MetadataIndex")
        offset = None if fields.get("offset") is None else _sizes(fields["offset"])
        places[MetadataIndex(_text(fields.get("fqn")), offset)] = _checked_place(place)
    entries: dict[str, Any] = {}  # torch's type also has entries of bytes
    for key, entry in _entries(top.get("state_dict_metadata")):
        # torch unpickles what an entry of bytes points to. This package writes none.
        is_bytes = isinstance(entry, _STAND_INS[_METADATA, "BytesStorageMetadata"])
        _require(not is_bytes, f"{_text(key)} is not a tensor")
        entries[key] = tensor = _checked_tensor(entry)
        for chunk in tensor.chunks:
            _require(MetadataIndex(key, chunk.offsets) in places, f"a chunk of {key} has no place")
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _checked_tensor(entry: Any) -> TensorStorageMetadata:
    fields = _fields(entry, "TensorStorageMetadata")
    properties: Any = fields.get("properties")
    _require(isinstance(properties, _STAND_INS[_METADATA, "TensorProperties"]), "no properties")
    _require(isinstance(properties.state, tuple) and len(properties.state) == 5, "no properties")
    dtype = properties.state[0]
    _require(isinstance(dtype, torch.dtype), "a tensor has no dtype")
    size = _sizes(fields.get("size"))
    chunks = []
    _require(isinstance(fields.get("chunks"), list), "a tensor has no chunks")
    for chunk in fields["chunks"]:
        inside = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(inside.get("offsets")), _sizes(inside.get("sizes"))
        fits = len(offsets) == len(sizes) == len(size) and all(
            first + length <= whole
            for first, length, whole in zip(offsets, sizes, size, strict=True)
        )
        _require(fits, "a chunk lies outside its tensor")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _checked_place(place: Any) -> _StorageInfo:
    fields = _fields(place, "_StorageInfo", module=f"{_FILESYSTEM}.filesystem")
    name = _text(fields.get("relative_path"))
    # A path would make the reader open files outside the checkpoint.
    _require(Path(name).name == name and not name.startswith("."), f"{name!r} is no file name")
    _require(not fields.get("transform_descriptors"), "its tensors are transformed")
    offset, length = _sizes((fields.get("offset"), fields.get("length")))
    return _StorageInfo(name, offset, length)


def _fields(record: Any, name: str, module: str = _METADATA) -> dict[str, Any]:
    """Return the attributes of a record of class ``name``."""
    known = isinstance(record, _STAND_INS[module, name]) and isinstance(record.state, dict)
    _require(known, f"there is no {name} where one belongs")
    fields: dict[str, Any] = record.state
    return fields


def _entries(mapping: Any) -> Iterable[tuple[Any, Any]]:
    _require(isinstance(mapping, dict), "it has no entries")
    items: Iterable[tuple[Any, Any]] = mapping.items()
    return items


def _sizes(values: Any) -> torch.Size:
    whole = isinstance(values, tuple) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )
    _require(whole, f"{str(values)[:40]} are no sizes")
    return torch.Size(values)


def _text(value: Any) -> str:
    _require(isinstance(value, str), f"{str(value)[:40]} is no name")
    return str(value)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise CheckpointError(what)
