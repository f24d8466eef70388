"""Contents of a checkpoint: `RunState` (live), `Description` (plain values) and the tensor keys.

Two kinds of tensors are stored, each under ``<prefix>.<model-wide parameter name>``:

- *shared*, bitwise the same on all replicas and written once, a share by each: ``anchor``,
  ``outer.momentum``, ``outer.mean`` (fragments in flight), ``outer.owner_residual`` (f);
- *per replica*, under ``replica_<r>.``: ``master`` (unless all masters equal the anchor),
  ``inner.<moment>``, ``outer.at_launch``, ``outer.residual`` (e).

Which configuration may resume a checkpoint is `megatron_muloco.checkpoint.changes`' part.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from pydantic import Field, Strict, StringConstraints, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict

from megatron_muloco.checkpoint.layout import STATE_FILE
from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.errors import CheckpointError
from megatron_muloco.optim.muon import MuonAdamW
from megatron_muloco.outer.synchronizer import Synchronizer
from megatron_muloco.params import ParameterNames, ParamInfo, Shard

__all__ = [
    "ANCHOR",
    "FORMAT",
    "Description",
    "Masters",
    "RunState",
    "format_note",
    "is_shared",
    "of_replica",
    "outer_key",
    "read_description",
    "rng_key",
    "rng_tensors",
    "set_rng_tensors",
]

FORMAT = 2
_FORMAT_WITHOUT_DIGESTS = 1
_DIGEST = "content_digest"  # key of the file's own digest
ANCHOR = "anchor"
_SHARED_OUTER = {
    "anchor": ANCHOR,
    "momentum": "outer.momentum",
    "mean": "outer.mean",
    "owner_residual": "outer.owner_residual",
}


class Masters(Protocol):
    """The fp32 masters of this rank; `megatron_muloco.runtime.megatron.MasterView` is one."""

    shards: tuple[Shard, ...]
    masters: Mapping[str, Tensor]
    infos: dict[str, ParamInfo]
    names: ParameterNames

    def publish(self) -> None:
        """Bring the model's parameters up to date with the masters."""


class Stateful(Protocol):
    """Something of a replica, equal on all its ranks, that is saved as plain values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the plain values, for JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them; from an empty mapping, begin anew."""


