"""From live state to a finished temporary directory."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.checkpoint.digest import model_digest
from megatron_muloco.checkpoint.layout import CONFIG_FILE, STATE_FILE, write_file
from megatron_muloco.checkpoint.model_space import ModelSpace, sharded_tensors
from megatron_muloco.checkpoint.state import (
    FORMAT,
    Description,
    RunState,
    is_shared,
    outer_key,
    rng_key,
    rng_tensors,
)
from megatron_muloco.checkpoint.storage import finish_directory
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import SyncError
from megatron_muloco.shards import Shard

__all__ = [
    "anchor_digest",
    "anchor_tensors",
    "describe",
    "digest_of",
    "masters_differ",
    "run_tensors",
    "write_description",
]

Kinds = dict[str, Mapping[str, Tensor]]


def run_tensors(
    state: RunState, space: ModelSpace, *, with_masters: bool
) -> Iterator[ShardedTensor]:
    """Yield what this rank writes of a training checkpoint.

    Collectives: every rank of a replica exhausts it at the same point.
    """
    replica = state.groups.coords.replica
    kinds: Kinds = {}
    if state.synchronizer is None:
        kinds[outer_key("anchor", replica)] = state.anchors()
    else:
        for kind, tensors in state.synchronizer.state_dict()["tensors"].items():
            if replica == 0 or not is_shared(kind):
                kinds[outer_key(kind, replica)] = tensors
    for moment, tensors in state.inner.named_state().items():
        kinds[f"replica_{replica}.inner.{moment}"] = tensors
    if with_masters:
        kinds[f"replica_{replica}.master"] = state.view.masters
    yield from _tensors_of(kinds, space)
    rank = torch.distributed.get_rank()
    for name, tensor in rng_tensors().items():
        yield ShardedTensor.from_rank_offsets(rng_key(rank, name), tensor)


def anchor_tensors(state: RunState, space: ModelSpace) -> Iterator[ShardedTensor]:
    """Yield what this rank writes of the anchor alone. Collectives: as `run_tensors`."""
    if state.groups.coords.replica == 0:
        yield from _tensors_of({"anchor": state.anchors()}, space)


def _tensors_of(kinds: Kinds, space: ModelSpace) -> Iterator[ShardedTensor]:
    """Yield the pieces that this rank holds of every parameter that it speaks for."""
    names = space.names(kinds)
    for kind, tensors in kinds.items():
        spoken_for = [name for name in names[kind] if not space.cut(name).param.duplicate]
        for name, piece in space.gather(tensors, spoken_for).items():
            yield from sharded_tensors(f"{kind}.{name}", space.cut(name), piece)


def anchor_digest(state: RunState) -> str:
    """Return the digest of the anchor.

    Collectives: 8 bytes over the replica, then one short text over the job.

    Raises:
        SyncError: Replicas have different anchors.
    """
    digest = digest_of(state.groups, state.view.shards, state.anchors())
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    by_replica = digests[:: state.groups.topology.replica_size]
    if len(set(by_replica)) > 1:
        raise SyncError(
            f"replicas have different anchors (digests {', '.join(by_replica)}, in their order), "
            "so no checkpoint of this state would be right. Resume from an earlier checkpoint."
        )
    return digest


def digest_of(groups: Groups, shards: tuple[Shard, ...], tensors: Mapping[str, Tensor]) -> str:
    """Return the digest of a model's tensors. Collectives: 8 bytes over the replica."""
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())

    def all_reduce(total: Tensor) -> None:
        moved = total.to(device)
        torch.distributed.all_reduce(moved, group=groups.replica)
        total.copy_(moved)

    return model_digest(
        [(shard, tensors[shard.name]) for shard in shards if shard.name in tensors],
        tensor_rank=groups.coords.tp,
        tensor_size=groups.topology.tensor,
        all_reduce=all_reduce,
    )


def masters_differ(state: RunState) -> bool:
    """Whether any master anywhere differs from the anchor in any bit.

    Collectives: one number over the job.
    """
    if state.synchronizer is None:
        return False
    differs = any(
        not torch.equal(
            anchor.view(torch.int32),
            state.view.masters[name].detach().to(anchor.device).view(torch.int32),
        )
        for name, anchor in state.anchors().items()
    )
    flags: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, differs)
    return any(flags)


def describe(state: RunState, *, step: int, digest: str, has_masters: bool) -> Description:
    """Return the plain part of a training checkpoint, complete on every rank.

    Collectives: one small object from every rank of the job.
    """
    groups = state.groups
    own: dict[str, Any] = {"inner_step": state.inner.step_count, "synchronizer": None}
    if state.synchronizer is not None:
        own["synchronizer"] = state.synchronizer.state_dict()["scalars"]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own if groups.is_leader else None)
    return Description(
        format=FORMAT,
        step=step,
        topology=asdict(groups.topology),
        anchor_digest=digest,
        versions=_versions(),
        has_masters=has_masters,
        scalars=state.scalars,
        replicas=[entry for entry in everywhere if entry is not None],
        config=state.config.model_dump(mode="json"),
    )


def write_description(directory: Path, description: Description) -> None:
    """Write everything but the tensors. One rank of the job calls it, after the tensors."""
    write_file(
        directory / CONFIG_FILE, yaml.safe_dump(description.config, sort_keys=False, width=100)
    )
    finish_directory(
        directory, {"iteration": description.step, "anchor_digest": description.anchor_digest}
    )
    write_file(directory / STATE_FILE, description.to_json())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("megatron_muloco", "megatron-core", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found
