"""The sums over a fragment's shards that its report needs, added over the replica in one go."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_muloco.outer.in_flight import InFlight
from megatron_muloco.outer.reducer import CodeStats
from megatron_muloco.outer.report import CodeReport, FragmentReport
from megatron_muloco.outer.sketch import PseudogradientSketch, cosines, gram

__all__ = ["Tally"]


class Tally:
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
        self._code = _code_sums(flight, sketch, device)
        self._pairs = torch.zeros(0, dtype=torch.float64, device=device)
        if flight.sketch_size is not None:
            self._pairs = gram(flight.shown().sketches).flatten().to(device)

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
            riders=flight.shown().riders,
            pseudogradient_norm=flight.norm,
            update_norm=update_square.sqrt(),
            cosine_to_mean=dot / (mean_square.sqrt() * flight.norm),
            wire_bytes=stats.wire_bytes,
            uncoded_bytes=stats.uncoded_bytes,
            exposed_ms=flight.exposed_ms,
            pairwise_cosines=(
                None if flight.sketch_size is None else cosines(pairs.view(len(stats.weights), -1))
            ),
            code=None if stats.code is None else _code_report(stats.code, code),
        )


def _code_sums(
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
            exact = torch.mv(flight.shown().sketches.T, stats.weights).to(device)
            decoded = sketch(flight.reduced.mean)
            products = [decoded.dot(exact), decoded.dot(decoded), exact.dot(exact)]
            sums[2:] = torch.stack(products).double()
    return sums


def _code_report(code: CodeStats, sums: Tensor) -> CodeReport:
    exact, lost, dot, decoded_square, exact_square = sums.unbind()
    return CodeReport(
        encoded_norm=exact.sqrt(),
        lost_norm=lost.sqrt(),
        cosine=dot / (decoded_square * exact_square).sqrt(),
        encode_ms=code.encode_ms,
        decode_ms=code.decode_ms,
        error_feedback=code.error_feedback,
    )
