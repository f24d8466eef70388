"""`Measurement`: one metric of one fragment, with the rule that combines ranks and fragments.

A metric of an outer step is measured on one rank for one fragment, in a reducer or in
`FragmentDiagnostics`. The log shows one number for all ranks of the replica and all fragments
applied after the same inner step. A measurement carries what is needed for that, so that no code
between the place that measures and the log knows single metrics::

    numbers of a rank       -- added over the replica, if ``over_ranks`` -->  numbers of a fragment
    numbers of a fragment   -- added over fragments, then ``value``      -->  number in the log
                       or   -- ``value``, then ``over_fragments``        -->  number in the log
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Measurement", "Measurements", "combined", "summed_over_replica"]


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

    A metric that some fragments lack is that of the others. All numbers cross to the host in one
    transfer.
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
    """Return the numbers of measurements, with one transfer per call."""
    if not measurements:
        return []
    # Numbers of a device go there first, so that only one tensor crosses to the host.
    device = next((m.numbers.device for m in measurements if m.numbers.is_cuda), None)
    numbers = [each.numbers if device is None else each.numbers.to(device) for each in measurements]
    flat = iter(torch.cat(numbers).tolist())
    return [[next(flat) for _ in range(each.numbers.numel())] for each in measurements]


def _stack(numbers: Sequence[float | Tensor]) -> Tensor:
    """Return numbers or 0-dim tensors of one device as one tensor, ``[n]``, fp64."""
    return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])


def _same(number: float) -> float:
    return number


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _relative_norm(square: float, whole_square: float) -> float:
    return math.sqrt(square / whole_square) if whole_square else math.nan
