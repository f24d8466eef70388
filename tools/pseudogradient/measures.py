"""Mathematics of the pseudogradient analysis: functions of matrices, in fp64.

Letters: K replicas, H inner steps of a round, D_k the pseudogradient (anchor - local) of replica k
for one matrix, D the mean of the D_k, r the rank of D, sigma_i singular values in descending order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "TOP_SHARE",
    "Decomposition",
    "OuterRound",
    "autocorrelation",
    "cosine",
    "decompose",
    "interference_gap",
    "mean_of",
    "outer_rounds",
    "pairwise_cosines",
    "spectrum",
]

TOP_SHARE = 0.05
"""Share of the singular values that `interference_gap` takes, as in the paper's "top 5 %"."""


def cosine(left: Tensor, right: Tensor) -> float:
    """Return the cosine of two tensors of the same shape; NaN if one of them is zero."""
    a, b = left.double().flatten(), right.double().flatten()
    norms = float(a.norm() * b.norm())
    return float(a.dot(b)) / norms if norms else math.nan


def mean_of(replicas: Sequence[Tensor]) -> Tensor:
    """Return D, the mean of the replicas' pseudogradients, fp64."""
    return torch.stack([each.double() for each in replicas]).mean(0)


def pairwise_cosines(replicas: Sequence[Tensor]) -> list[float]:
    """Return the cosines of all K (K - 1) / 2 pairs of replicas; empty for one replica."""
    return [
        cosine(left, right)
        for index, left in enumerate(replicas)
        for right in replicas[index + 1 :]
    ]


def spectrum(matrix: Tensor) -> Tensor:
    """Return the singular values in descending order, fp64."""
    return torch.linalg.svdvals(matrix.double())


def interference_gap(replicas: Sequence[Tensor], share: float = TOP_SHARE) -> float:
    """Return how much of their largest singular values the replicas lose by averaging, in percent.

    With m = ceil(share * min(rows, columns)) and ``top(X)`` the sum of the m largest singular
    values of X::

        gap = 100 * (1 - top(D) / mean_k top(D_k))

    ``top`` is a norm (Ky Fan's), so the gap is in [0, 100]: 0 for equal replicas, and
    100 * (1 - 1/K) for replicas of rank one with orthogonal row and column spaces.

    Source: own definition. The MuLoCo paper's figure has a "top-5% interference gap", whose formula
    is not in its public sources, so values are not comparable with its axis.
    """
    count = math.ceil(share * min(replicas[0].shape))
    own = [float(spectrum(each)[:count].sum()) for each in replicas]
    expected = sum(own) / len(own)
    if not expected:
        return math.nan
    return 100 * (1 - float(spectrum(mean_of(replicas))[:count].sum()) / expected)


