"""Schema of the outer step: when replicas meet, what they send, and how the anchor moves."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_muloco.config.section import Section

__all__ = [
    "AverageOuter",
    "CompressionConfig",
    "FragmentsConfig",
    "GuardConfig",
    "LinearCompression",
    "NesterovOuter",
    "NoCompression",
    "NoOuter",
    "OuterConfig",
    "StatisticalCompression",
    "TopKCompression",
]


class FragmentsConfig(Section):
    """How parameters are divided into sets that are synchronised together."""

    count: int = Field(
        1, ge=1, description="Fragments per round; 1 synchronises everything at once."
    )
    pattern: Literal["sequential", "strided"] = Field(
        "sequential",
        description="Layers of a fragment: neighbours, or every count-th layer.",
    )


class GuardConfig(Section):
    """What keeps one broken replica from spoiling the anchor."""

    max_norm_ratio: float = Field(
        0.0,
        ge=0,
        description="Leave a replica out of the mean when the norm of its pseudogradient is more "
        "than this many times the previous round's median, or less than that part of it; 0 is off, "
        "active from 4 replicas on. One that is not finite is left out in any case.",
    )


class NoCompression(Section):
    """Send pseudogradients as they are."""

    kind: Literal["none"] = Field("none", description="none, linear, statistical or topk.")
    wire_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype on the network; sums are taken in fp32."
    )


class _ErrorFeedback(Section):
    """Keys of every lossy code."""

    error_feedback: bool = Field(
        True, description="Keep what a code loses and add it to the next round's pseudogradient."
    )
    error_decay: float = Field(
        0.9, ge=0, le=1, description="Factor on the residual when it is added again."
    )


class _Quantised(_ErrorFeedback):
    """Keys of the codes that store each value in a few bits."""

    bits: Literal[8, 4, 2, 1] = Field(description="Bits per value.")
    granularity: Literal["tensor", "row", "block"] = Field(
        "tensor", description="What shares one scale."
    )
    block_size: int = Field(
        256, ge=2, description="Values per block; used with granularity block only."
    )


class LinearCompression(_Quantised):
    """Uniform bins between the smallest and the largest value."""

    kind: Literal["linear"] = Field(description="none, linear, statistical or topk.")


class StatisticalCompression(_Quantised):
    """Bins over six standard deviations, each decoded to the mean of what fell into it."""

    kind: Literal["statistical"] = Field(description="none, linear, statistical or topk.")


class TopKCompression(_ErrorFeedback):
    """Only the largest values, with their indices."""

    kind: Literal["topk"] = Field(description="none, linear, statistical or topk.")
    density: float = Field(gt=0, le=1, description="Fraction of the values that is sent.")
    wire_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Dtype of the values sent.")


def _uncompressed(value: Any) -> Any:
    """Let the keys of uncompressed exchange stand without ``kind: none``."""
    return {"kind": "none", **value} if isinstance(value, dict) else value


CompressionConfig = Annotated[
    NoCompression | LinearCompression | StatisticalCompression | TopKCompression,
    Field(discriminator="kind"),
    BeforeValidator(_uncompressed),
]


class NoOuter(Section):
    """Plain data parallelism: one replica, no outer step."""

    kind: Literal["none"] = Field(description="nesterov, average or none.")


class _Synchronised(Section):
    """Keys of every outer optimizer."""

    sync_interval: int = Field(
        30, ge=1, description="H, inner steps between two outer steps of the same parameters."
    )
    fragments: FragmentsConfig = Field(
        default_factory=FragmentsConfig, description="Division of the parameters."
    )
    overlap_steps: int = Field(
        0, ge=0, description="Inner steps between sending a fragment and using the result; 0 waits."
    )
    max_in_flight: int = Field(1, ge=1, description="Fragments that may be under way at once.")
    mixing_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the local value kept when a result is applied; default 0.5 with "
        "overlap_steps above 0, else 0.",
    )
    apply: Literal["mix", "additive"] = Field(
        "mix",
        description="Mix the new anchor with the local value, or add the progress made since the "
        "fragment was sent.",
    )
    transport: Literal["auto", "device", "host"] = Field(
        "auto",
        description="Where pseudogradients travel from: device memory or pinned host memory.",
    )
    compression: CompressionConfig = Field(
        default_factory=NoCompression, description="Code of the pseudogradients."
    )
    state_device: Literal["device", "cpu"] = Field(
        "device", description="Where the anchor and the outer momentum live."
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="Protection from broken replicas."
    )

    @property
    def effective_mixing_weight(self) -> float:
        """The mixing weight with its default filled in (0.5 is the streaming paper's)."""
        if self.mixing_weight is not None:
            return self.mixing_weight
        return 0.5 if self.overlap_steps > 0 else 0.0


class NesterovOuter(_Synchronised):
    """SGD with Nesterov momentum on the pseudogradient, in the form of ``torch.optim.SGD``."""

    kind: Literal["nesterov"] = Field(description="nesterov, average or none.")
    lr: float = Field(gt=0, description="Outer learning rate; constant.")
    momentum: float = Field(ge=0, lt=1, description="Outer momentum; constant.")


class AverageOuter(_Synchronised):
    """The plain mean of the replicas: learning rate 1 and no momentum."""

    kind: Literal["average"] = Field(description="nesterov, average or none.")

    @property
    def lr(self) -> float:
        """The anchor moves onto the mean."""
        return 1.0

    @property
    def momentum(self) -> float:
        """Nothing is remembered between rounds."""
        return 0.0


OuterConfig = Annotated[NesterovOuter | AverageOuter | NoOuter, Field(discriminator="kind")]
