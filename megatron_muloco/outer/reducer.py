"""`Reducer`, the interface between the outer step and communication, and what crosses it.

The synchronizer decides when a fragment is sent and how the result is used; a `Reducer` decides how
it is sent: blocking or overlapped, in fp32 or compressed, through device or host memory. `comm`
implements it.

A launch also sends a few numbers of each replica, its metadata::

    [ norm | line values of the caller | sketch ]      fp32; the same sizes on every replica

A `Measurement` is one metric of one fragment. A reducer adds its own to a `Reduced`, so a new
metric of communication needs no change in the outer step or the monitor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

__all__ = [
    "Handle",
    "Measurement",
    "Measurements",
    "Reduced",
    "Reducer",
    "ReductionStats",
    "ReplicaMetadata",
    "Residuals",
    "Sizes",
    "combined",
    "metadata_count",
    "pack_metadata",
    "summed_over_replica",
]

Sizes = Mapping[str, int]
"""Number of elements by name of a fragment's flat tensors, in their order."""

Residuals = Mapping[str, Mapping[str, Tensor]]
"""Residuals of error feedback: flat fp32 tensors by kind and name."""


# ---- measurements ------------------------------------------------------------------------
#
# A metric of an outer step is measured on one rank for one fragment, in a reducer or in
# `FragmentDiagnostics`. The log shows one number for all ranks of the replica and all fragments
# applied after the same inner step. A measurement carries what is needed for that, so that no code
# between the place that measures and the log knows single metrics::
#
#     numbers of a rank       -- added over the replica, if ``over_ranks`` -->  of a fragment
#     numbers of a fragment   -- added over fragments, then ``value``      -->  number in the log
#                       or    -- ``value``, then ``over_fragments``        -->  number in the log


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric of one fragment on one rank.

    Attributes:
        numbers: Numbers that the value is computed from, 1-D fp64, on any device.
        value: Function from these numbers, as separate arguments, to the value of the metric;
            ``None`` leaves the metric out.
        over_ranks: Whether ``numbers`` are added over the ranks of the replica. Otherwise they are
            this rank's, or already the same on all of them.
        over_fragments: Function from the values of several fragments to one value. By default
            their ``numbers`` are added instead, and ``value`` is applied to the sums.
    """

    numbers: Tensor
    value: Callable[..., float | None]
    over_ranks: bool = False
    over_fragments: Callable[[Sequence[float]], float] | None = None

    @classmethod
    def of(
        cls, number: float, over_fragments: Callable[[Sequence[float]], float] = math.fsum
    ) -> "Measurement":
        """Return a plain number of this rank; added over fragments by default."""
        return cls(_stack([number]), _same, over_fragments=over_fragments)

    @classmethod
    def norm(cls, square: float | Tensor, *, over_ranks: bool = True) -> "Measurement":
        """Return a norm from its square; that of several fragments is the norm of their union."""
        return cls(_stack([square]), math.sqrt, over_ranks)

    @classmethod
    def relative_norm(cls, square: Tensor, whole_square: Tensor) -> "Measurement":
        """Return the ratio of two norms from their squares, added over ranks; NaN for 0 / 0."""
        return cls(_stack([square, whole_square]), _relative_norm, over_ranks=True)

    @classmethod
    def ratio(cls, part: float, whole: float) -> "Measurement":
        """Return ``part / whole`` of numbers of this rank; left out where ``whole`` is 0."""
        return cls(_stack([part, whole]), _ratio)


Measurements = Mapping[str, Measurement]
"""Measurements by TensorBoard tag."""


def summed_over_replica(
    measurements: Measurements, total: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, Measurement]:
    """Return the measurements with their numbers added over the ranks of the replica.

    Args:
        measurements: This rank's; the same tags in the same order on all ranks of the replica.
        total: Sum over the ranks of the replica.
        device: Device of the tensor given to ``total``.

    Collectives: one call of ``total``, with all numbers of all measurements.
    """
    shared = [each.numbers.to(device) for each in measurements.values() if each.over_ranks]
    sums = iter(total(torch.cat(shared)).split([numbers.numel() for numbers in shared]))
    return {
        tag: replace(each, numbers=next(sums)) if each.over_ranks else each
        for tag, each in measurements.items()
    }


def combined(fragments: Sequence[Measurements]) -> dict[str, float]:
    """Return the value of every metric over fragments applied after one inner step, by tag.

    A metric that some fragments lack is that of the others. All numbers on a device cross to the
    host in one transfer.
    """
    by_tag: dict[str, list[tuple[Measurement, list[float]]]] = {}
    everything = [(tag, each) for fragment in fragments for tag, each in fragment.items()]
    for (tag, each), numbers in zip(everything, _on_host([m for _, m in everything]), strict=True):
        by_tag.setdefault(tag, []).append((each, numbers))
    values = {tag: _over_fragments(parts) for tag, parts in by_tag.items()}
    return {tag: value for tag, value in values.items() if value is not None}


def _over_fragments(parts: Sequence[tuple[Measurement, list[float]]]) -> float | None:
    first, _ = parts[0]
    if first.over_fragments is None:
        return first.value(*(sum(column) for column in zip(*(n for _, n in parts), strict=True)))
    values = [each.value(*numbers) for each, numbers in parts]
    known = [value for value in values if value is not None]
    return first.over_fragments(known) if known else None


def _on_host(measurements: Sequence[Measurement]) -> list[list[float]]:
    """Return the numbers of measurements; those on a device cross to the host in one transfer."""
    # Numbers that are on the host stay there: a copy to the device would wait for it, too.
    on_device = [each.numbers for each in measurements if each.numbers.is_cuda]
    crossed = iter(torch.cat(on_device).tolist() if on_device else ())
    return [
        list(islice(crossed, each.numbers.numel()))
        if each.numbers.is_cuda
        else each.numbers.tolist()
        for each in measurements
    ]


def _stack(numbers: Sequence[float | Tensor]) -> Tensor:
    """Return numbers or 0-dim tensors of one device as one tensor, ``[n]``, fp64."""
    return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])


def _same(number: float) -> float:
    return number


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _relative_norm(square: float, whole_square: float) -> float:
    return math.sqrt(square / whole_square) if whole_square else math.nan


# ---- the interface -----------------------------------------------------------------------


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

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """Return memory for the tensors of the next launch: flat fp32, by name, undefined.

        A reducer that sends fp32 values as they are returns views of what it will send, so that
        `launch`, given this very mapping, copies nothing. It then works in this memory. Others
        return new memory.

        Args:
            sizes: Number of elements by name, in the order of the launch.
            metadata_count: fp32 metadata values of a replica.
        """

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
            tensors: Flat fp32 tensors, what `memory` returned or any others. The caller must not
                change them before ``wait`` returns. Names, sizes and order are the same on every
                replica; the mapping may be empty.
            weight: Weight of this replica, in [0, 1]. With 0 nothing of ``tensors`` reaches the
                other replicas, not even a NaN.
            metadata: 1-D fp32 numbers for all replicas; the same count on each.
            round_index: Round of the launch; for messages.

        Raises:
            SyncError: The collective could not be started.
        """

    def advance(self, handle: HandleT) -> None:
        """Do the work that is due an inner step after the launch or the previous call.

        Called after every inner step for each reduction in flight, in the order of launches. What
        it does, and with it the order of collectives, depends on the number of calls alone, never
        on what has arrived. Most reducers do nothing here.

        Raises:
            SyncError: As `wait`.
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


def metadata_count(line_values: Tensor | None, sketch_size: int = 0) -> int:
    """Return the length of what `pack_metadata` packs."""
    return 1 + (0 if line_values is None else line_values.numel()) + sketch_size


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
