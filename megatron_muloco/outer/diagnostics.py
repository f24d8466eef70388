"""What an outer step tells the training loop; tensors stay on their device until logged."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.in_flight import InFlight
from megatron_muloco.outer.reducer import CompressionStats

__all__ = [
    "CompressionReport",
    "FragmentDiagnostics",
    "FragmentReport",
    "OuterReport",
    "PseudogradientSketch",
    "cosines",
    "gram",
    "outer_metrics",
]


@dataclass(frozen=True, slots=True)
class CompressionReport:
    """What the code did to one fragment, over the whole replica; times are this rank's.

    Attributes:
        encoded_norm: Norm of what this replica encoded, its residual included; 0-dim.
        lost_norm: Norm of what its encoding lost, which error feedback keeps; 0-dim.
        cosine: Estimated cosine of the decoded mean and the mean of the exact pseudogradients,
            0-dim; NaN in rounds that do not compare replicas.
        encode_ms: Host time of encoding.
        decode_ms: Host time of decoding.
        error_feedback: Whether what was lost is kept.
    """

    encoded_norm: Tensor
    lost_norm: Tensor
    cosine: Tensor
    encode_ms: float
    decode_ms: float
    error_feedback: bool


@dataclass(frozen=True, slots=True)
class FragmentReport:
    """One applied fragment. Norms and cosine are over the whole replica, duplicates counted once.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        round_index: Round that this step belongs to.
        verdict: The guard's word on this replica.
        weights: w of every replica, ``[K]``.
        line_values: The caller's line_values of every replica, ``[K, n]``.
        pseudogradient_norm: Norm of this replica's own pseudogradient; NaN if it was not finite.
        update_norm: Norm of what the anchor moved by, 0-dim.
        cosine_to_mean: Cosine of own and mean pseudogradient, 0-dim; NaN where undefined.
        wire_bytes: Bytes that this rank sent.
        uncoded_bytes: Bytes that an fp32 all-reduce would have sent, line_values not counted.
        exposed_ms: Host time spent launching and waiting.
        pairwise_cosines: Estimated cosines of the replicas' pseudogradients, ``[K, K]``, NaN beside
            one that is not finite or zero; ``None`` in rounds that do not compare replicas.
        code: What a lossy code did; ``None`` without one, and for a fragment that was in flight
            when the run was saved.
    """

    fragment: int
    launched_at: int
    round_index: int
    verdict: Verdict
    weights: Tensor
    line_values: Tensor
    pseudogradient_norm: float
    update_norm: Tensor
    cosine_to_mean: Tensor
    wire_bytes: int
    exposed_ms: float
    pairwise_cosines: Tensor | None = None
    uncoded_bytes: int = 0
    code: CompressionReport | None = None

    @property
    def weight_sum(self) -> float:
        """Sum of the weights; 0 means that no replica could be used and the anchor did not move."""
        return float(self.weights.sum())


@dataclass(frozen=True, slots=True)
class OuterReport:
    """All that happened after one inner step, or in the flush.

    Attributes:
        step: Inner step.
        round_index: Round that the step belongs to.
        launched: Fragments launched.
        applied: Fragments applied.
        restarted_from_anchor: This replica was not finite and now holds the anchor in every
            fragment. The caller zeroes the inner optimizer's state on all ranks of the replica.
    """

    step: int
    round_index: int
    launched: tuple[int, ...]
    applied: tuple[FragmentReport, ...]
    restarted_from_anchor: bool

    @property
    def alarm(self) -> bool:
        """Whether some fragment found no usable replica at all."""
        return any(fragment.weight_sum == 0.0 for fragment in self.applied)


# ------------------------------------------------------------------------------------------
# How alike replicas' pseudogradients are, from a few numbers of each.
#
# The cosine of two replicas needs a dot product of vectors that are never in one place. Each rank
# sends a *sketch* of its share instead: every value, with a random sign, is added to one of
# ``width`` places. The signs are the same on all replicas, so equal values meet equal values, and
# all other products cancel on average::
#
#     values   x0  x1  x2  x3 | x4  x5  x6  x7 | x8  ...       width 4, one row after the other
#     row 0   +x0 -x1 -x2 +x3                                  sign = row sign * column sign
#     row 1   -x6 +x7 -x4 -x5                                  turned by a random number of places
#     sketch   the sum of the rows
#
# Dot products of sketches are dot products of the vectors, without bias; summed over the ranks of a
# replica and divided by the sketches' own norms they are cosines. For vectors without structure the
# standard error of a cosine c is ``(1 - c**2) / sqrt(values of the whole replica)``, that of a
# correlation coefficient.
#
# Source: Charikar, Chen and Farach-Colton, "Finding frequent items in data streams" (2002), with
# rows turned as wholes, which is a sum in a fixed order on every device.


_CHUNK_ELEMENTS = 2**22  # chosen: temporary memory of 16 MiB of values and 32 MiB of places


@dataclass(frozen=True, slots=True)
class PseudogradientSketch:
    """Sketches a rank's shards; the same function on the same position of every replica.

    Attributes:
        width: Numbers in a sketch; at least 1.
        interval: Rounds between two sketches.
    """

    width: int
    interval: int = 1

    def is_due(self, round_index: int) -> bool:
        """Whether the launches of a round carry sketches."""
        return round_index % self.interval == 0

    def __call__(self, shards: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of flat tensors, ``[width]``, fp32; ``[0]`` where there are none.

        It depends on names, sizes and values alone, not on the order of the mapping or on the rank.
        """
        parts = [self._sketch(name, shards[name]) for name in sorted(shards)]
        return torch.stack(parts).sum(0) if parts else torch.zeros(0)

    def _sketch(self, name: str, values: Tensor) -> Tensor:
        width, device = self.width, values.device
        rows = -(-values.numel() // width)
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
    """Return the dot products of every two rows, ``[K, K]``, fp64."""
    exact = sketches.double()
    return exact @ exact.T


def cosines(products: Tensor) -> Tensor:
    """Return the cosines of vectors from their dot products, ``[K, K]``; NaN beside a zero."""
    norms = products.diagonal().sqrt()
    return products / torch.outer(norms, norms)


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).mul_(2).sub_(1).float()


