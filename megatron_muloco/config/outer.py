"""Schema of the outer step: when replicas meet, what they send, and how the anchor moves."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_muloco.config.compression import CompressionConfig, NoCompression
from megatron_muloco.config.round_schedules import Interval, LearningRate, Momentum
from megatron_muloco.config.section import Section

__all__ = [
    "AverageOuter",
    "FragmentsConfig",
    "GuardConfig",
    "NesterovOuter",
    "NoOuter",
    "OuterConfig",
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


class NoOuter(Section):
    """Plain data parallelism: one replica, no outer step."""

    kind: Literal["none"] = Field(description="nesterov, average or none.")


class _Synchronised(Section):
    """Keys of every outer optimizer."""

    sync_interval: Interval = Field(
        30,
        description="H, inner steps between two outer steps of the same parameters; those of a "
        "round where it changes.",
    )
    fragments: FragmentsConfig = Field(
        default_factory=FragmentsConfig, description="Division of the parameters."
    )
    overlap_steps: int = Field(
        0,
        ge=0,
        description="Inner steps between sending a fragment and using the result; 0 waits. Less "
        "than the shortest sync_interval, and than max_in_flight times the steps between two "
        "launches.",
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
    weighting: Literal["replica", "tokens"] = Field(
        "replica",
        description="Weight of a replica in the mean: all the same, or its share of the interval's "
        "tokens that it trained on. They differ where a replica skipped steps because its "
        "gradients were not finite.",
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="Protection from broken replicas."
    )

    @property
    def sends_from_host(self) -> bool:
        """Whether pseudogradients leave from host memory; ``transport: auto`` never does."""
        return self.transport == "host"

    @property
    def reduces_in_thread(self) -> bool:
        """Whether a thread reduces beside training, as a reduction with several phases needs."""
        one_phase = self.compression.is_all_reduce and not self.sends_from_host
        return self.overlap_steps > 0 and not one_phase

    @property
    def effective_mixing_weight(self) -> float:
        """The mixing weight with its default filled in (0.5 is the streaming paper's)."""
        if self.mixing_weight is not None:
            return self.mixing_weight
        return 0.5 if self.overlap_steps > 0 else 0.0


class NesterovOuter(_Synchronised):
    """SGD with Nesterov momentum on the pseudogradient, in the form of ``torch.optim.SGD``."""

    kind: Literal["nesterov"] = Field(description="nesterov, average or none.")
    lr: LearningRate = Field(description="Outer learning rate; a number is constant.")
    momentum: Momentum = Field(description="Outer momentum; a number is constant.")


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
