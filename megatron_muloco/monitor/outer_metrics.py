"""The metrics of one outer step, from the synchronizer's report."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_muloco.outer.report import CodeReport, FragmentReport, OuterReport

__all__ = ["outer_metrics"]


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
        "muloco/quarantined": max(int((part.weights == 0).sum()) for part in applied),
        "muloco/wire_bytes": sent,
        "muloco/exposed_ms": sum(part.exposed_ms for part in applied),
        "muloco/round": float(report.round_index),
    }
    if known:
        metrics["muloco/cosine_pairwise_min"] = min(known)
    if sent:
        metrics["muloco/compression_ratio"] = sum(part.uncoded_bytes for part in applied) / sent
    return metrics | _code_metrics([part.code for part in applied if part.code is not None])


def _code_metrics(codes: Sequence[CodeReport]) -> dict[str, float]:
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
