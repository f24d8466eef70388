"""Weight of a replica in an outer step: the guard's verdict, and the share of tokens it trained.

One replica with a NaN would spoil all K with one mean. `Guard` therefore gives a replica whose
pseudogradient is not finite, or far from the usual norm, the weight 0 for this mean. The decision
uses two numbers, both summed over the whole replica, so all its ranks decide alike; it reaches the
other replicas as the weight that is sent with the data, without a collective of its own.

A round in which too few replicas are usable is counted. After `Guard.max_empty_rounds` of them in a
row the run has to stop: it would only repeat the outer momentum, or trust one replica for all.

`Progress` counts how much of an interval a replica trained, for means weighted by tokens, and for
the weight 0 of a replica that trained on no step of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import median
from typing import Any

import torch
from torch import Tensor

__all__ = ["Guard", "Progress", "Verdict", "local_statistics"]


class Verdict(Enum):
    """The guard's decision for one replica and one launch."""

    GOOD = "good"
    NON_FINITE = "non-finite"  # weight 0, and the replica restarts from the anchor
    OUTLIER = "norm outside the band"  # weight 0 in this mean; the replica trains on unchanged
    IDLE = "trained on no step"  # weight 0 in this mean, which its zeros would make smaller

    @property
    def weight(self) -> float:
        """Weight of the replica in the mean."""
        return 1.0 if self is Verdict.GOOD else 0.0