# ------------------------------------------------------------------------------------------
# The sums over a fragment's shards that its report needs, added over the replica in one go.


class FragmentDiagnostics:
    """What one rank saw of one fragment: scalars, fp64, and the sketches' dot products.

    Made after the fragment was waited for, and before its mean is overwritten.

    Args:
        flight: The fragment, waited for.
        sketch: Compares what was decoded with what was meant; ``None`` does not.
        device: Where the replica adds.
    """

    def __init__(
        self, flight: InFlight, sketch: PseudogradientSketch | None, device: torch.device
    ) -> None:
        self._flight = flight
        self._moved = torch.zeros(3, dtype=torch.float64, device=device)
        self._code = _compression_sums(flight, sketch, device)
        self._pairs = torch.zeros(0, dtype=torch.float64, device=device)
        if flight.sketch_size is not None:
            self._pairs = gram(flight.metadata().sketches).flatten().to(device)

    def add(self, dot: Tensor, mean_square: Tensor, update_square: Tensor) -> None:
        """Add one shard: own * mean pseudogradient, mean * mean, update * update; 0-dim."""
        self._moved += torch.stack([dot, mean_square, update_square]).double()

    def report(self, total: Callable[[Tensor], Tensor], round_index: int) -> FragmentReport:
        """Add over the replica by ``total``; return what it comes to, of a launch of this round."""
        parts = (self._moved, self._code, self._pairs)
        moved, code, pairs = total(torch.cat(parts)).split([part.numel() for part in parts])
        dot, mean_square, update_square = moved.unbind()
        flight = self._flight
        assert flight.reduced is not None
        stats = flight.reduced.stats
        return FragmentReport(
            fragment=flight.fragment,
            launched_at=flight.launched_at,
            round_index=round_index,
            verdict=flight.verdict,
            weights=stats.weights,
            line_values=flight.metadata().line_values,
            pseudogradient_norm=flight.norm,
            update_norm=update_square.sqrt(),
            cosine_to_mean=dot / (mean_square.sqrt() * flight.norm),
            wire_bytes=stats.wire_bytes,
            uncoded_bytes=stats.uncoded_bytes,
            exposed_ms=flight.exposed_ms,
            pairwise_cosines=(
                None if flight.sketch_size is None else cosines(pairs.view(len(stats.weights), -1))
            ),
            code=None if stats.code is None else _compression_report(stats.code, code),
        )


