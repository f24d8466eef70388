"""Measures of one round, matrix by matrix; the rows of every table and figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from tools.pseudogradient.measures import (
    TOP_SHARE,
    cosine,
    decompose,
    interference_gap,
    mean_of,
    pairwise_cosines,
    spectrum,
)

__all__ = ["LayerMeasures", "measure_layers", "muon_scale"]


@dataclass(frozen=True)
class LayerMeasures:
    """Measures of one matrix in one round; ``None`` where they do not apply.

    Attributes:
        matrix: ``parameter::part``.
        cosine: Of the mean pseudogradient to the one of K = 1; NaN without a reference.
        pairwise_mean: Mean cosine of two replicas; ``None`` for one replica.
        pairwise_min: Smallest cosine of two replicas.
        top_gap: `interference_gap`, in percent.
        top_replica: Largest singular value of a replica, mean over replicas.
        top_mean: Largest singular value of the mean.
        nuclear_replica: Nuclear norm of a replica, mean over replicas.
        nuclear_mean: Nuclear norm of the mean.
        alignment: Mean of rho over replicas and steps; ``None`` without steps, like all below.
        step_norm_spread: Standard deviation of step norms over their mean.
        from_steps: Nuclear norm of the mean, from the decomposition.
        rates_ratio: ``(r / K) sum rho alpha`` over the nuclear norm; ``None`` without rates.
    """

    matrix: str
    cosine: float
    pairwise_mean: float | None
    pairwise_min: float | None
    top_gap: float
    top_replica: float
    top_mean: float
    nuclear_replica: float
    nuclear_mean: float
    alignment: float | None = None
    step_norm_spread: float | None = None
    from_steps: float | None = None
    rates_ratio: float | None = None


def measure_layers(
    replicas: Sequence[Mapping[str, Tensor]],
    reference: Mapping[str, Tensor] | None,
    steps: Sequence[Sequence[Mapping[str, Tensor]]] = (),
    rates: Sequence[float] = (),
) -> list[LayerMeasures]:
    """Return the measures of every matrix.

    Args:
        replicas: Of each replica, its pseudogradient by matrix.
        reference: The pseudogradient of K = 1 by matrix; ``None`` without one.
        steps: Of each replica and inner step, what the step subtracted by matrix; may be empty.
        rates: Learning rate of each inner step of Muon, without the scale of the matrix.
    """
    found = []
    for name in replicas[0]:
        own = [replica[name] for replica in replicas]
        mean = mean_of(own)
        spectra, values = [spectrum(each) for each in own], spectrum(mean)
        pairs = pairwise_cosines(own)
        parts = _from_steps(name, steps, rates)
        found.append(
            LayerMeasures(
                matrix=name,
                cosine=math.nan if reference is None else cosine(mean, reference[name]),
                pairwise_mean=fmean(pairs) if pairs else None,
                pairwise_min=min(pairs) if pairs else None,
                top_gap=interference_gap(own, TOP_SHARE),
                top_replica=fmean(float(each[0]) for each in spectra),
                top_mean=float(values[0]),
                nuclear_replica=fmean(float(each.sum()) for each in spectra),
                nuclear_mean=float(values.sum()),
                **parts,
            )
        )
    return found


def _from_steps(
    name: str, steps: Sequence[Sequence[Mapping[str, Tensor]]], rates: Sequence[float]
) -> dict[str, float | None]:
    if not steps:
        return {}
    parts = decompose([[step[name] for step in replica] for replica in steps])
    ratio = None
    if rates:
        scale = muon_scale(steps[0][0][name])
        ratio = parts.from_rates([rate * scale for rate in rates]) / parts.nuclear
    return {
        "alignment": float(parts.alignment.mean()),
        "step_norm_spread": parts.norm_spread,
        "from_steps": parts.from_steps,
        "rates_ratio": ratio,
    }


def muon_scale(matrix: Tensor) -> float:
    """Return sqrt(rows / columns), the factor of Muon's default ``unit_rms_norm`` scale."""
    rows, columns = matrix.shape
    return math.sqrt(rows / columns)
