"""`BackgroundSave`: one checkpoint that is written while training goes on.

::

    main thread, all ranks   copy this rank's parts to host memory, plan           training waits
    a thread, every rank     write, fsync, read back, digest                       training goes on
    main thread, every rank  post a report in the job's store, between two steps
    a thread, rank 0         when all have reported: index, description, rename, latest, prune

A thread, not a process: it does file IO and torch operations, which release the interpreter lock,
and a fork of a process that has threads of CUDA, NCCL and gloo is not safe. No thread here uses a
collective. The main threads agree through the job's store, which needs no common step: replicas are
at different inner steps between two outer steps. Reports are JSON, so that nothing that is read
from the store can run code.
"""

import json
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from megatron_muloco.checkpoint.directory import PlannedWrite, cause_of
from megatron_muloco.checkpoint.io import (
    Copied,
    Kinds,
    check_shared,
    description_of,
    not_finite,
    not_finite_words,
    progress_of,
)
from megatron_muloco.checkpoint.sharding import ModelSpace, Part, digest_sum, render
from megatron_muloco.checkpoint.state import ANCHOR, Description, RunState, is_shared, of_replica
from megatron_muloco.comm.collectives import barrier, broadcast_object, gather_objects, job_store
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError
from megatron_muloco.params import Shard

__all__ = [
    "BackgroundSave",
    "HostCopies",
    "SaveResult",
    "bit_sum",
    "describe_without_digests",
    "next_number",
    "with_digests",
]

_PREFIX = "muloco-save"


