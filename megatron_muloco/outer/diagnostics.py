"""Reports, diagnostics and metrics of outer steps.

`FragmentDiagnostics` measures a fragment while it is applied, and adds over the replica in one
collective; the result is a `FragmentReport`. An `OuterReport` has those of one inner step, and its
`metrics` are numbers by TensorBoard tag. Tensors stay on their device until then. A reducer adds
metrics of its own through `ReductionStats.measurements`.

`PseudogradientSketch` is a count sketch: it estimates cosines between pseudogradients that are
never in one place, from a few numbers of each replica.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.in_flight import InFlight
from megatron_muloco.outer.reducer import (
    Measurement,
    Measurements,
    combined,
    summed_over_replica,
)

__all__ = [
    "FragmentDiagnostics",
    "FragmentReport",
    "OuterReport",
    "PseudogradientSketch",
    "cosines",
    "gram",
]


@dataclass(frozen=True, slots=True)
class FragmentReport:
    """One applied fragment.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        round_index: Round of the launch.
        verdict: The guard's decision for this replica.
        weights: w of every replica, ``[K]``.
        line_values: Line values of every replica, ``[K, n]``.
        measurements: Metrics by tag, added over the replica.
    """

    fragment: int
    launched_at: int
    round_index: int
    verdict: Verdict
    weights: Tensor
    line_values: Tensor
    measurements: Measurements

    def metrics(self) -> dict[str, float]:
        """Return the metrics of this fragment by tag; reads from the device."""
        return combined([self.measurements])


@dataclass(frozen=True, slots=True)
class OuterReport:
    """The outer events after one inner step, or of the flush.

    Attributes:
        step: Inner step.
        round_index: Round of the step.
        launched: Indices of the launched fragments.
        applied: Reports of the applied fragments.
        restarted_from_anchor: Whether this replica was not finite and now holds the anchor in every
            fragment. The caller then zeroes the inner optimizer's state on all ranks of the
            replica.
        exhausted: Whether the guard's limit of empty rounds is reached, the same on all ranks of
            all replicas. The caller then saves and stops.
    """

    step: int
    round_index: int
    launched: tuple[int, ...]
    applied: tuple[FragmentReport, ...]
    restarted_from_anchor: bool
    exhausted: bool = False

    @property
    def alarm(self) -> bool:
        """Whether some applied fragment had no usable replica."""
        return any(not part.weights.any() for part in self.applied)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all applied fragments together by tag; empty if there are none.

        One transfer to the host for all tensors of the report.
        """
        if not self.applied:
            return {}
        metrics = combined([part.measurements for part in self.applied])
        return metrics | {"muloco/round": float(self.round_index)}


# ---- sketches ------------------------------------------------------------------------------------

_CHUNK_ELEMENTS = 2**22  # chosen: 16 MiB of temporary values and 32 MiB of temporary indices