def _compression_sums(
    flight: InFlight, sketch: PseudogradientSketch | None, device: torch.device
) -> Tensor:
    """Return this rank's sums about the code, ``[5]``; zeros where there is nothing to say.

    Squared norms of what was encoded and of what the code lost, then the products of the sketches
    of decoded and exact mean: decoded * exact, decoded * decoded, exact * exact.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    assert flight.reduced is not None
    stats = flight.reduced.stats
    if stats.code is not None:
        sums[0], sums[1] = stats.code.exact_square, stats.code.lost_square
        if sketch is not None and flight.sketch_size:
            exact = torch.mv(flight.metadata().sketches.T, stats.weights).to(device)
            decoded = sketch(flight.reduced.mean)
            products = [decoded.dot(exact), decoded.dot(decoded), exact.dot(exact)]
            sums[2:] = torch.stack(products).double()
    return sums


def _compression_report(code: CompressionStats, sums: Tensor) -> CompressionReport:
    exact, lost, dot, decoded_square, exact_square = sums.unbind()
    return CompressionReport(
        encoded_norm=exact.sqrt(),
        lost_norm=lost.sqrt(),
        cosine=dot / (decoded_square * exact_square).sqrt(),
        encode_ms=code.encode_ms,
        decode_ms=code.decode_ms,
        error_feedback=code.error_feedback,
    )


# ------------------------------------------------------------------------------------------
# The metrics of one outer step, from the synchronizer's report.


def outer_metrics(report: OuterReport) -> dict[str, float]:
    """Return tag -> value for the fragments applied after one inner step; empty when none were.

    Norms of several fragments are those of their union. The smallest cosine is left out where no
    two replicas could be compared.
    """
    applied = report.applied
    if not applied:
        return {}
    # One transfer for all tensors of the report.
    per_fragment = torch.stack(
        [
            torch.stack([part.update_norm, part.cosine_to_mean, _smallest_cosine(part)]).double()
            for part in applied
        ]
    ).tolist()
    updates, cosines, smallest = zip(*per_fragment, strict=True)
    known = [cosine for cosine in smallest if not math.isnan(cosine)]
    weight_sums = [part.weight_sum for part in applied]
    sent = sum(part.wire_bytes for part in applied)
    metrics = {
        "muloco/pseudogradient_norm": math.hypot(*(part.pseudogradient_norm for part in applied)),
        "muloco/update_norm": math.hypot(*updates),
        "muloco/cosine_to_mean": sum(cosines) / len(cosines),
        "muloco/weight_sum": min(weight_sums),
        "muloco/excluded": max(int((part.weights == 0).sum()) for part in applied),
        "muloco/wire_bytes": sent,
        "muloco/exposed_ms": sum(part.exposed_ms for part in applied),
        "muloco/round": float(report.round_index),
    }
    if known:
        metrics["muloco/cosine_pairwise_min"] = min(known)
    if sent:
        metrics["muloco/compression_ratio"] = sum(part.uncoded_bytes for part in applied) / sent
    return metrics | _compression_metrics([part.code for part in applied if part.code is not None])


def _compression_metrics(codes: Sequence[CompressionReport]) -> dict[str, float]:
    """Return what codes did to the fragments of one step; empty without one."""
    if not codes:
        return {}
    numbers = torch.stack(
        [torch.stack([c.encoded_norm, c.lost_norm, c.cosine]).double() for c in codes]
    ).tolist()
    encoded, lost, cosines = zip(*numbers, strict=True)
    whole = math.hypot(*encoded)
    known = [cosine for cosine in cosines if not math.isnan(cosine)]
    metrics = {
        "muloco/compression_error": math.hypot(*lost) / whole if whole else math.nan,
        "muloco/encode_ms": sum(code.encode_ms for code in codes),
        "muloco/decode_ms": sum(code.decode_ms for code in codes),
    }
    if codes[0].error_feedback:
        metrics["muloco/residual_norm"] = math.hypot(*lost)
    if known:
        metrics["muloco/compression_cosine"] = min(known)
    return metrics


def _smallest_cosine(part: FragmentReport) -> Tensor:
    """Return the smallest cosine of two replicas, 0-dim; NaN where there is none."""
    nothing = torch.full_like(part.update_norm, math.nan)
    if part.pairwise_cosines is None:
        return nothing
    size = len(part.pairwise_cosines)
    rows, columns = torch.triu_indices(size, size, offset=1, device=nothing.device).unbind()
    pairs = part.pairwise_cosines[rows, columns]
    smallest = pairs.nan_to_num(math.inf).min()
    return torch.where(smallest.isinf(), nothing, smallest)