class HostCopies:
    """Host memory for the copies of a rank's parts, kept from one save to the next.

    Memory that is new to the process costs several times the copy into it.

    Args:
        pin: Whether to pin it, so that an accelerator copies to it at full speed.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._buffers: dict[tuple[str, Part], Tensor] = {}

    def __call__(self, kind: str, part: Part) -> Tensor:
        """Return the memory of one part of one kind."""
        if (kind, part) not in self._buffers:
            # One storage each: torch's writer copies a tensor that is a part of a larger storage.
            new = torch.empty(part.numel, dtype=torch.float32, pin_memory=self._pin)
            self._buffers[kind, part] = new
        return self._buffers[kind, part]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


@dataclass(frozen=True)
class SaveResult:
    """How a save in the background ended.

    Attributes:
        path: The checkpoint.
        step: Its step.
        error: Why it was not published; empty if it was.
    """

    path: Path
    step: int
    error: str = ""


class BackgroundSave:
    """One save, from the copies in host memory to the published checkpoint.

    Invariant: the checkpoint is published only if every rank has written, synced and read back its
    file. Otherwise everything that was written is removed, and the older checkpoints stay.

    Args:
        number: Number of this save among all of the job's, the same on all ranks.
        path: Final name of the directory.
        step: Step of the checkpoint.
        planned: This rank's part of the write into the temporary directory.
        copies: The parts that it writes, in host memory that nothing else changes.
        space: Model space of the parts.
        groups: This rank's groups.
        finite: Kinds whose values must be finite; a save of others fails.
        publish: Function that makes the checkpoint visible, given the digest sums of all ranks by
            rank; rank 0 calls it, in a thread.
        discard: Function that removes what was written; rank 0 calls it, in a thread.

    Collectives: none but those of `wait`.
    """

    def __init__(
        self,
        number: int,
        path: Path,
        step: int,
        planned: PlannedWrite,
        copies: Sequence[Copied],
        space: ModelSpace,
        groups: Groups,
        *,
        finite: Collection[str],
        publish: Callable[[list[tuple[int, Mapping[str, int]]]], None],
        discard: Callable[[], None],
    ) -> None:
        self.result: SaveResult | None = None
        self._path, self._step, self._planned, self._copies = path, step, planned, copies
        self._space, self._groups, self._store = space, groups, job_store()
        self._finite, self._publish_in, self._discard = finite, publish, discard
        self._keys = f"{_PREFIX}/{number}"
        self._rank = torch.distributed.get_rank()
        self._posted = False
        self._report: dict[str, Any] = {}
        self._publishing: threading.Thread | None = None
        self._writing = _start("checkpoint writer", self._write)

    def poll(self) -> None:
        """Post this rank's report when its file is written; publish on rank 0 when all have.

        Called between two steps, on every rank; it does not wait, and uses no collective.
        """
        if not self._posted and not self._writing.is_alive():
            self._post()
        if self._rank == 0 and self._publishing is None and self._all_posted():
            self._publishing = _start("checkpoint publisher", self._publish)

    def wait(self) -> SaveResult:
        """Return the result, the same on all ranks, when the save has ended.

        Collectives: a barrier and a broadcast of one small object over the job; every rank of the
        job calls it.
        """
        self._writing.join()
        if not self._posted:
            self._post()
        barrier(self._groups.control)
        if self._rank == 0:
            self.poll()
            assert self._publishing is not None, "every rank has posted before the barrier"
            self._publishing.join()
        result = broadcast_object(self._groups.control, self.result)
        assert result is not None, "the publisher leaves a result however it ends"
        self.result = result
        return result

    # ---- threads ----------------------------------------------------------------------------

    def _write(self) -> None:
        """Write, sync, read back and digest this rank's parts; leave a report."""
        try:
            self._require_finite()
            written = self._planned.write()
            self._planned.verify(written)
            self._report = {
                "replica": self._groups.coords.replica,
                "chunks": [_to_plain(chunk) for chunk in written],
                "sums": _digest_sums(self._copies, self._space, self._groups),
            }
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            self._report = {"error": f"rank {self._rank}: {cause_of(error)}"}

    def _require_finite(self) -> None:
        checked: dict[str, dict[str, Tensor]] = {}
        for kind, part, values in self._copies:
            if kind in self._finite:
                checked.setdefault(kind, {})[f"{part.name}[{part.start}:{part.end}]"] = values
        if lost := not_finite(checked):
            raise CheckpointError(not_finite_words(lost))

    def _publish(self) -> None:
        """Publish the checkpoint, or remove it if a rank has failed; leave the result."""
        error = ""
        try:
            reports = [self._posted_by(rank) for rank in range(torch.distributed.get_world_size())]
            error = next((report["error"] for report in reports if "error" in report), "")
            if not error:
                chunks = [[_from_plain(chunk) for chunk in report["chunks"]] for report in reports]
                self._planned.finish(chunks)
                self._publish_in([(report["replica"], report["sums"]) for report in reports])
        except BaseException as failure:  # noqa: BLE001 - as in `_write`
            error = f"rank {self._rank}: {cause_of(failure)}"
        if error:
            self._discard()
        self.result = SaveResult(self._path, self._step, error)

    # ---- the job's store --------------------------------------------------------------------

    def _post(self) -> None:
        self._store.set(f"{self._keys}/rank/{self._rank}", json.dumps(self._report))
        self._store.add(f"{self._keys}/posted", 1)
        self._posted = True

    def _all_posted(self) -> bool:
        if not self._posted:
            return False
        posted = self._store.add(f"{self._keys}/posted", 0)
        return bool(posted == torch.distributed.get_world_size())

    def _posted_by(self, rank: int) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self._store.get(f"{self._keys}/rank/{rank}"))
        return report


def next_number(control: ProcessGroup) -> int:
    """Return a number that no other save of this job has, the same on all ranks.

    Collectives: rank 0 broadcasts it to the job; every rank calls it.
    """
    first = torch.distributed.get_rank() == 0
    return broadcast_object(control, int(job_store().add(_PREFIX, 1)) if first else 0)


def _start(name: str, task: Callable[[], None]) -> threading.Thread:
    # A daemon, so that a rank that ends after an error does not wait for its disk.
    thread = threading.Thread(target=task, name=name, daemon=True)
    thread.start()
    return thread


