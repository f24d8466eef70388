"""The metrics of one outer step, from the synchronizer's report."""

import math

import torch

from megatron_muloco.outer.report import OuterReport

__all__ = ["outer_metrics"]


def outer_metrics(report: OuterReport) -> dict[str, float]:
    """Return tag -> value for the fragments applied after one inner step; empty when none were.

    Norms of several fragments are those of their union. Metrics that need what this report does not
    hold (pairwise cosines, compression) are the caller's to add.
    """
    applied = report.applied
    if not applied:
        return {}
    # One transfer for all tensors of the report.
    device_values = torch.stack(
        [value.double() for part in applied for value in (part.update_norm, part.cosine_to_mean)]
    ).tolist()
    updates, cosines = device_values[0::2], device_values[1::2]
    weight_sums = [part.weight_sum for part in applied]
    return {
        "muloco/pseudogradient_norm": math.hypot(*(part.pseudogradient_norm for part in applied)),
        "muloco/update_norm": math.hypot(*updates),
        "muloco/cosine_to_mean": sum(cosines) / len(cosines),
        "muloco/weight_sum": min(weight_sums),
        "muloco/quarantined": max(int((part.weights == 0).sum()) for part in applied),
        "muloco/wire_bytes": sum(part.wire_bytes for part in applied),
        "muloco/exposed_ms": sum(part.exposed_ms for part in applied),
        "muloco/round": report.round_index,
    }
