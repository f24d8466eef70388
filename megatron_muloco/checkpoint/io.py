"""Conversion between the live state of a run and the contents of one checkpoint directory.

Saving describes the live tensors as Megatron's `ShardedTensor`s and the plain values as one
`Description`. Loading reads all of it, checks it against the digests, and only then overwrites the
live state. Where directories are, and when a new one becomes visible, is `store`'s part.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
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
    file_digest,
    finish_directory,
    missing_bytes,
    read_index,
    read_tensors,
)
from megatron_muloco.checkpoint.layout import (
    CONFIG_FILE,
    FINAL_ANCHOR,
    INDEX_FILE,
    STATE_FILE,
    write_file,
)
from megatron_muloco.checkpoint.sharding import (
    ModelSpace,
    Part,
    model_digests,
    render,
    sharded_tensors,
    stored_edges,
)
from megatron_muloco.checkpoint.state import (
    ANCHOR,
    FORMAT,
    Description,
    Masters,
    RunState,
    is_shared,
    outer_key,
    read_description,
    rng_key,
    rng_tensors,
    set_rng_tensors,
)
from megatron_muloco.comm.collectives import broadcast_object, gather_objects, sum_over
from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import CheckpointError, SyncError
from megatron_muloco.model.initialise import poison
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
    "load_anchor",
    "load_run",
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
Wanted = Mapping[str, Sequence[str]]  # key prefix -> parameter names
Pieces = dict[str, dict[str, Tensor]]  # as Kinds, read from a checkpoint

_REMEDY = "Resume from an older checkpoint (checkpoint.resume: <directory>)."


# ---- saving --------------------------------------------------------------------------------


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


# ---- loading -------------------------------------------------------------------------------


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