@dataclass(frozen=True, slots=True)
class PseudogradientSketch:
    """Count sketch of a rank's shards: the same linear map at equal positions of all replicas.

    The cosine of two replicas' pseudogradients needs a dot product of vectors that are never on one
    device. Each rank sends a sketch of its shards instead: every value is multiplied by a random
    sign and added to one of ``width`` buckets. Signs and buckets are the same on all replicas, so
    the products of equal coordinates add up and all others cancel on average::

        values   x0  x1  x2  x3 | x4  x5  x6  x7 | x8  ...       width 4: rows of 4 values
        row 0   +x0 -x1 -x2 +x3                                  sign = row sign * column sign
        row 1   -x6 +x7 -x4 -x5                                  rotated by a random offset
        sketch   sum of the rows

    Dot products of sketches are unbiased estimates of the dot products of the vectors. Summed over
    the ranks of a replica and divided by the norms of the sketches they are cosines. For vectors
    without structure the standard error of a cosine c is that of a correlation coefficient,
    ``(1 - c**2) / sqrt(n)``, n the numbers in all sketches of a replica.

    Attributes:
        width: Numbers in a sketch, at least 1.
        interval: Rounds between two sketches.

    Source: count sketch of Charikar, Chen and Farach-Colton, "Finding frequent items in data
    streams" (2002). Difference: one random rotation per row of values in place of one random bucket
    per value, so that the sum runs in a fixed order on every device (no atomic additions).
    """

    width: int
    interval: int = 1

    def is_due(self, round_index: int) -> bool:
        """Whether the launches of a round send sketches."""
        return round_index % self.interval == 0

    def __call__(self, shards: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of flat fp32 tensors, ``[width]``, fp32; ``[0]`` without tensors.

        The result depends on names, sizes and values alone, not on the mapping's order or the rank.
        """
        parts = [self._sketch(name, shards[name]) for name in sorted(shards)]
        return torch.stack(parts).sum(0) if parts else torch.zeros(0)

    def _sketch(self, name: str, values: Tensor) -> Tensor:
        width, device = self.width, values.device
        rows = -(-values.numel() // width)
        # A host generator seeded by the name: equal signs on every rank and device, and no state.
        generator = torch.Generator().manual_seed(_seed(name))
        column_signs = _signs(width, generator).to(device)
        row_signs = _signs(rows, generator).to(device)
        turns = torch.randint(width, (rows,), generator=generator).to(device)
        places = torch.arange(width, device=device)
        total = torch.zeros(width, dtype=torch.float32, device=device)
        step = max(1, _CHUNK_ELEMENTS // width)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            chunk = values[first * width : last * width]
            missing = (last - first) * width - chunk.numel()
            table = torch.nn.functional.pad(chunk, (0, missing)).view(-1, width) * column_signs
            turned = table.gather(1, (places + turns[first:last, None]) % width)
            total += (turned * row_signs[first:last, None]).sum(0)
        return total


def gram(sketches: Tensor) -> Tensor:
    """Return the dot products of all pairs of rows, ``[K, K]``, fp64."""
    exact = sketches.double()
    return exact @ exact.T


def cosines(products: Tensor) -> Tensor:
    """Return the cosines of vectors from their dot products, ``[K, K]``; NaN for a zero vector."""
    norms = products.diagonal().sqrt()
    return products / torch.outer(norms, norms)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).mul_(2).sub_(1).float()


# ---- measurements of a fragment ------------------------------------------------------------------


class FragmentDiagnostics:
    """Measures one fragment on this rank while it is applied.

    Construct it after the wait, and before the outer step overwrites the mean.

    Args:
        flight: The fragment, waited for.
        sketch: Sketch for the cosine of decoded and exact mean; ``None`` without one.
        device: Device on which the replica sums.
    """

    def __init__(
        self, flight: InFlight, sketch: PseudogradientSketch | None, device: torch.device
    ) -> None:
        assert flight.reduced is not None
        self._flight, self._stats, self._device = flight, flight.reduced.stats, device
        self._moved = torch.zeros(3, dtype=torch.float64, device=device)
        self._compared: dict[str, Measurement] = {}
        if flight.sketch_size is not None:  # a round that compares replicas
            self._compared["muloco/cosine_pairwise_min"] = Measurement(
                gram(flight.metadata().sketches).flatten(),
                _smallest_cosine,
                over_ranks=True,
                over_fragments=min,
            )
            if self._stats.compressed and sketch is not None:
                self._compared["muloco/compression_cosine"] = Measurement(
                    _decoded_and_exact(flight, sketch),
                    _known_cosine,
                    over_ranks=True,
                    over_fragments=min,
                )

    def add(self, dot: Tensor, mean_square: Tensor, update_square: Tensor) -> None:
        """Add one shard's dot products; 0-dim each.

        Args:
            dot: Own and mean pseudogradient.
            mean_square: Mean pseudogradient with itself.
            update_square: Change of the anchor with itself.
        """
        self._moved += torch.stack([dot, mean_square, update_square]).double()

    def report(
        self, total: Callable[[Tensor], Tensor], round_index: int, *, empty_rounds: int = 0
    ) -> FragmentReport:
        """Sum over the replica and return the fragment's report.

        Args:
            total: Sum over the ranks of the replica.
            round_index: Round of the launch.
            empty_rounds: Empty rounds of the fragment in a row, with this one.

        Collectives: one call of ``total``; all ranks of the replica call this method.
        """
        flight, stats = self._flight, self._stats
        measurements = self._measured() | self._compared | dict(stats.measurements)
        measurements["muloco/empty_rounds"] = Measurement.of(empty_rounds, max)
        return FragmentReport(
            fragment=flight.fragment,
            launched_at=flight.launched_at,
            round_index=round_index,
            verdict=flight.verdict,
            weights=stats.weights,
            line_values=flight.metadata().line_values,
            measurements=summed_over_replica(measurements, total, self._device),
        )

    def _measured(self) -> dict[str, Measurement]:
        """Return what is measured of every fragment."""
        flight, stats = self._flight, self._stats

        def cosine_to_mean(dot: float, mean_square: float) -> float:
            norms = math.sqrt(mean_square) * flight.norm
            return dot / norms if norms else math.nan

        return {
            # The guard has summed this norm over the replica already.
            "muloco/pseudogradient_norm": Measurement.norm(flight.norm**2, over_ranks=False),
            "muloco/update_norm": Measurement.norm(self._moved[2]),
            "muloco/cosine_to_mean": Measurement(
                self._moved[:2], cosine_to_mean, over_ranks=True, over_fragments=fmean
            ),
            "muloco/weight_sum": Measurement.of(float(stats.weights.sum()), min),
            "muloco/excluded": Measurement.of(int((stats.weights == 0).sum()), max),
            "muloco/wire_bytes": Measurement.of(stats.wire_bytes),
            "muloco/compression_ratio": Measurement.ratio(stats.uncoded_bytes, stats.wire_bytes),
            "muloco/exposed_ms": Measurement.of(flight.exposed_ms),
        }


def _decoded_and_exact(flight: InFlight, sketch: PseudogradientSketch) -> Tensor:
    """Return dot products of the sketches of decoded and exact mean, ``[3]``, fp64.

    They are decoded * exact, decoded * decoded, exact * exact; zeros on a rank without shards.
    """
    assert flight.reduced is not None
    decoded = sketch(flight.reduced.mean).double()
    exact = torch.mv(flight.metadata().sketches.T, flight.reduced.stats.weights)
    exact = exact.to(decoded.device).double()
    return torch.stack([decoded.dot(exact), decoded.dot(decoded), exact.dot(exact)])


def _known_cosine(dot: float, square: float, other_square: float) -> float | None:
    """Return a cosine from dot products; ``None`` where it is undefined."""
    norms = math.sqrt(square * other_square)
    cosine = dot / norms if norms else math.nan
    return None if math.isnan(cosine) else cosine


def _smallest_cosine(*products: float) -> float | None:
    """Return the smallest cosine of two replicas from the K * K dot products of their sketches.

    ``None`` if no two could be compared.
    """
    size = math.isqrt(len(products))
    rows, columns = torch.triu_indices(size, size, offset=1).unbind()
    pairs = cosines(torch.tensor(products, dtype=torch.float64).view(size, size))[rows, columns]
    known = pairs[~pairs.isnan()]
    return float(known.min()) if len(known) else None
