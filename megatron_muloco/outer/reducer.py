"""The seam between the outer step and communication.

The synchronizer decides *when* a fragment travels and what happens with the result; a `Reducer`
decides *how* it travels. Blocking or overlapped, fp32 or encoded, over a device or a host network:
all of them are reducers, and the synchronizer is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "CompressionStats",
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
"""Elements of each flat tensor of a fragment, in its order."""

Residuals = Mapping[str, Mapping[str, Tensor]]
"""Kind to name to flat fp32 tensor: what error feedback keeps."""


class Handle(Protocol):
    """A reduction under way; only the reducer that returned it looks inside."""

    @property
    def fragment(self) -> int:
        """Fragment that was launched."""


@dataclass(frozen=True, slots=True)
class CompressionStats:
    """What a lossy code did to this rank's tensors.

    Attributes:
        exact_square: Squared norm of what was encoded, residuals included; 0-dim, fp64.
        lost_square: Squared norm of what the code lost of it; 0-dim, fp64.
        encode_ms: Host time of encoding, for launch and wait together.
        decode_ms: Host time of decoding.
        error_feedback: Whether what was lost is kept for the next round.
    """

    exact_square: Tensor
    lost_square: Tensor
    encode_ms: float
    decode_ms: float
    error_feedback: bool


@dataclass(frozen=True, slots=True)
class ReductionStats:
    """What travelled beside the tensors, and how; weights and metadata are equal on all replicas.

    Attributes:
        weights: w of every replica, ``[K]``, fp32 on the host.
        metadata: The small numbers that every replica sent along, ``[K, n]``, fp32 on the host.
        wire_bytes: Bytes that this rank sent, for launch and wait together.
        uncoded_bytes: Bytes that an fp32 all-reduce of the tensors alone would have sent.
        code: What a lossy code did; ``None`` without one.
    """

    weights: Tensor
    metadata: Tensor
    wire_bytes: int
    uncoded_bytes: int = 0
    code: CompressionStats | None = None


@dataclass(frozen=True, slots=True)
class Reduced:
    """The result of a reduction.

    Attributes:
        mean: ``sum w_k x_k / sum w_k`` by name, fp32; zeros when all weights are zero. The tensors
            may be overwritten, and may be borrowed (`Reducer.returns_views`).
        stats: What travelled beside them.
    """

    mean: Mapping[str, Tensor]
    stats: ReductionStats


class Reducer(Protocol):
    """Averages a fragment over the ranks of the outer group, by the weights of their replicas.

    Collectives: all ranks of an outer group call ``launch`` and ``wait`` for the same fragments in
    the same order; the results are bitwise equal on all of them.

    Attributes:
        residual_names: Kinds of tensors that `residuals` returns.
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
    ) -> Handle:
        """Start the reduction and return at once.

        Args:
            fragment: Index of the fragment; for messages.
            tensors: Flat fp32 tensors, which nobody changes before ``wait`` returns. Every replica
                gives the same names and sizes in the same order; the mapping may be empty.
            weight: In [0, 1]. With 0 nothing of ``tensors`` reaches the others, not even a NaN.
            metadata: 1-D fp32 numbers to show to all replicas; the same count on each.
            round_index: For messages.

        Raises:
            SyncError: The collective could not be started.
        """

    def wait(self, handle: Handle) -> Reduced:
        """Finish the reduction and return the weighted mean.

        Raises:
            SyncError: A peer failed, or the time limit passed; names round, fragment and ranks.
        """

    def forget_residual(self) -> None:
        """Drop what this replica's codes lost, after the launches so far: it takes the anchor."""

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """Return what error feedback keeps, zeros where nothing was lost yet.

        ``residual`` (e) is this replica's; ``owner_residual`` (f) is the same on all replicas.

        Args:
            fragments: The sizes of this rank's tensors, fragment by fragment.

        Collectives: where f is kept, an all-gather of it over the outer group: half the bytes of an
        fp32 mean. All ranks of the outer group call it with no launch to wait for.
        """

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """Take copies of what `residuals` returned on any layout of the same model."""


# ------------------------------------------------------------------------------------------
# The small numbers that every replica shows to the others with a launch.
#
# ::
#
#     [ norm | the caller's line values | sketch ]      fp32; the same sizes on every replica


def pack_metadata(norm: float, line_values: Tensor | None, sketch: Tensor | None = None) -> Tensor:
    """Return one replica's numbers, 1-D.

    Args:
        norm: Of the pseudogradient; NaN where it is not finite.
        line_values: The caller's.
        sketch: Of this rank's share of the pseudogradient, in rounds that compare replicas.
    """
    parts = [part.float() for part in (line_values, sketch) if part is not None]
    device = parts[0].device if parts else torch.device("cpu")
    own = torch.tensor([norm], dtype=torch.float32, device=device)
    return torch.cat([own, *(part.to(device) for part in parts)])


@dataclass(frozen=True, slots=True)
class ReplicaMetadata:
    """What all replicas showed.

    Attributes:
        norms: ``[K]``.
        line_values: ``[K, n]``.
        sketches: ``[K, sketch size]``.
    """

    norms: Tensor
    line_values: Tensor
    sketches: Tensor

    @classmethod
    def unpack(cls, table: Tensor, sketch_size: int) -> "ReplicaMetadata":
        """Return the parts of ``[K, numbers of a replica]``."""
        end = table.size(1) - sketch_size
        return cls(table[:, 0], table[:, 1:end], table[:, end:])