@dataclass
class RunState:
    """Live objects whose state makes up a checkpoint.

    Attributes:
        groups: This rank's groups.
        view: Masters of this rank.
        inner: The bound inner optimizer.
        synchronizer: The outer step; ``None`` for plain data parallelism, where the masters are the
            anchor.
        config: The run's configuration.
        scalars: Plain numbers, texts, lists and dicts of the training run, equal on all ranks, such
            as the consumed samples; replaced on load.
        spikes: Medians of the replica's gradient norms and losses; ``None`` where nothing watches
            them.
        resolved: The configuration as plain values, as a checkpoint stores it.
    """

    groups: Groups
    view: Masters
    inner: MuonAdamW
    synchronizer: Synchronizer | None
    config: RunConfig
    scalars: dict[str, Any] = field(default_factory=dict)
    spikes: Stateful | None = None
    resolved: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Resolve the configuration once, rather than at every save."""
        self.resolved = self.config.model_dump(mode="json")

    def anchors(self) -> Mapping[str, Tensor]:
        """Return the anchor of the shards that this rank synchronises, by name."""
        if self.synchronizer is not None:
            return self.synchronizer.anchors()
        return {s.name: self.view.masters[s.name] for s in self.view.shards if s.param.is_primary}


@dataclass(frozen=True)
class Description:
    """Content of the JSON file that describes a checkpoint; readable without torch.

    The file also holds a digest of these values, which `read_description` verifies.

    Attributes:
        format: Version of the checkpoint format.
        step: Number of inner steps made.
        topology: Sizes of the axes of the world that saved it.
        anchor_digest: Digest of the anchor (`megatron_muloco.checkpoint.sharding`).
        versions: Package name -> version that wrote it; information for people.
        has_masters: Whether masters are stored, because they differ from the anchor.
        scalars: Plain values of the training run (`RunState.scalars`).
        replicas: For each replica the ``digests`` of its tensors by key prefix, its ``inner_step``
            (steps since its moments were zero) and the plain values of its ``synchronizer`` and, if
            it has any, of its ``spikes``.
        config: The resolved configuration.
        index_digest: SHA-256 digest of the index of the tensors; ``None`` in format 1.
    """

    format: int
    step: int
    topology: dict[str, int]
    anchor_digest: str
    versions: dict[str, str]
    has_masters: bool
    scalars: dict[str, Any]
    replicas: list[dict[str, Any]]
    config: dict[str, Any]
    index_digest: str | None = None

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps({**vars(self), _DIGEST: _content_digest(vars(self))}, indent=1) + "\n"


def _content_digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 digest of plain values, which does not depend on how JSON is laid out."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_description(path: Path) -> Description:
    """Return the description of the checkpoint at ``path``.

    Raises:
        CheckpointError: It was not written by this package, is damaged, or is of a later format.
    """
    file = path / STATE_FILE
    if not file.is_file():
        foreign = any(
            (path / name).exists() for name in ("metadata.json", "common.pt", ".metadata")
        )
        what = (
            "is a checkpoint of another program (Megatron's format without our state)"
            if foreign
            else "is not a checkpoint"
        )
        raise CheckpointError(
            f"{path} {what}: it has no {STATE_FILE}, so it holds no optimizer or outer state to "
            "resume. Use a checkpoint that this package wrote."
        )
    try:
        tree = json.loads(file.read_bytes())
        return _checked_description(file, tree)
    except CheckpointError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where[:100]}: {first['msg']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
    raise CheckpointError(
        f"{file} is damaged ({problem}), so the checkpoint cannot be read. Resume from an older "
        "one (checkpoint.resume: <directory>)."
    )


def _checked_description(file: Path, tree: Any) -> Description:
    """Return the content of ``file`` as a description.

    Raises:
        CheckpointError: It has a later format.
        ValueError: It is not what was saved; likewise `TypeError` and `KeyError`.
    """
    version = tree["format"]
    if type(version) is not int:
        raise ValueError(f"the format is {str(version)[:20]}")
    if version not in (_FORMAT_WITHOUT_DIGESTS, FORMAT):
        written = tree.get("versions")
        by = [f"{k} {v}" for k, v in written.items()] if isinstance(written, dict) else []
        raise CheckpointError(
            f"{file} has format {str(version)[:20]}, but this version of the package reads formats "
            f"{_FORMAT_WITHOUT_DIGESTS} and {FORMAT} only. Load it with the version that wrote it: "
            f"{', '.join(by) or 'unknown'}."
        )
    if version != _FORMAT_WITHOUT_DIGESTS:
        if tree.pop(_DIGEST) != _content_digest(tree):
            raise ValueError("its digest is not that of its values, so one of them has changed")
        if "index_digest" not in tree:
            raise KeyError("index_digest")
    _FILE.validate_python(tree)
    description = Description(**tree)
    if description.topology["num_replicas"] != len(description.replicas):
        raise ValueError(f"it describes {len(description.replicas)} replicas")
    counted = {description.step, description.scalars.get("step", description.step)}
    counted |= {own["synchronizer"]["step"] for own in tree["replicas"] if own["synchronizer"]}
    if len(counted) > 1:  # the outer schedule would also count to a huge one without end
        raise ValueError(f"it is of several steps: {sorted(counted)}")
    return description


# What loading needs of the values, since a file of an older format has no digest, and the digest of
# an edited file may fit. Strict, because True would pass for 1 and 1.0 for 1; all readers of JSON
# hold integers below 2**53 exactly.
_Count = Annotated[int, Strict(), Field(ge=0, lt=2**53)]
_Size = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
_TensorDigest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
_FileDigest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class _Scalars(TypedDict, total=False):
    step: _Count
    consumed_samples: _Count


class _Synchronizer(TypedDict):
    step: _Count


class _Own(TypedDict):
    digests: dict[str, _TensorDigest]
    inner_step: _Count
    synchronizer: _Synchronizer | None


class _Section(TypedDict):
    kind: str


class _Parallel(TypedDict):
    num_replicas: _Size


class _Config(TypedDict):
    model: dict[str, Any]
    parallel: _Parallel
    inner: _Section
    outer: _Section


class _File(TypedDict):
    format: int
    step: _Count
    topology: dict[str, _Size]
    anchor_digest: _TensorDigest
    versions: dict[str, str]
    has_masters: Annotated[bool, Strict()]
    scalars: _Scalars
    replicas: list[_Own]
    config: _Config
    index_digest: NotRequired[_FileDigest]


_FILE = TypeAdapter(_File)


def format_note(description: Description) -> str:
    """Return what to tell the user about a checkpoint of an older format; empty for the current."""
    if description.format == FORMAT:
        return ""
    return (
        f"the checkpoint has format {description.format}, without digests of {STATE_FILE} and of "
        "the index of its tensors: a changed number in them would not be noticed. The next "
        f"checkpoint has format {FORMAT}."
    )


def outer_key(kind: str, replica: int) -> str:
    """Return the key prefix of a kind of the synchronizer's tensors."""
    return _SHARED_OUTER.get(kind) or f"replica_{replica}.outer.{kind}"


def of_replica(prefix: str, replica: int) -> str:
    """Return a key prefix of replica 0 with the number of another one."""
    own = "replica_0."
    return f"replica_{replica}.{prefix[len(own) :]}" if prefix.startswith(own) else prefix


def is_shared(prefix: str) -> bool:
    """Whether the tensors under a key prefix are the same on all replicas."""
    return prefix in _SHARED_OUTER.values()


def rng_key(rank: int, name: str) -> str:
    """Return the key of a generator's state; CPU and GPU runs cannot exchange states."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"rng.{device}.rank_{rank}.{name}"


def rng_tensors() -> dict[str, Tensor]:
    """Return the states of this rank's generators: torch's and Megatron's trackers."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    trackers = get_cuda_rng_tracker().get_states()
    states |= {f"tracker.{name}": state for name, state in trackers.items()}
    return {name: state.cpu() for name, state in states.items()}


def set_rng_tensors(states: Mapping[str, Tensor]) -> None:
    """Restore what `rng_tensors` returned."""
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    prefix = "tracker."
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(prefix): s for name, s in states.items() if name.startswith(prefix)}
    )