def _digest_sums(copies: Sequence[Copied], space: ModelSpace, groups: Groups) -> dict[str, int]:
    """Return key prefix -> sum of the digest over the parts that this rank writes."""
    sums: dict[str, int] = {}
    for kind, part, values in copies:
        piece = Shard(space.cut(part.name).param, part.start, part.end)
        found = digest_sum(
            [(piece, values)],
            tensor_rank=groups.coords.tp,
            tensor_size=groups.topology.tensor,
            device=values.device,
        )
        sums[kind] = sums.get(kind, 0) + int(found)
    return sums


def _to_plain(chunk: WriteResult) -> list[Any]:
    place, index = chunk.storage_data, chunk.index
    offset = None if index.offset is None else list(index.offset)
    where = [place.relative_path, place.offset, place.length]
    return [index.fqn, offset, index.index, chunk.size_in_bytes, *where]


def _from_plain(plain: Sequence[Any]) -> WriteResult:
    name, offset, hint, size, path, start, length = plain
    whole = None if offset is None else torch.Size(offset)
    index = MetadataIndex(name, whole, hint)
    return WriteResult(index, size, _StorageInfo(path, start, length))


# ---- description -------------------------------------------------------------------------------


@torch.no_grad()
def bit_sum(tensors: Iterable[Tensor]) -> int:
    """Return the sum, modulo 2**64, of the bits of flat fp32 tensors, two values to a number.

    It costs a quarter of a copy, and shows whether ranks that should hold the same values do. It
    depends on the shards, and a checkpoint does not store it.
    """
    total = 0
    for tensor in tensors:
        values = tensor.detach().view(-1)
        if values.storage_offset() % 2:  # eight bytes must begin at a multiple of eight
            values = values.clone()
        even = values.numel() // 2 * 2
        total += int(values[:even].view(torch.int64).sum())
        total += int(values[even:].view(torch.int32).sum())
    return total % (1 << 64)


def describe_without_digests(
    state: RunState, kinds: Kinds, *, step: int, has_masters: bool
) -> Description:
    """Return the plain part of a checkpoint whose digests `with_digests` fills in later.

    A digest costs a CPU several times a copy, so a save in the background computes it from the
    copy. Whether replicas agree about what they share must be known of the live tensors, of which
    each replica copies a part only. For that a plain sum of their bits is enough.

    Collectives: one small object from every rank of the job.

    Raises:
        SyncError: Replicas disagree about what they share.
    """
    groups = state.groups
    several = groups.topology.num_replicas > 1
    shared = [kind for kind in kinds if is_shared(kind)] if several else []
    sums = {kind: bit_sum(kinds[kind].values()) for kind in shared}
    # A copy, because a rank alone gets its own object back, and training goes on.
    own = deepcopy(progress_of(state)) if groups.is_leader else None
    by_rank = gather_objects(groups.control, (groups.coords.replica, sums, own))
    for kind in shared:
        totals = [0] * groups.topology.num_replicas
        for replica, found, _ in by_rank:
            totals[replica] += found[kind]
        check_shared(kind, [render(total) for total in totals])
    replicas = [entry for _, _, entry in by_rank if entry is not None]
    return description_of(state, replicas, step=step, has_masters=has_masters)


def with_digests(
    description: Description, kinds: Iterable[str], by_rank: Sequence[tuple[int, Mapping[str, int]]]
) -> Description:
    """Return a description with the digests of what all ranks have written.

    Args:
        description: What `describe_without_digests` returned.
        kinds: Key prefixes of replica 0; those of the others differ in its number.
        by_rank: For each rank its replica and key prefix -> `digest_sum` of what it wrote.
    """
    replicas: list[dict[str, Any]] = []
    names = list(kinds)
    for number, entry in enumerate(description.replicas):
        digests = {}
        for kind in (of_replica(name, number) for name in names):
            # What is shared is written by all replicas together.
            writers = [s for replica, s in by_rank if replica == number or is_shared(kind)]
            digests[kind] = render(sum(sums.get(kind, 0) for sums in writers))
        replicas.append({"digests": digests} | entry)
    anchor = replicas[0]["digests"][ANCHOR]
    return replace(description, replicas=replicas, anchor_digest=anchor)
