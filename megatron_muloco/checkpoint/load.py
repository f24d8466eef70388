"""From a checkpoint directory back into live state."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_muloco.checkpoint.compatibility import differences
from megatron_muloco.checkpoint.digest import render
from megatron_muloco.checkpoint.layout import FINAL_ANCHOR, STATE_FILE
from megatron_muloco.checkpoint.model_space import ModelSpace, sharded_tensors
from megatron_muloco.checkpoint.save import digests_of
from megatron_muloco.checkpoint.state import (
    ANCHOR,
    Description,
    Masters,
    RunState,
    outer_key,
    read_description,
    rng_key,
    rng_tensors,
    set_rng_tensors,
)
from megatron_muloco.checkpoint.storage import (
    everywhere,
    missing_bytes,
    read_tensors,
    stored_keys,
)
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError

__all__ = ["load_anchor", "load_run"]

Wanted = Mapping[str, Sequence[str]]
Pieces = dict[str, dict[str, Tensor]]

_REMEDY = "Resume from an older checkpoint (checkpoint.resume: <directory>)."


def load_run(path: Path, into: RunState, space: ModelSpace) -> Description:
    """Overwrite the live state by that of a training checkpoint; return its description.

    Nothing is overwritten before everything was read and its digests were found right.

    Raises:
        CheckpointError: The checkpoint is damaged, foreign, of another format, or of a run that
            this one cannot go on from; the same on all ranks.

    Collectives: every rank of the job calls it.
    """
    with everywhere(f"the checkpoint {path} cannot be read", _REMEDY):
        description = read_description(path)
        _check_config(path, description, into)
        stored = _stored(path)
    wanted = _wanted(description, stored, into, space)
    pieces = _read(path, wanted, space)
    own = description.replicas[into.groups.coords.replica]
    found = digests_of(into.groups, into.view.shards, pieces)
    _check_digests(path, found, own["digests"])
    _apply(description, pieces, into)
    if description.topology == asdict(into.groups.topology):
        _load_rng(path, stored)
    into.scalars.clear()
    into.scalars.update(description.scalars)
    into.view.publish()
    return description


def load_anchor(
    path: Path, groups: Groups, view: Masters, space: ModelSpace, *, flushed: bool = True
) -> Description:
    """Set masters and model parameters to the anchor of a checkpoint of any number of replicas.

    For evaluation and export: inner and outer optimizer keep what they have.

    Args:
        path: A training checkpoint.
        groups: This rank's groups.
        view: Masters of this rank.
        space: Of the same shards.
        flushed: Take the anchor after the final flush where the checkpoint has one.

    Raises:
        CheckpointError: As `load_run`.

    Collectives: every rank of the job calls it.
    """
    if flushed and (path / FINAL_ANCHOR / STATE_FILE).is_file():
        path = path / FINAL_ANCHOR
    with everywhere(f"the checkpoint {path} cannot be read", _REMEDY):
        description = read_description(path)
        _stored(path)
    pieces = _read(path, {ANCHOR: list(view.infos)}, space)
    found = digests_of(groups, view.shards, pieces)
    _check_digests(path, found, {ANCHOR: description.anchor_digest})
    _fill(view, pieces[ANCHOR])
    view.publish()
    return description


def _check_config(path: Path, description: Description, into: RunState) -> None:
    changed = differences(description.config, into.config.model_dump(mode="json"))
    if changed:
        listed = "".join(f"\n  {line}" for line in changed)
        raise CheckpointError(
            f"{path} was saved by a run with another configuration:{listed}\n"
            "Going on would mix two runs. Give these keys their old values, or start anew with "
            "checkpoint.resume: none and another checkpoint.dir."
        )


def _stored(path: Path) -> frozenset[str]:
    """Return the keys of a checkpoint after a look at the sizes of its files."""
    if torch.distributed.get_rank() == 0 and (problems := missing_bytes(path)):
        raise CheckpointError(
            f"the checkpoint {path} is incomplete: {'; '.join(problems[:4])}"
            f"{f' and {len(problems) - 4} more' if len(problems) > 4 else ''}. {_REMEDY}"
        )
    return stored_keys(path)


def _wanted(
    description: Description, stored: frozenset[str], into: RunState, space: ModelSpace
) -> dict[str, list[str]]:
    """Return key prefix -> names to read, the same on all dp x cp ranks, which all call it."""
    replica = into.groups.coords.replica
    infos = into.view.infos
    spoken_for = [name for name, info in infos.items() if not info.duplicate]
    masters = f"replica_{replica}.master" if description.has_masters else ANCHOR
    wanted = {masters: list(infos)}
    for moment, names in space.names(into.inner.named_state()).items():
        wanted[f"replica_{replica}.inner.{moment}"] = names
    for kind in into.synchronizer.kinds() if into.synchronizer else ():
        prefix = outer_key(kind, replica)
        if prefix != masters:
            wanted[prefix] = [name for name in spoken_for if f"{prefix}.{name}" in stored]
    return wanted


def _read(path: Path, wanted: Wanted, space: ModelSpace) -> Pieces:
    """Return key prefix -> name -> this rank's flat shard."""
    held: Pieces = {}
    tensors = []
    for prefix, names in wanted.items():
        held[prefix] = {}
        for name in filter(space.holds, names):
            cut = space.cut(name)
            held[prefix][name] = torch.empty(cut.param.local_shape, dtype=torch.float32)
            tensors += sharded_tensors(f"{prefix}.{name}", cut, held[prefix][name])
    with everywhere(f"the checkpoint {path} cannot be read", _REMEDY):
        read_tensors(path, tensors)
    return {prefix: space.scatter(held[prefix], names) for prefix, names in wanted.items()}


def _apply(description: Description, pieces: Pieces, into: RunState) -> None:
    replica = into.groups.coords.replica
    own = description.replicas[replica]
    masters = f"replica_{replica}.master" if description.has_masters else ANCHOR
    _fill(into.view, pieces[masters])
    moments = {kind: pieces[f"replica_{replica}.inner.{kind}"] for kind in into.inner.named_state()}
    into.inner.load_named_state(moments, step=int(own["inner_step"]))
    if into.synchronizer is not None:
        tensors = {
            kind: {
                name: piece
                for name, piece in pieces.get(outer_key(kind, replica), {}).items()
                if not into.view.infos[name].duplicate
            }
            for kind in into.synchronizer.kinds()
        }
        into.synchronizer.load_state_dict({"tensors": tensors, "scalars": own["synchronizer"]})


@torch.no_grad()
def _fill(view: Masters, pieces: Mapping[str, Tensor]) -> None:
    for name, master in view.masters.items():
        master.copy_(pieces[name])


def _check_digests(path: Path, found: Mapping[str, str], saved: Mapping[str, str]) -> None:
    for kind, digest in found.items():
        if digest != saved.get(kind, render(0)):  # a kind without tensors was not saved
            raise CheckpointError(
                f"{path}: the {kind} tensors that were read have digest {digest}, those that were "
                f"saved {saved.get(kind)}, so some file has changed since. {_REMEDY}"
            )


def _load_rng(path: Path, stored: frozenset[str]) -> None:
    """Restore this rank's generators, where they are of the kinds that were saved."""
    states = {name: torch.empty_like(state) for name, state in rng_tensors().items()}
    keys = {rng_key(torch.distributed.get_rank(), name): state for name, state in states.items()}
    with everywhere(f"the random number states in {path} cannot be read", _REMEDY):
        if keys.keys() <= stored:
            read_tensors(
                path, [ShardedTensor.from_rank_offsets(k, state) for k, state in keys.items()]
            )
            set_rng_tensors(states)
