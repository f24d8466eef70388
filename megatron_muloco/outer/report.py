"""What an outer step tells the training loop; tensors stay on their device until logged."""

from dataclasses import dataclass

from torch import Tensor

from megatron_muloco.outer.guard import Verdict

__all__ = ["CodeReport", "FragmentReport", "OuterReport"]


@dataclass(frozen=True, slots=True)
class CodeReport:
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
        riders: The caller's riders of every replica, ``[K, n]``.
        pseudogradient_norm: Norm of this replica's own pseudogradient; NaN if it was not finite.
        update_norm: Norm of what the anchor moved by, 0-dim.
        cosine_to_mean: Cosine of own and mean pseudogradient, 0-dim; NaN where undefined.
        wire_bytes: Bytes that this rank sent.
        uncoded_bytes: Bytes that an fp32 all-reduce would have sent, riders not counted.
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
    riders: Tensor
    pseudogradient_norm: float
    update_norm: Tensor
    cosine_to_mean: Tensor
    wire_bytes: int
    exposed_ms: float
    pairwise_cosines: Tensor | None = None
    uncoded_bytes: int = 0
    code: CodeReport | None = None

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
