"""Whether a replica takes part in an outer step: its weight, 0 or 1.

One replica with a NaN would poison all K after one average. The guard looks at two numbers,
summed over the whole replica, so that all its ranks come to the same verdict, and the verdict
travels with the data as the replica's weight.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import median
from typing import Any

import torch
from torch import Tensor

__all__ = ["Guard", "Progress", "Verdict", "local_statistics"]


class Verdict(Enum):
    """What the guard found for one replica and one launch."""

    GOOD = "good"
    NON_FINITE = "non-finite"  # the replica starts again from the anchor
    OUTLIER = "norm outside the band"  # left out of this mean, otherwise untouched

    @property
    def weight(self) -> float:
        """Weight of the replica in the mean."""
        return 1.0 if self is Verdict.GOOD else 0.0


def local_statistics(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return ``[non-finite tensors, squared norm of the finite ones]``, fp64, to be summed.

    A norm beyond the range of fp32 counts as non-finite: no pseudogradient of a model that still
    trains is anywhere near it.
    """
    if not tensors:
        return torch.zeros(2, dtype=torch.float64, device=device)
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]).double()
    bad = ~torch.isfinite(norms)
    return torch.stack([bad.sum().double(), norms.masked_fill(bad, 0.0).square().sum()])


@dataclass
class Guard:
    """Judges pseudogradients by their norm; the same inputs give the same verdict on every rank.

    The band is ``[m / max_norm_ratio, m * max_norm_ratio]`` around the median ``m`` of the
    norms in the fragment's previous round. It needs a majority to mean anything, hence
    ``min_replicas``. All finite norms enter the median, also those of replicas left out, so that
    the band follows when all norms move together.

    Attributes:
        num_replicas: K.
        max_norm_ratio: Half-width of the band as a ratio. 10 is chosen: during warm-up the norms of
            consecutive full rounds differ by a factor of at most 3.
        min_replicas: Replicas from which on the band is active.
    """

    num_replicas: int
    max_norm_ratio: float = 10.0
    min_replicas: int = 4
    _medians: dict[int, float] = field(default_factory=dict, init=False)

    def judge_replica(
        self,
        fragment: int,
        deltas: Mapping[str, Tensor],
        total: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        use_band: bool = True,
    ) -> tuple[Verdict, float]:
        """Return the verdict on a replica and the norm of its pseudogradient, NaN if not finite.

        Args:
            fragment: Index of the fragment.
            deltas: This rank's share of the pseudogradient, without duplicates.
            total: Sums over the ranks of the replica, all of which call this.
            device: Where ``total`` takes its input; a rank may have no share at all.
            use_band: The band compares intervals of one length; a flush may hold a single step.
        """
        bad, square = total(local_statistics(list(deltas.values()), device)).tolist()
        norm = math.nan if bad else math.sqrt(square)
        if use_band:
            return self.judge(fragment, non_finite=bad > 0, norm=norm), norm
        return (Verdict.NON_FINITE if bad else Verdict.GOOD), norm

    def judge(self, fragment: int, *, non_finite: bool, norm: float) -> Verdict:
        """Return the verdict on this replica's pseudogradient of ``fragment``."""
        if non_finite:
            return Verdict.NON_FINITE
        middle = self._medians.get(fragment)
        if middle is None or self.num_replicas < self.min_replicas:
            return Verdict.GOOD
        inside = middle / self.max_norm_ratio <= norm <= middle * self.max_norm_ratio
        return Verdict.GOOD if inside else Verdict.OUTLIER

    def observe(self, fragment: int, norms: list[float]) -> None:
        """Remember the replicas' norms of a full interval; non-finite ones are NaN here."""
        finite = [norm for norm in norms if norm == norm]
        if finite and median(finite) > 0.0:
            self._medians[fragment] = median(finite)

    def state_dict(self) -> dict[str, Any]:
        """Return the medians as plain numbers, keyed by the fragment's index as text (JSON)."""
        return {str(fragment): middle for fragment, middle in self._medians.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._medians = {int(fragment): float(middle) for fragment, middle in state.items()}


# ------------------------------------------------------------------------------------------
# How much of an interval a replica trained: its weight where replicas are weighed by tokens.


@dataclass
class Progress:
    """Inner steps of a fragment since its last launch.

    Attributes:
        steps: All of them.
        trained: Those that changed parameters, each as the share of its tokens that counted.
    """

    steps: int = 0
    trained: float = 0.0

    def add(self, share: float) -> None:
        """Count one inner step, of which ``share`` was trained."""
        self.steps += 1
        self.trained += share

    def restart(self) -> None:
        """Count the steps of this interval so far as not trained: their result is gone."""
        self.trained = 0.0

    def take(self) -> float:
        """Return the trained share of the interval, in [0, 1], and begin the next one."""
        share = self.trained / self.steps
        self.steps, self.trained = 0, 0.0
        return share

    def state_dict(self) -> dict[str, float]:
        """Return the counts as plain numbers."""
        return asdict(self)
