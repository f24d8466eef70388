"""What an outer step tells the training loop; tensors stay on their device until logged."""

from dataclasses import dataclass

from torch import Tensor

from megatron_muloco.outer.guard import Verdict

__all__ = ["FragmentReport", "OuterReport"]


@dataclass(frozen=True, slots=True)
class FragmentReport:
    """One applied fragment. Norms and cosine are over the whole replica, duplicates counted once.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        verdict: The guard's word on this replica.
        weights: w of every replica, ``[K]``.
        riders: The caller's riders of every replica, ``[K, n]``.
        pseudogradient_norm: Norm of this replica's own pseudogradient; NaN if it was not finite.
        update_norm: Norm of what the anchor moved by, 0-dim.
        cosine_to_mean: Cosine of own and mean pseudogradient, 0-dim; NaN where undefined.
        wire_bytes: Bytes that this rank sent.
        exposed_ms: Host time spent launching and waiting. On an accelerator the wait only orders
            streams, so there it is a lower bound.
    """

    fragment: int
    launched_at: int
    verdict: Verdict
    weights: Tensor
    riders: Tensor
    pseudogradient_norm: float
    update_norm: Tensor
    cosine_to_mean: Tensor
    wire_bytes: int
    exposed_ms: float

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
        quarantined: This replica was not finite and now holds the anchor in every fragment. The
            caller zeroes the state of the inner optimizer, on all ranks of the replica.
    """

    step: int
    round_index: int
    launched: tuple[int, ...]
    applied: tuple[FragmentReport, ...]
    quarantined: bool

    @property
    def alarm(self) -> bool:
        """Whether some fragment found no usable replica at all."""
        return any(fragment.weight_sum == 0.0 for fragment in self.applied)
