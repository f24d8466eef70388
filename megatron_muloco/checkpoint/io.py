"""The contents of a checkpoint: the live state of a run as tensors of the model and plain values.

Saving describes the live tensors as Megatron's `ShardedTensor`s and the plain values as one
`Description`; `loading` is the way back. Where directories are, and when a new one becomes visible,
is `store`'s part.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.checkpoint.directory import file_digest, finish_directory
from megatron_muloco.checkpoint.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    STATE_FILE,
    write_file,
)
from megatron_muloco.checkpoint.sharding import (
    ModelSpace,
    Part,
    model_digests,
    sharded_tensors,
)
from megatron_muloco.checkpoint.state import (
    ANCHOR,
    FORMAT,
    Description,
    RunState,
    is_shared,
    outer_key,
    rng_key,
    rng_tensors,
)
from megatron_muloco.comm.collectives import gather_objects, sum_over
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError, SyncError
from megatron_muloco.params import Shard

__all__ = [
    "Copied",
    "Kinds",
    "check_shared",
    "copied_parts",
    "describe",
    "description_of",
    "digests_of",
    "finite_kinds",
    "masters_differ",
    "not_finite",
    "not_finite_words",
    "progress_of",
    "require_finite",
    "run_kinds",
    "sharded",
    "sharded_rng",
    "write_description",
]


Kinds = Mapping[str, Mapping[str, Tensor]]  # key prefix -> parameter name -> flat shard


def run_kinds(state: RunState, *, with_masters: bool) -> Kinds:
    """Return the tensors of a training checkpoint: this rank's live shards by prefix and name."""
    replica = state.groups.coords.replica
    kinds: dict[str, Mapping[str, Tensor]] = {}
    if state.synchronizer is None:
        kinds[ANCHOR] = state.anchors()
    else:
        for kind, tensors in state.synchronizer.state_dict()["tensors"].items():
            kinds[outer_key(kind, replica)] = tensors
    for moment, tensors in state.inner.named_state().items():
        kinds[f"replica_{replica}.inner.{moment}"] = tensors
    if with_masters:
        kinds[f"replica_{replica}.master"] = state.view.masters
    return kinds


class Copied(NamedTuple):
    """A part of one kind in host memory, which this rank writes.

    Attributes:
        kind: Key prefix.
        part: Its place in the pieces of this stage and tensor-parallel rank.
        values: Flat fp32 values.
    """

    kind: str
    part: Part
    values: Tensor


def copied_parts(
    kinds: Kinds, space: ModelSpace, allocate: Callable[[str, Part], Tensor] | None = None
) -> Iterator[Copied]:
    """Copy what this rank writes of ``kinds`` to host memory: its share of each.

    The values of a shared kind are bitwise the same on all replicas, so any of them may write any
    part. Its elements are divided among all ranks that hold the same tensor-parallel pieces, those
    of other kinds among the ranks of one replica.

    Args:
        kinds: The tensors.
        space: Model space of the same shards.
        allocate: Function of a kind and a part that returns fp32 host memory for it; new memory by
            default.

    Collectives: `ModelSpace.names` and `ModelSpace.gather` of each kind. Every rank of a replica
    must exhaust it at the same point.
    """
    names = space.names(kinds)
    for kind, tensors in kinds.items():
        # Exactly one rank may write an element: that of a replicated parameter is its primary rank.
        primary = [name for name in names[kind] if space.cut(name).param.is_primary]
        parts = space.parts(primary, shared=is_shared(kind))
        place = None if allocate is None else partial(allocate, kind)
        for part, values in space.gather(tensors, parts, allocate=place).items():
            yield Copied(kind, part, values)


def sharded(copies: Iterable[Copied], space: ModelSpace) -> Iterator[ShardedTensor]:
    """Yield Megatron's description of copied parts; collectives are those of ``copies``."""
    for kind, part, values in copies:
        yield from sharded_tensors(f"{kind}.{part.name}", space.cut(part.name), part, values)


def sharded_rng() -> Iterator[ShardedTensor]:
    """Yield the states of this rank's random number generators. No collectives."""
    rank = torch.distributed.get_rank()
    for name, tensor in rng_tensors().items():
        # A clone: a tracker's state may be the live one, and a save may be written later.
        yield ShardedTensor.from_rank_offsets(rng_key(rank, name), tensor.clone())


def digests_of(
    groups: Groups, shards: Sequence[Shard], kinds: Kinds, device: torch.device
) -> dict[str, str]:
    """Return the digest of each kind.

    Args:
        groups: This rank's groups.
        shards: This rank's shards.
        kinds: The tensors.
        device: The device that hashes, from which the replica's backend sends.

    Collectives: one all-reduce over the replica, 8 bytes a kind; all its ranks call it.
    """
    return model_digests(
        kinds,
        shards,
        tensor_rank=groups.coords.tp,
        tensor_size=groups.topology.tensor,
        device=device,
        all_reduce=lambda total: total.copy_(sum_over(groups.replica, total)),
    )


