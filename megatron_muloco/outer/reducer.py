"""The seam between the outer step and communication.

The synchronizer decides *when* a fragment travels and what happens with the result; a `Reducer`
decides *how* it travels. Blocking or overlapped, fp32 or encoded, over a device or a host network:
all of them are reducers, and the synchronizer is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Handle", "Reduced", "Reducer", "ReductionStats"]


class Handle(Protocol):
    """A reduction under way; only the reducer that returned it looks inside."""

    @property
    def fragment(self) -> int:
        """Fragment that was launched."""


@dataclass(frozen=True, slots=True)
class ReductionStats:
    """What travelled beside the tensors; the same on all replicas except ``wire_bytes``.

    Attributes:
        weights: w of every replica, ``[K]``, fp32 on the host.
        riders: The small numbers that every replica sent along, ``[K, n]``, fp32 on the host.
        wire_bytes: Bytes that this rank sent, for launch and wait together.
    """

    weights: Tensor
    riders: Tensor
    wire_bytes: int


@dataclass(frozen=True, slots=True)
class Reduced:
    """The result of a reduction.

    Attributes:
        mean: ``sum w_k x_k / sum w_k`` by name, fp32; zeros when all weights are zero. The tensors
            are borrowed from the reducer until its next launch, and may be overwritten.
        stats: What travelled beside them.
    """

    mean: Mapping[str, Tensor]
    stats: ReductionStats


class Reducer(Protocol):
    """Averages a fragment over the ranks of the outer group, by the weights of their replicas.

    Collectives: all ranks of an outer group call ``launch`` and ``wait`` for the same fragments in
    the same order; the results are bitwise equal on all of them.
    """

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        riders: Tensor,
        *,
        round_index: int,
    ) -> Handle:
        """Start the reduction and return at once.

        Args:
            fragment: Index of the fragment; for messages and per-fragment buffers.
            tensors: Flat fp32 tensors, copied before the call returns. Every replica gives the same
                names and sizes in the same order; the mapping may be empty.
            weight: 0 or 1. With 0 nothing of ``tensors`` reaches the others, not even a NaN.
            riders: 1-D fp32 numbers to show to all replicas; the same count on each.
            round_index: For messages.

        Raises:
            SyncError: The collective could not be started.
        """

    def wait(self, handle: Handle) -> Reduced:
        """Finish the reduction and return the weighted mean.

        Raises:
            SyncError: A peer failed, or the time limit passed; names round, fragment and ranks.
        """
