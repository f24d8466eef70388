"""`load_run` and `load_anchor` bring what a checkpoint directory holds into the state of a run.

Everything is read and checked against the digests before anything of the live state is overwritten.
What goes where after a change of K or of the method is decided by `changes.Takeover`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata

from megatron_muloco.checkpoint.changes import (
    RunningMean,
    Takeover,
    differences,
    model_differences,
    refusal,
)
from megatron_muloco.checkpoint.directory import (
    everywhere,
    missing_bytes,
    read_index,
    read_tensors,
)
from megatron_muloco.checkpoint.io import digests_of
from megatron_muloco.checkpoint.layout import (
    FINAL_ANCHOR,
    STATE_FILE,
)
from megatron_muloco.checkpoint.sharding import (
    ModelSpace,
    Part,
    render,
    sharded_tensors,
    stored_edges,
)
from megatron_muloco.checkpoint.state import (
    ANCHOR,
    Description,
    Masters,
    RunState,
    is_shared,
    read_description,
    rng_key,
    rng_tensors,
    set_rng_tensors,
)
from megatron_muloco.comm.collectives import broadcast_object
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError
from megatron_muloco.model.initialise import poison

__all__ = ["load_anchor", "load_run"]


Wanted = Mapping[str, Sequence[str]]  # key prefix -> parameter names
Pieces = dict[str, dict[str, Tensor]]  # as Kinds, read from a checkpoint

_REMEDY = "Resume from an older checkpoint (checkpoint.resume: <directory>)."


def load_run(path: Path, into: RunState, space: ModelSpace) -> Description:
    """Overwrite the live state with that of a training checkpoint; return its description.

    Nothing is overwritten before everything has been read and its digests have been verified, which
    is before anything is averaged. Where K or the method changes, `changes.Takeover` has the rules.

    Raises:
        CheckpointError: The checkpoint is damaged, was written by another program or in another
            format, or belongs to a run that this one cannot continue; the same on all ranks.

    Collectives: `ModelSpace` over dp x cp, digests over the replica, error agreement and parameter
    publication; every rank of the job calls it.
    """
    control = into.groups.control
    with everywhere(control, f"the checkpoint {path} cannot be read", _REMEDY):
        description = read_description(path)
        _check_config(path, description, into)
    index = _whole_index(path, description, control)
    takeover = Takeover(description, into.resolved, into.groups.coords.replica)
    source = _Source(path, index, takeover, into, space)
    pieces = source.read(_wanted(takeover, index, into, space))
    with everywhere(control, f"the checkpoint {path} cannot be resumed", _REMEDY):
        takeover.require_finite(source.broken)
    with everywhere(control, f"the values in {path / STATE_FILE} do not fit this run", _REMEDY):
        _apply(takeover, pieces, into)
    # Generator states belong to ranks. In another layout rank r does other work, so every rank
    # keeps the generators that it was started with.
    if description.topology == asdict(into.groups.topology):
        _load_rng(path, index, control)
    into.scalars.clear()
    into.scalars.update(description.scalars)
    into.view.publish()
    return description


def load_anchor(
    path: Path,
    groups: Groups,
    view: Masters,
    space: ModelSpace,
    *,
    flushed: bool = True,
    model: Mapping[str, Any] | None = None,
) -> Description:
    """Set masters and model parameters to the anchor of a checkpoint of any number of replicas.

    For evaluation and as the first weights of another run. The states of the inner and outer
    optimizer are not changed.

    Args:
        path: A training checkpoint.
        groups: This rank's groups.
        view: Masters of this rank.
        space: Model space of the same shards.
        flushed: Take the anchor after the final flush where the checkpoint has one.
        model: The resolved section ``model`` of this run, which has to be the checkpoint's.

    Raises:
        CheckpointError: As `load_run`.

    Collectives: every rank of the job calls it.
    """
    if flushed and (path / FINAL_ANCHOR / STATE_FILE).is_file():
        path = path / FINAL_ANCHOR
    with everywhere(groups.control, f"the checkpoint {path} cannot be read", _REMEDY):
        description = read_description(path)
        if model is not None:
            _check_model(path, description, model)
    index = _whole_index(path, description, groups.control)
    pieces = _read(path, index, {ANCHOR: list(view.infos)}, space, groups.control)
    found = digests_of(groups, view.shards, pieces, space.device)
    _check_digests(path, found, {ANCHOR: description.anchor_digest}.get, groups.control)
    _fill(view, pieces[ANCHOR])
    view.publish()
    return description


def _check_config(path: Path, description: Description, into: RunState) -> None:
    found = differences(description.config, into.resolved)
    problem = refusal(found, into.config.checkpoint.allow_changes)
    if problem:
        raise CheckpointError(f"{path} was saved by a run with another configuration:\n{problem}")


def _check_model(path: Path, description: Description, model: Mapping[str, Any]) -> None:
    lines = model_differences(description.config, {**description.config, "model": model})
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise CheckpointError(
            f"{path} has the weights of another model:{listed}\nUse the model of that checkpoint."
        )


def _whole_index(path: Path, description: Description, control: ProcessGroup) -> Metadata:
    """Return the index of a checkpoint, which rank 0 reads, after checking the sizes of its files.

    Collectives: agreement on errors, then rank 0 broadcasts the index to the job, some hundred
    bytes for each chunk.
    """
    index: Any = None
    with everywhere(control, f"the checkpoint {path} cannot be read", _REMEDY):
        if torch.distributed.get_rank() == 0:
            index = read_index(path, description.index_digest)
            if problems := missing_bytes(path, index):
                raise CheckpointError(
                    f"the checkpoint {path} is incomplete: {'; '.join(problems[:4])}"
                    f"{f' and {len(problems) - 4} more' if len(problems) > 4 else ''}. {_REMEDY}"
                )
    whole: Metadata = broadcast_object(control, index)
    return whole


def _wanted(
    takeover: Takeover, index: Metadata, into: RunState, space: ModelSpace
) -> dict[str, "_Wanted"]:
    """Return kind -> what to read for it, the same on all dp x cp ranks.

    Kinds: ``master``, ``anchor``, ``inner.<moment>``, ``outer.<kind>``. Without stored masters the
    anchor is ``master``, and with every name: also a rank that is not primary needs the masters of
    its replicated parameters.

    Collectives: `ModelSpace.names`; every rank of the group calls it.
    """
    infos, stored = into.view.infos, index.state_dict_metadata
    primary = [name for name, info in infos.items() if info.is_primary]
    wanted = {"master": _Wanted(takeover.masters(), list(infos))}
    if takeover.saved.has_masters:  # also where this run has no anchor: its digest is checked
        wanted["anchor"] = _Wanted((ANCHOR,), primary)
    own = space.names(into.inner.named_state())
    for moment, names in takeover.moments_read(own).items():
        wanted[f"inner.{moment}"] = _Wanted((takeover.moment(moment),), names)
    if into.synchronizer is not None and not takeover.begins_outer:
        for kind in into.synchronizer.kinds():
            prefixes = takeover.outer(kind)
            if kind != "anchor" and prefixes:
                names = [name for name in primary if f"{prefixes[0]}.{name}" in stored]
                wanted[f"outer.{kind}"] = _Wanted(prefixes, names)
    return wanted


class _Wanted(NamedTuple):
    """Key prefixes whose mean is wanted (most often there is one), and parameter names."""

    prefixes: tuple[str, ...]
    names: list[str]


@dataclass
class _Source:
    """A checkpoint of which this rank reads its shards.

    Attributes:
        path: Its directory.
        index: Its index.
        takeover: The rules.
        state: The live state of this rank.
        space: Model space of its shards.
        broken: Key prefixes under which values were read that are not finite; not looked for where
            each replica takes its own state.
    """

    path: Path
    index: Metadata
    takeover: Takeover
    state: RunState
    space: ModelSpace
    broken: set[str] = field(default_factory=set)

    def read(self, wanted: Mapping[str, _Wanted]) -> Pieces:
        """Return kind -> name -> this rank's flat shard.

        Collectives: `_read` once for all kinds with one prefix and once for each prefix of the
        others; every rank of the job calls it.

        Raises:
            CheckpointError: Tensors cannot be read, or do not have the digest of the save.
        """
        single = {kind: each for kind, each in wanted.items() if len(each.prefixes) == 1}
        read = self._verified({each.prefixes[0]: each.names for each in single.values()})
        found = {kind: read[each.prefixes[0]] for kind, each in single.items()}
        for kind, each in wanted.items():
            if kind not in single:
                # One replica after the other: memory for two of them.
                mean = RunningMean()
                for prefix in each.prefixes:
                    mean.add(self._verified({prefix: each.names})[prefix])
                found[kind] = mean.mean
        return found

    def _verified(self, names: Wanted) -> Pieces:
        groups = self.state.groups
        pieces = _read(self.path, self.index, names, self.space, groups.control)
        found = digests_of(groups, self.state.view.shards, pieces, self.space.device)
        _check_digests(self.path, found, self.takeover.digest, groups.control)
        if self.takeover.changes_training:
            self.broken |= {
                prefix
                for prefix, tensors in pieces.items()
                if not all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            }
        return pieces


def _read(
    path: Path, index: Metadata, wanted: Wanted, space: ModelSpace, control: ProcessGroup
) -> Pieces:
    """Return key prefix -> name -> this rank's flat shard.

    Each stored chunk is read by one rank of a replica, or of all replicas where they share it.

    Collectives: agreement on errors over the job, then `ModelSpace.scatter` of each prefix.
    """
    parts = {prefix: _parts(prefix, names, index, space) for prefix, names in wanted.items()}
    # Poison, so that an element that no chunk fills cannot pass for a value.
    read = {
        prefix: {
            part: poison(torch.empty(part.numel, dtype=torch.float32))
            for part in found
            if space.has(part)
        }
        for prefix, found in parts.items()
    }
    tensors = [
        tensor
        for prefix, found in read.items()
        for part, values in found.items()
        for tensor in sharded_tensors(f"{prefix}.{part.name}", space.cut(part.name), part, values)
    ]
    with everywhere(control, f"the checkpoint {path} cannot be read", _REMEDY):
        read_tensors(path, index, tensors)
    return {prefix: space.scatter(read.pop(prefix), parts[prefix]) for prefix in wanted}


def _parts(prefix: str, names: Sequence[str], index: Metadata, space: ModelSpace) -> list[Part]:
    """Return the parts in which the pieces under a prefix are read: whole stored chunks."""

    def edges(name: str) -> list[int]:
        stored: Any = index.state_dict_metadata.get(f"{prefix}.{name}")
        chunks = [(chunk.offsets, chunk.sizes) for chunk in stored.chunks] if stored else []
        return stored_edges(space.cut(name), chunks)

    # Replicated parameters of ranks that are not primary come last: where they begin, the shares
    # would no longer end where those of the save did.
    primary = [name for name in names if space.cut(name).param.is_primary]
    copies = [name for name in names if not space.cut(name).param.is_primary]
    shared = is_shared(prefix)
    return [
        part
        for group in (primary, copies)
        for part in space.parts(group, shared=shared, edges=edges)
    ]


def _apply(takeover: Takeover, pieces: Pieces, into: RunState) -> None:
    _fill(into.view, pieces["master"])
    read = {
        kind.removeprefix("inner."): tensors
        for kind, tensors in pieces.items()
        if kind.startswith("inner.")
    }
    moments, count = takeover.moments(read, into.inner.named_state())
    into.inner.load_named_state(moments, step=count)
    if into.spikes is not None:
        # Norms and losses of another K or method are no measure for those of this one.
        own = {} if takeover.changes_training else takeover.saved.replicas[takeover.own]
        into.spikes.load_state_dict(own.get("spikes", {}))
    synchronizer = into.synchronizer
    if synchronizer is None:
        return
    if takeover.begins_outer:
        synchronizer.begin(takeover.saved.step)
        return

    def owned(kind: str) -> dict[str, Tensor]:
        return {n: t for n, t in pieces.get(kind, {}).items() if into.view.infos[n].is_primary}

    tensors = {kind: owned(f"outer.{kind}") for kind in synchronizer.kinds()}
    tensors["anchor"] = owned("anchor" if "anchor" in pieces else "master")
    if not takeover.outer("momentum"):
        tensors["momentum"] = {n: torch.zeros_like(t) for n, t in tensors["anchor"].items()}
    synchronizer.load_state_dict({"tensors": tensors, "scalars": takeover.outer_scalars()})


@torch.no_grad()
def _fill(view: Masters, pieces: Mapping[str, Tensor]) -> None:
    for name, master in view.masters.items():
        master.copy_(pieces[name])


def _check_digests(
    path: Path,
    found: Mapping[str, str],
    saved: Callable[[str], str | None],
    control: ProcessGroup,
) -> None:
    """Raise CheckpointError on all ranks if any rank has read other tensors than were saved.

    Collectives: agreement on errors over the job; a replica's own tensors may differ there alone.
    """
    with everywhere(control, f"the checkpoint {path} cannot be read", _REMEDY):
        for kind, digest in found.items():
            if digest != (saved(kind) or render(0)):  # a kind without tensors was not saved
                raise CheckpointError(
                    f"{path}: the {kind} tensors that were read have digest {digest}, but those "
                    f"that were saved have {saved(kind)}, so a file has changed since. {_REMEDY}"
                )


def _load_rng(path: Path, index: Metadata, control: ProcessGroup) -> None:
    """Restore this rank's generators if the checkpoint has all of their states.

    It has not when a run on CPUs resumes on GPUs, or the other way round.

    Collectives: agreement on errors over the job; every rank calls it.
    """
    states = {name: torch.empty_like(state) for name, state in rng_tensors().items()}
    keys = {rng_key(torch.distributed.get_rank(), name): state for name, state in states.items()}
    with everywhere(control, f"the random number states in {path} cannot be read", _REMEDY):
        if keys.keys() <= index.state_dict_metadata.keys():
            tensors = [ShardedTensor.from_rank_offsets(key, state) for key, state in keys.items()]
            read_tensors(path, index, tensors)
            set_rng_tensors(states)