def require_finite(state: RunState, kinds: Kinds) -> None:
    """Raise on every rank if tensors that a resumed run could not do without are not finite.

    These are what all replicas share, and without an outer step everything. With an outer step, a
    replica whose own tensors are not finite may be saved: its next launch sets it back.

    Costs one read of every tensor.

    Raises:
        CheckpointError: The message names the tensors.

    Collectives: one small object from every rank of the job; every rank calls it.
    """
    own = {kind: kinds[kind] for kind in finite_kinds(state, kinds)}
    by_rank = gather_objects(state.groups.control, not_finite(own))
    if lost := sorted({name for names in by_rank for name in names}):
        raise CheckpointError(not_finite_words(lost))


def finite_kinds(state: RunState, kinds: Iterable[str]) -> list[str]:
    """Return the kinds of tensors that must be finite in a checkpoint; see `require_finite`."""
    return [kind for kind in kinds if state.synchronizer is None or is_shared(kind)]


def not_finite_words(names: Sequence[str]) -> str:
    """Return the error about tensors that `not_finite` has found."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"{', '.join(names[:4])}{more} hold values that are not finite, so this state is not "
        "saved. Earlier checkpoints are unchanged; resume from one of them."
    )


@torch.no_grad()
def not_finite(kinds: Kinds) -> list[str]:
    """Return ``<kind> of <name>`` of the tensors that hold NaN or infinity, in their order."""
    names: dict[torch.device, list[str]] = {}
    ends: dict[torch.device, list[Tensor]] = {}
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            if tensor.numel():
                names.setdefault(tensor.device, []).append(f"{kind} of {name}")
                # Smallest and largest value: NaN passes through both, and no copy is made.
                ends.setdefault(tensor.device, []).append(torch.stack(torch.aminmax(tensor)))
    bad = []
    for device, found in ends.items():
        finite = torch.stack(found).isfinite().all(dim=1).tolist()
        bad += [name for name, good in zip(names[device], finite, strict=True) if not good]
    return bad


def masters_differ(state: RunState) -> bool:
    """Whether any master on any rank differs from the anchor in any bit.

    Right after an apply with mixing weight 0 none does, and the checkpoint stores the anchor alone.

    Collectives: one flag from every rank of the job; every rank calls it.
    """
    if state.synchronizer is None:
        return False
    differs = any(
        not torch.equal(
            anchor.view(torch.int32),  # bits: -0.0 differs from 0.0, and a NaN equals itself
            state.view.masters[name].detach().to(anchor.device).view(torch.int32),
        )
        for name, anchor in state.anchors().items()
    )
    return any(gather_objects(state.groups.control, differs))


def describe(
    state: RunState, kinds: Kinds, *, step: int, has_masters: bool, device: torch.device
) -> Description:
    """Return the plain part of a checkpoint of ``kinds``, complete on every rank.

    Collectives: the digests over the replica, then one small object from every rank of the job.

    Raises:
        SyncError: Replicas disagree about what they share.
    """
    digests = digests_of(state.groups, state.view.shards, kinds, device)
    own = {"digests": digests} | progress_of(state)
    by_rank = gather_objects(state.groups.control, own if state.groups.is_leader else None)
    replicas = [entry for entry in by_rank if entry is not None]
    for kind in filter(is_shared, kinds):
        check_shared(kind, [replica["digests"][kind] for replica in replicas])
    return description_of(state, replicas, step=step, has_masters=has_masters)


def progress_of(state: RunState) -> dict[str, Any]:
    """Return the plain values of this replica."""
    outer = None if state.synchronizer is None else state.synchronizer.scalars()
    own = {"inner_step": state.inner.step_count, "synchronizer": outer}
    return own if state.spikes is None else own | {"spikes": state.spikes.state_dict()}


def description_of(
    state: RunState, replicas: list[dict[str, Any]], *, step: int, has_masters: bool
) -> Description:
    """Return a description with the given entries of replicas; those may lack digests."""
    return Description(
        format=FORMAT,
        step=step,
        topology=asdict(state.groups.topology),
        anchor_digest=replicas[0].get("digests", {}).get(ANCHOR, ""),
        versions=_versions(),
        has_masters=has_masters,
        scalars=dict(state.scalars),
        replicas=replicas,
        config=state.resolved,
    )


def check_shared(kind: str, sums: Sequence[str]) -> None:
    """Raise SyncError unless all replicas have the same digest, or sum, of what they share."""
    if len(set(sums)) > 1:
        raise SyncError(
            f"replicas hold different values of the {kind} that they share (digests "
            f"{', '.join(sums)}, in their order), so no checkpoint of this state would be "
            "right. Resume from an earlier checkpoint."
        )


def write_description(directory: Path, description: Description) -> None:
    """Write everything but the tensors. One rank of the job calls it, after the tensors."""
    # STATE_FILE comes last: `layout.is_complete` takes a directory that has it for a whole one.
    write_file(
        directory / CONFIG_FILE, yaml.safe_dump(description.config, sort_keys=False, width=100)
    )
    finish_directory(
        directory, {"iteration": description.step, "anchor_digest": description.anchor_digest}
    )
    description = replace(description, index_digest=file_digest(directory / INDEX_FILE))
    write_file(directory / STATE_FILE, description.to_json())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("megatron_muloco", "megatron-core", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the package runs from a source tree
            found[package] = "unknown"
    return found