# ---- the nuclear norm of the mean ----------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """The nuclear norm of D as a sum over replicas and inner steps.

    Let s_kt be what inner step t of replica k subtracted from the matrix, so that
    ``D_k = sum_t s_kt``, and ``Q = U V^T`` the orthonormal factor of ``D = U S V^T``. Then
    ``|Q|_F = sqrt(r)``, and with ``rho_kt = <s_kt, Q> / (|s_kt|_F sqrt(r))``::

        |D|_* = <D, Q> = (sqrt(r) / K) * sum_kt rho_kt |s_kt|_F

    AdamW's step is ``s = alpha psi`` with a varying ``|psi|_F``. A Muon step with psi orthonormal
    and of rank r has ``|psi|_F = sqrt(r)``, hence ``(r / K) * sum_kt rho_kt alpha_kt``.

    Attributes:
        nuclear: ``|D|_*``, from the singular values.
        rank: r, the singular values above the rounding of fp32 inputs.
        alignment: rho, ``[K, H]``.
        norms: ``|s_kt|_F``, ``[K, H]``.

    Source: MuLoCo (arXiv:2505.23725), Proposition 4.2, as stated in the authors' summary.
    """

    nuclear: float
    rank: int
    alignment: Tensor
    norms: Tensor

    @property
    def from_steps(self) -> float:
        """The nuclear norm from alignments and step norms: equal to ``nuclear`` up to rounding."""
        scale = math.sqrt(self.rank) / len(self.alignment)
        return float((self.alignment * self.norms).sum()) * scale

    def from_rates(self, rates: Sequence[float]) -> float:
        """Return ``(r / K) * sum_kt rho_kt alpha_t``, which takes every step for orthonormal.

        The ratio to ``nuclear`` says how well that describes the run: Newton-Schulz gives singular
        values near 1, not 1, weight decay is part of a step, and a step may have another rank.

        Args:
            rates: alpha of each inner step, with the matrix's scale, ``[H]``.
        """
        alphas = torch.tensor(rates, dtype=torch.float64)
        return float((self.alignment * alphas).sum()) * self.rank / len(self.alignment)

    @property
    def norm_spread(self) -> float:
        """Standard deviation of the step norms divided by their mean."""
        return float(self.norms.std(correction=0) / self.norms.mean())


def decompose(steps: Sequence[Sequence[Tensor]]) -> Decomposition:
    """Return the decomposition of ``|mean_k sum_t steps[k][t]|_*``.

    Args:
        steps: What each inner step subtracted from a matrix: ``[K][H]`` matrices of one shape.
    """
    stacked = torch.stack([torch.stack([s.double() for s in replica]) for replica in steps])
    left, values, right = torch.linalg.svd(stacked.sum(1).mean(0), full_matrices=False)
    # As numpy's matrix_rank, with the epsilon of fp32: the inputs were rounded to it.
    tolerance = float(values[0]) * max(stacked.shape[-2:]) * torch.finfo(torch.float32).eps
    rank = int((values > tolerance).sum())
    orthonormal = left[:, :rank] @ right[:rank]
    norms = torch.linalg.matrix_norm(stacked)
    products = (stacked * orthonormal).sum((-2, -1))
    alignment = products / (norms * math.sqrt(rank)).clamp_min(torch.finfo(torch.float64).tiny)
    return Decomposition(float(values[:rank].sum()), rank, alignment, norms)


# ---- the outer optimizer over rounds -------------------------------------------------------------


@dataclass(frozen=True)
class OuterRound:
    """What outer Nesterov does with the mean pseudogradient D of a round.

    The anchor moves by ``-w``, ``w = eta (D + mu u)``, with momentum u.

    Attributes:
        round_index: The round.
        aligned_gain: g = <w, D> / <D, D>. By how many D the anchor moves along -D: 1 for plain
            averaging; eta / (1 - mu) after many equal rounds.
        transverse_ratio: |w - g D| / |g D|. The part of the movement across D, relative to the part
            along it: 0 if all earlier D are parallel to this one.
    """

    round_index: int
    aligned_gain: float
    transverse_ratio: float


def outer_rounds(
    means: Sequence[Tensor], lr: Sequence[float], momentum: Sequence[float], first_round: int = 1
) -> tuple[list[OuterRound], list[Tensor]]:
    """Return the diagnostics of consecutive rounds, and the momentum u after each of them.

    ``u = mu u + D``; u is zero before the first of the rounds, as at the start of a run.

    Args:
        means: D of each round, all parameters as one flat vector.
        lr: eta of each round.
        momentum: mu of each round.
        first_round: Number of the first round.
    """
    u = torch.zeros_like(means[0], dtype=torch.float64)
    rounds, momenta = [], []
    for index, (mean, eta, mu) in enumerate(zip(means, lr, momentum, strict=True)):
        exact = mean.double()
        u = mu * u + exact
        moved = eta * (exact + mu * u)
        square = float(exact.dot(exact))
        gain = float(moved.dot(exact)) / square if square else math.nan
        along = gain * exact
        transverse = float((moved - along).norm() / along.norm()) if square else math.nan
        rounds.append(OuterRound(first_round + index, gain, transverse))
        momenta.append(u)
    return rounds, momenta


def autocorrelation(vectors: Sequence[Tensor], lag: int) -> float:
    """Return the mean cosine of vectors ``lag`` rounds apart; NaN if there are no such pairs."""
    pairs = zip(vectors, vectors[lag:], strict=False)
    found = [cosine(earlier, later) for earlier, later in pairs]
    return sum(found) / len(found) if found else math.nan
