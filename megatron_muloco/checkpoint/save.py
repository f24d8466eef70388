"""From live state to a finished temporary directory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.checkpoint.digest import model_digests
from megatron_muloco.checkpoint.layout import CONFIG_FILE, STATE_FILE, write_file
from megatron_muloco.checkpoint.model_space import ModelSpace, sharded_tensors
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
from megatron_muloco.checkpoint.storage import finish_directory
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import SyncError
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.shards import Shard

__all__ = [
    "Kinds",
    "describe",
    "digests_of",
    "masters_differ",
    "run_kinds",
    "sharded_kinds",
    "sharded_rng",
    "write_description",
]

Kinds = Mapping[str, Mapping[str, Tensor]]


def run_kinds(state: RunState, *, with_masters: bool) -> Kinds:
    """Return the tensors of a training checkpoint, by key prefix and name; live ones, as shards."""
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


def sharded_kinds(state: RunState, kinds: Kinds, space: ModelSpace) -> Iterator[ShardedTensor]:
    """Yield what this rank writes of ``kinds``: shared ones on replica 0, others on their replica.

    Collectives: every rank of a replica exhausts it at the same point.
    """
    if state.groups.coords.replica > 0:
        kinds = {kind: tensors for kind, tensors in kinds.items() if not is_shared(kind)}
    yield from _tensors_of(kinds, space)


def sharded_rng() -> Iterator[ShardedTensor]:
    """Yield the states of this rank's random number generators."""
    rank = torch.distributed.get_rank()
    for name, tensor in rng_tensors().items():
        yield ShardedTensor.from_rank_offsets(rng_key(rank, name), tensor)


def _tensors_of(kinds: Kinds, space: ModelSpace) -> Iterator[ShardedTensor]:
    """Yield the pieces that this rank holds of every parameter that it speaks for."""
    names = space.names(kinds)
    for kind, tensors in kinds.items():
        spoken_for = [name for name in names[kind] if not space.cut(name).param.duplicate]
        for name, piece in space.gather(tensors, spoken_for).items():
            yield from sharded_tensors(f"{kind}.{name}", space.cut(name), piece)


def digests_of(groups: Groups, shards: Sequence[Shard], kinds: Kinds) -> dict[str, str]:
    """Return the digest of each kind. Collectives: 8 bytes a kind over the replica."""
    device = training_device()

    def all_reduce(total: Tensor) -> None:
        moved = total.to(device)
        torch.distributed.all_reduce(moved, group=groups.replica)
        total.copy_(moved)

    return model_digests(
        kinds,
        shards,
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


def describe(state: RunState, kinds: Kinds, *, step: int, has_masters: bool) -> Description:
    """Return the plain part of a checkpoint of ``kinds``, complete on every rank.

    Collectives: digests over the replica, one small object from every rank of the job.

    Raises:
        SyncError: Replicas disagree about what they share.
    """
    groups = state.groups
    own: dict[str, Any] = {
        "digests": digests_of(groups, state.view.shards, kinds),
        "inner_step": state.inner.step_count,
        "synchronizer": None,
    }
    if state.synchronizer is not None:
        own["synchronizer"] = state.synchronizer.scalars()
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own if groups.is_leader else None)
    replicas = [entry for entry in everywhere if entry is not None]
    _check_shared(filter(is_shared, kinds), [replica["digests"] for replica in replicas])
    return Description(
        format=FORMAT,
        step=step,
        topology=asdict(groups.topology),
        anchor_digest=own["digests"][ANCHOR],
        versions=_versions(),
        has_masters=has_masters,
        scalars=state.scalars,
        replicas=replicas,
        config=state.config.model_dump(mode="json"),
    )


def _check_shared(kinds: Iterable[str], by_replica: Sequence[Mapping[str, str]]) -> None:
    for kind in kinds:
        digests = [digests[kind] for digests in by_replica]
        if len(set(digests)) > 1:
            raise SyncError(
                f"replicas hold different values of the {kind} that they share (digests "
                f"{', '.join(digests)}, in their order), so no checkpoint of this state would be "
                "right. Resume from an earlier checkpoint."
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