def local_statistics(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return ``[number of non-finite tensors, squared norm of the finite ones]``, ``[2]``, fp64.

    The caller sums the result over the ranks of the replica. A norm beyond the range of fp32
    counts as non-finite: no pseudogradient of a model that still trains comes near it.
    """
    if not tensors:
        return torch.zeros(2, dtype=torch.float64, device=device)
    # One reduction per tensor finds NaN and infinity too: either makes the norm non-finite.
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]).double()
    bad = ~torch.isfinite(norms)
    return torch.stack([bad.sum().double(), norms.masked_fill(bad, 0.0).square().sum()])


@dataclass
class Guard:
    """Decides by its norm whether a replica's pseudogradient enters the mean.

    The same inputs give the same verdict on every rank. What is compared is the norm divided by
    the sum of the inner learning rates of its interval, ``q = norm / lr_sum``: a pseudogradient is
    a sum of updates, each of which is proportional to its learning rate, so warm-up and decay alone
    change the norm but hardly ``q``. The band of accepted values is ``[m / max_norm_ratio,
    m * max_norm_ratio]`` around the median ``m`` of the replicas' ``q`` in the fragment's previous
    round. Learning rates are known in advance, and the norms of the previous round came with its
    data, so the verdict needs no message between replicas. A median means little for two or three
    replicas, hence ``min_replicas``. The norms of excluded replicas enter the median only where
    more than half of the replicas were excluded: the band then follows, as it has to when all norms
    change together. Otherwise one half could exclude the other half in the next round.

    Attributes:
        num_replicas: K.
        max_norm_ratio: Largest accepted ratio of ``q`` and median, in both directions. The default
            of 10 is chosen.
        min_replicas: Smallest K for which the band is used.
        min_usable: Replicas with a weight above 0 that a round needs in order not to be empty.
        max_empty_rounds: Empty rounds in a row after which the run has to stop; 0 is no limit.
    """

    num_replicas: int
    max_norm_ratio: float = 10.0
    min_replicas: int = 4
    min_usable: int = 1
    max_empty_rounds: int = 0
    _medians: dict[int, float] = field(default_factory=dict, init=False)
    _empty: dict[int, int] = field(default_factory=dict, init=False)

    @property
    def has_band(self) -> bool:
        """Whether norms are compared at all."""
        return self.num_replicas >= self.min_replicas and math.isfinite(self.max_norm_ratio)

    def judge_replica(
        self,
        fragment: int,
        deltas: Mapping[str, Tensor],
        total: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        lr_sum: float | None,
    ) -> tuple[Verdict, float]:
        """Return the verdict for this replica and its pseudogradient norm, NaN if not finite.

        Args:
            fragment: Index of the fragment.
            deltas: This rank's shards of the pseudogradient, replicated parameters only on their
                primary rank. May be empty.
            total: Sum over the ranks of the replica.
            device: Device of the tensor given to ``total``.
            lr_sum: Sum of the inner learning rates of the interval, in any unit; ``None`` or 0
                does not compare with the band. Intervals of another length than the previous one
                are not compared: how the norm grows with the number of steps is not known.

        Collectives: one call of ``total``; all ranks of the replica call this method.
        """
        # tolist() waits for the device: reducers need the weight as a number, since with weight 0
        # they leave the tensors out (0 * NaN would be NaN).
        bad, square = total(local_statistics(list(deltas.values()), device)).tolist()
        norm = math.nan if bad else math.sqrt(square)
        return self.judge(fragment, non_finite=bad > 0, norm=norm, lr_sum=lr_sum), norm

    def judge(
        self, fragment: int, *, non_finite: bool, norm: float, lr_sum: float | None
    ) -> Verdict:
        """Return the verdict for the replica's summed statistics of ``fragment``."""
        if non_finite:
            return Verdict.NON_FINITE
        middle = self._medians.get(fragment)
        if middle is None or not lr_sum or not self.has_band:
            return Verdict.GOOD
        inside = middle / self.max_norm_ratio <= norm / lr_sum <= middle * self.max_norm_ratio
        return Verdict.GOOD if inside else Verdict.OUTLIER

    def observe(
        self,
        fragment: int,
        norms: list[float],
        *,
        lr_sum: float,
        weights: list[float] | None = None,
    ) -> None:
        """Set the fragment's median from the replicas' norms of a full interval.

        Args:
            fragment: Index of the fragment.
            norms: Norm of every replica, NaN where it is not finite; equal on all ranks, since they
                come from the metadata of the reduction.
            lr_sum: Sum of the inner learning rates of the interval; with 0 nothing is set.
            weights: Weight of every replica in the mean; by default all were used.
        """
        used = norms
        if weights is not None and 2 * sum(weight > 0 for weight in weights) >= len(weights):
            used = [norm for norm, weight in zip(norms, weights, strict=True) if weight > 0]
        finite = [norm for norm in used if norm == norm]
        if finite and median(finite) > 0.0 and lr_sum > 0.0:
            self._medians[fragment] = median(finite) / lr_sum

    def count_usable(self, fragment: int, usable: int) -> None:
        """Count a round of a fragment, in which ``usable`` replicas had a weight above 0.

        The number is the same on all ranks, since weights come with the data of the reduction.
        """
        self._empty[fragment] = 0 if usable >= self.min_usable else self.empty(fragment) + 1

    def empty(self, fragment: int) -> int:
        """Return the empty rounds of a fragment in a row, up to now."""
        return self._empty.get(fragment, 0)

    @property
    def empty_rounds(self) -> int:
        """Empty rounds in a row, up to now; the largest number over fragments."""
        return max(self._empty.values(), default=0)

    def exhausted(self, fragments: Iterable[int]) -> bool:
        """Whether one of these fragments, which were just applied, has reached the limit.

        Of the others a resumed run cannot say more than that they were empty before it.
        """
        empty = (self.empty(fragment) for fragment in fragments)
        return any(0 < self.max_empty_rounds <= rounds for rounds in empty)

    def state_dict(self) -> dict[str, Any]:
        """Return medians and empty rounds by the fragment's index as text, for JSON."""
        return {
            "medians_per_lr": {str(i): middle for i, middle in self._medians.items()},
            "empty_rounds": {str(i): rounds for i, rounds in self._empty.items() if rounds},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        A state without ``medians_per_lr`` holds medians of undivided norms, which would be compared
        with the wrong scale. It is not used: each fragment's first launch then has no band.
        """
        medians = state.get("medians_per_lr", {})
        self._medians = {int(fragment): float(middle) for fragment, middle in medians.items()}
        empty = state.get("empty_rounds", {})
        self._empty = {int(fragment): int(rounds) for fragment, rounds in empty.items()}


# ---- weights by tokens ---------------------------------------------------------------------------


@dataclass
class Progress:
    """Inner steps of one fragment since its last launch, and how many of them trained.

    Attributes:
        steps: Number of inner steps.
        trained: Sum over these steps of the share of tokens that the replica trained on; a skipped
            step adds 0.
    """

    steps: int = 0
    trained: float = 0.0

    def add(self, share: float) -> None:
        """Count one inner step in which the share ``share`` of the tokens was trained on."""
        self.steps += 1
        self.trained += share

    def restart(self) -> None:
        """Count the steps of this interval so far as not trained: the replica lost their result."""
        self.trained = 0.0

    def take(self) -> float:
        """Return the trained share of the interval, in [0, 1], and start the next interval."""
        share = self.trained / self.steps
        self.steps, self.trained = 0, 0.0
        return share

    def state_dict(self) -> dict[str, float]:
        """Return the counts as plain numbers."""
        return asdict(self)
