"""`Reducer`, the interface between the outer step and communication, and what crosses it.

The synchronizer decides when a fragment is sent and how the result is used; a `Reducer` decides how
it is sent: blocking or overlapped, in fp32 or compressed, through device or host memory. `comm`
implements it.

A launch also sends a few numbers of each replica, its metadata::

    [ norm | line values of the caller | sketch ]      fp32; the same sizes on every replica
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

from megatron_muloco.outer.measurement import Measurements

__all__ = [
    "Handle",
    "Reduced",
    "Reducer",
    "ReductionStats",
    "ReplicaMetadata",
    "Residuals",
    "Sizes",
    "pack_metadata",
]

Sizes = Mapping[str, int]
"""Number of elements by name of a fragment's flat tensors, in their order."""

Residuals = Mapping[str, Mapping[str, Tensor]]
"""Residuals of error feedback: flat fp32 tensors by kind and name."""


class Handle(Protocol):
    """A running reduction; its content is private to the reducer that returned it."""

    @property
    def fragment(self) -> int:
        """Index of the launched fragment."""


HandleT = TypeVar("HandleT", bound=Handle, default=Any)
"""The handles of one reducer; `Reducer` alone means one of any kind."""


@dataclass(frozen=True, slots=True)
class ReductionStats:
    """Weights, metadata and cost of a reduction. Weights and metadata are equal on all ranks.

    Attributes:
        weights: w of every replica, ``[K]``, fp32 on the host.
        metadata: Metadata of every replica, ``[K, n]``, fp32 on the host.
        wire_bytes: Bytes sent by this rank, in launch and wait together.
        uncoded_bytes: Bytes that an fp32 all-reduce of the tensors alone would have sent.
        compressed: Whether the tensors were sent in fewer bits, so that the mean is not exact.
        measurements: Metrics of this reduction by tag, for instance the encoding error. All ranks
            of a replica give the same tags in the same order.
    """

    weights: Tensor
    metadata: Tensor
    wire_bytes: int
    uncoded_bytes: int = 0
    compressed: bool = False
    measurements: Measurements = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reduced:
    """The result of a reduction.

    Attributes:
        mean: ``sum w_k x_k / sum w_k`` by name, fp32; zeros when all weights are zero. The tensors
            may be overwritten by the caller, and may alias internal buffers
            (`Reducer.returns_views`).
        stats: Weights, metadata and cost.
    """

    mean: Mapping[str, Tensor]
    stats: ReductionStats


class Reducer(Protocol[HandleT]):
    """Averages a fragment over the outer group, weighted by the weights of the replicas.

    Collectives: all ranks of an outer group call ``launch`` and ``wait`` for the same fragments in
    the same order. The results are bitwise equal on all of them; anchors would drift apart
    otherwise.

    Attributes:
        residual_names: Kinds of residuals that `residuals` returns.
        returns_views: Whether the returned tensors alias internal buffers and are valid only until
            the next launch.
    """

    residual_names: tuple[str, ...]
    returns_views: bool

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> HandleT:
        """Start the reduction and return at once.

        Args:
            fragment: Index of the fragment; for messages.
            tensors: Flat fp32 tensors. The caller must not change them before ``wait`` returns.
                Names, sizes and order are the same on every replica; the mapping may be empty.
            weight: Weight of this replica, in [0, 1]. With 0 nothing of ``tensors`` reaches the
                other replicas, not even a NaN.
            metadata: 1-D fp32 numbers for all replicas; the same count on each.
            round_index: Round of the launch; for messages.

        Raises:
            SyncError: The collective could not be started.
        """

    def wait(self, handle: HandleT) -> Reduced:
        """Finish the reduction and return the weighted mean.

        Raises:
            SyncError: A peer failed or the time limit passed; the message names round, fragment
                and ranks.
        """

    def forget_residual(self) -> None:
        """Drop this replica's residual, after the launches made so far.

        For a replica that restarts from the anchor: the residual belongs to lost progress.
        """

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """Return the residuals of error feedback, zeros where there is none yet.

        ``residual`` (e) is this replica's own; ``owner_residual`` (f) is the same on all replicas.

        Args:
            fragments: Sizes of this rank's tensors, by fragment.

        Collectives: where f is kept, an all-gather of it over the outer group (half the bytes of an
        fp32 all-reduce). All ranks of the outer group call it, when no reduction is running.
        """

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """Copy in what `residuals` returned, on this or another layout of the same model."""


# ---- metadata ------------------------------------------------------------------------------------


def pack_metadata(norm: float, line_values: Tensor | None, sketch: Tensor | None = None) -> Tensor:
    """Return one replica's metadata, 1-D fp32, on the device of the given tensors.

    Args:
        norm: Norm of the replica's pseudogradient; NaN where it is not finite.
        line_values: Numbers of the caller, 1-D.
        sketch: Sketch of this rank's shards of the pseudogradient, in rounds that compare replicas.
    """
    parts = [part.float() for part in (line_values, sketch) if part is not None]
    device = parts[0].device if parts else torch.device("cpu")
    own = torch.tensor([norm], dtype=torch.float32, device=device)
    return torch.cat([own, *(part.to(device) for part in parts)])


@dataclass(frozen=True, slots=True)
class ReplicaMetadata:
    """Metadata of all replicas.

    Attributes:
        norms: Norm of every replica's pseudogradient, ``[K]``.
        line_values: Line values of every replica, ``[K, n]``.
        sketches: Sketches of this position's shards, ``[K, sketch size]``.
    """

    norms: Tensor
    line_values: Tensor
    sketches: Tensor

    @classmethod
    def unpack(cls, table: Tensor, sketch_size: int) -> "ReplicaMetadata":
        """Split ``[K, 1 + n + sketch_size]`` into its parts (views)."""
        end = table.size(1) - sketch_size
        return cls(table[:, 0], table[:, 1:end], table[:, end:])
