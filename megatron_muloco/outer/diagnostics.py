"""Reports, diagnostics and metrics of outer steps.

`FragmentDiagnostics` collects sums while a fragment is applied, and adds them over the replica in
one collective; the result is a `FragmentReport`. An `OuterReport` has those of one inner step, and
`outer_metrics` turns it into TensorBoard tags. Tensors stay on their device until then.

`PseudogradientSketch` is a count sketch: it estimates cosines between pseudogradients that are
never in one place, from a few numbers of each replica.
"""

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
    """Errors and times of the compression of one fragment.

    Attributes:
        encoded_norm: Norm of the encoded values (pseudogradient plus residual) of the whole
            replica; 0-dim.
        lost_norm: Norm of the replica's encoding error, which error feedback keeps; 0-dim.
        cosine: Estimated cosine of the decoded mean and the mean of the exact pseudogradients,
            0-dim; NaN in rounds that do not compare replicas.
        encode_ms: Host time of encoding on this rank.
        decode_ms: Host time of decoding on this rank.
        error_feedback: Whether the error is kept for the next round.
    """

    encoded_norm: Tensor
    lost_norm: Tensor
    cosine: Tensor
    encode_ms: float
    decode_ms: float
    error_feedback: bool


@dataclass(frozen=True, slots=True)
class FragmentReport:
    """One applied fragment.

    Norms and cosines are those of the whole replica; replicated parameters count once.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        round_index: Round of the launch.
        verdict: The guard's decision for this replica.
        weights: w of every replica, ``[K]``.
        line_values: Line values of every replica, ``[K, n]``.
        pseudogradient_norm: Norm of this replica's own pseudogradient; NaN if it was not finite.
        update_norm: Norm of the anchor's change, 0-dim.
        cosine_to_mean: Cosine of own and mean pseudogradient, 0-dim; NaN where undefined.
        wire_bytes: Bytes sent by this rank.
        uncoded_bytes: Bytes that an fp32 all-reduce of the tensors alone would have sent.
        exposed_ms: Host time of launch and wait.
        pairwise_cosines: Estimated cosines of the replicas' pseudogradients, ``[K, K]``, NaN for
            pseudogradients that are zero or not finite; ``None`` in rounds that do not compare
            replicas.
        code: Errors and times of the compression; ``None`` without one, and for a fragment that
            was in flight when the run was saved.
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
        """Sum of the weights; 0 if no replica was usable and the anchor did not move."""
        return float(self.weights.sum())


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
    """

    step: int
    round_index: int
    launched: tuple[int, ...]
    applied: tuple[FragmentReport, ...]
    restarted_from_anchor: bool

    @property
    def alarm(self) -> bool:
        """Whether some applied fragment had no usable replica."""
        return any(fragment.weight_sum == 0.0 for fragment in self.applied)


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


# ---- sums over a fragment ------------------------------------------------------------------------


class FragmentDiagnostics:
    """Sums over this rank's shards of one fragment that its report needs, fp64.

    Construct it after the wait, and before the outer step overwrites the mean.

    Args:
        flight: The fragment, waited for.
        sketch: Sketch for the cosine of decoded and exact mean; ``None`` without one.
        device: Device on which the replica sums.
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
        """Add one shard's dot products; 0-dim each.

        Args:
            dot: Own and mean pseudogradient.
            mean_square: Mean pseudogradient with itself.
            update_square: Change of the anchor with itself.
        """
        self._moved += torch.stack([dot, mean_square, update_square]).double()

    def report(self, total: Callable[[Tensor], Tensor], round_index: int) -> FragmentReport:
        """Sum over the replica and return the fragment's report.

        Args:
            total: Sum over the ranks of the replica.
            round_index: Round of the launch.

        Collectives: one call of ``total``; all ranks of the replica call this method.
        """
        # One collective for all sums: a replica adds at most 8 + K * K numbers per fragment.
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
    """Return this rank's sums about the compression, ``[5]``, fp64; zeros without one.

    The squared norms of encoded values and of encoding errors, then dot products of the sketches of
    the decoded and the exact mean: decoded * exact, decoded * decoded, exact * exact.
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


# ---- metrics -------------------------------------------------------------------------------------


def outer_metrics(report: OuterReport) -> dict[str, float]:
    """Return the metrics of the fragments applied after one inner step, by tag; empty if none.

    The norm of several fragments is that of their union. The smallest cosine is left out if no two
    replicas could be compared.
    """
    applied = report.applied
    if not applied:
        return {}
    # One transfer to the host for all tensors of the report.
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
    """Return the compression metrics of the fragments of one step; empty without compression."""
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
    """Return the smallest cosine of two replicas, 0-dim; NaN if no two could be compared."""
    nothing = torch.full_like(part.update_norm, math.nan)
    if part.pairwise_cosines is None:
        return nothing
    size = len(part.pairwise_cosines)
    rows, columns = torch.triu_indices(size, size, offset=1, device=nothing.device).unbind()
    pairs = part.pairwise_cosines[rows, columns]
    smallest = pairs.nan_to_num(math.inf).min()
    return torch.where(smallest.isinf(), nothing, smallest)
