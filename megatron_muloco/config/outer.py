"""Schema of the outer step: when replicas meet, what they send, and how the anchor moves."""

import math
from bisect import bisect_right
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag

from megatron_muloco.config.section import PositiveInt, Section

__all__ = [
    "AverageOuter",
    "CompressionConfig",
    "CosineRamp",
    "E3M0Compression",
    "ExceptionsConfig",
    "FragmentsConfig",
    "GuardConfig",
    "Interval",
    "LearningRate",
    "LinearCompression",
    "LinearRamp",
    "LossyCompression",
    "Momentum",
    "NesterovOuter",
    "NoCompression",
    "NoOuter",
    "OuterConfig",
    "StatisticalCompression",
    "Steps",
    "TopKCompression",
    "compression_name",
    "compression_words",
    "exception_words",
    "feedback_words",
    "interval_at",
    "interval_values",
    "interval_words",
    "rate_words",
]


# ------------------------------------------------------------------------------------------
# Schema of the code that pseudogradients travel in.


_KINDS = "none, linear, statistical, e3m0 or topk."


class ExceptionsConfig(Section):
    """Parameters that are coded otherwise than the rest."""

    norm: Literal[8, 4, 2, 1, "none"] | None = Field(
        None, description="Bits of norm weights, none for fp32; like the others when not given."
    )
    embedding: Literal[8, 4, 2, 1, "none"] | None = Field(
        None, description="Bits of the embedding, none for fp32; like the others when not given."
    )
    output: Literal[8, 4, 2, 1, "none"] | None = Field(
        None, description="Bits of the output head, none for fp32; like the others when not given."
    )


class NoCompression(Section):
    """Send pseudogradients as they are."""

    kind: Literal["none"] = Field("none", description=_KINDS)
    wire_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype on the network; sums are taken in fp32."
    )
    deterministic: bool = Field(
        False,
        description="Sum in a fixed order at each chunk's owner, so that the mean is the same bits "
        "on any network. An all-reduce is equal on all replicas, but its order is the library's. "
        "bf16 and all codes are deterministic anyway.",
    )

    @property
    def is_all_reduce(self) -> bool:
        """Whether values travel in one all-reduce, which needs nobody to work on it."""
        return self.wire_dtype == "fp32" and not self.deterministic


class _LossyCompression(Section):
    """Keys of every lossy code."""

    is_all_reduce: ClassVar[bool] = False

    error_feedback: bool = Field(
        True, description="Keep what a code loses and add it to the next round's pseudogradient."
    )
    error_decay: float = Field(
        0.9, ge=0, le=1, description="Factor on the residual when it is added again."
    )
    exceptions: ExceptionsConfig = Field(
        default_factory=ExceptionsConfig, description="Parameters that are coded otherwise."
    )


class _Grouped(_LossyCompression):
    """Keys of the codes that store each value in a few bits, with a scale for many."""

    granularity: Literal["tensor", "row", "block"] = Field(
        "tensor",
        description="What shares one scale: a rank's piece of a tensor, each row of it, or each "
        "block of block_size values.",
    )
    block_size: int | None = Field(
        None, ge=2, description="Values per block, 256 when not given; only with granularity block."
    )

    @property
    def values_per_block(self) -> int:
        """Values of a block, where blocks are what shares a scale."""
        # 256 is chosen: two fp32 numbers for each block take a quarter of a bit a value.
        return self.block_size or 256


class LinearCompression(_Grouped):
    """Uniform levels between the smallest and the largest value."""

    kind: Literal["linear"] = Field(description=_KINDS)
    bits: Literal[8, 4, 2, 1] = Field(description="Bits per value.")


class StatisticalCompression(_Grouped):
    """Bins over six standard deviations, each decoded to the mean of what fell into it."""

    kind: Literal["statistical"] = Field(description=_KINDS)
    bits: Literal[8, 4, 2, 1] = Field(description="Bits per value.")


class E3M0Compression(_Grouped):
    """Four bits as sign and exponent, the format of the streaming paper."""

    kind: Literal["e3m0"] = Field(description=_KINDS)

    @property
    def bits(self) -> Literal[4]:
        """Bits per value, as the other codes of a few bits have them."""
        return 4


class TopKCompression(_LossyCompression):
    """Only the largest values, with their places."""

    kind: Literal["topk"] = Field(description=_KINDS)
    density: float = Field(gt=0, le=1, description="Fraction of the values that is sent.")
    block_size: int = Field(
        4096,
        ge=2,
        le=65536,
        description="Values that compete with each other; a place takes log2 of it in bits.",
    )
    wire_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Dtype of the values sent.")
    value_bits: Literal[8, 4, 2, 1] | None = Field(
        None, description="Code the values sent with the statistical code of these bits instead."
    )


def _uncompressed(value: Any) -> Any:
    """Let the keys of uncompressed exchange stand without ``kind: none``."""
    return {"kind": "none", **value} if isinstance(value, dict) else value


LossyCompression = LinearCompression | StatisticalCompression | E3M0Compression | TopKCompression
CompressionConfig = Annotated[
    NoCompression | LinearCompression | StatisticalCompression | E3M0Compression | TopKCompression,
    Field(discriminator="kind"),
    BeforeValidator(_uncompressed),
]


# ------------------------------------------------------------------------------------------
# Numbers of the outer step that may change from round to round, as functions of the round.
#
# A plain number is constant. A schedule is an object with a ``kind``, which the outer step calls
# with a round, counted from 1; so resuming needs no state::
#
#     sync_interval: {kind: steps, values: [[1, 30], [200, 60]]}    # 60 steps from round 200 on
#     lr: {kind: cosine, start: 0.9, end: 0.7, rounds: 500}         # 0.7 from round 500 on
#     momentum: {kind: linear, start: 0.7, end: 0.8, rounds: 500}
#
# The bounds of a key hold for every value of its schedule; `outer_checks` looks at the rounds.


Value = TypeVar("Value", int, float)


class Steps(Section, Generic[Value]):
    """One value after the other, each constant."""

    kind: Literal["steps"] = Field(description="Kind of schedule, where one is given.")
    values: tuple[Annotated[tuple[PositiveInt, Value], Field(strict=False)], ...] = Field(
        strict=False,
        min_length=1,
        description="Pairs [round, value]: the value from that round on. The first round is 1.",
    )

    def __call__(self, round_index: int) -> Value:
        """Return the value of a round."""
        begun = bisect_right(self.values, round_index, key=lambda pair: pair[0])
        return self.values[max(begun, 1) - 1][1]


class _Ramp(Section, Generic[Value]):
    """From one value to another in so many rounds, and constant from then on."""

    start: Value = Field(description="Value of round 1.")
    end: Value = Field(description="Value from round `rounds` on.")
    rounds: int = Field(ge=2, description="Round that is the first with the value `end`.")

    def _between(self, remaining: float) -> float:
        return self.start * remaining + self.end * (1.0 - remaining)  # exact at both ends

    def _progress(self, round_index: int) -> float:
        return min(1.0, (round_index - 1) / (self.rounds - 1))


class LinearRamp(_Ramp[Value], Generic[Value]):
    """The same change from every round to the next."""

    kind: Literal["linear"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(1.0 - self._progress(round_index))


class CosineRamp(_Ramp[Value], Generic[Value]):
    """Half a cosine: slow at both ends."""

    kind: Literal["cosine"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(0.5 * (1.0 + math.cos(math.pi * self._progress(round_index))))


def _tag(value: Any) -> str | None:
    """Return the kind of a schedule, given as keys or as an object; all else has to be a number."""
    if isinstance(value, dict):
        kind = value.get("kind")
        return None if kind is None else str(kind)
    return getattr(value, "kind", "number")


_PositiveRate = Annotated[float, Field(gt=0)]
_Momentum = Annotated[float, Field(ge=0, lt=1)]

Interval = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Steps[PositiveInt], Tag("steps")],
    Discriminator(_tag),
]
LearningRate = Annotated[
    Annotated[_PositiveRate, Tag("number")]
    | Annotated[Steps[_PositiveRate], Tag("steps")]
    | Annotated[LinearRamp[_PositiveRate], Tag("linear")]
    | Annotated[CosineRamp[_PositiveRate], Tag("cosine")],
    Discriminator(_tag),
]
Momentum = Annotated[
    Annotated[_Momentum, Tag("number")]
    | Annotated[Steps[_Momentum], Tag("steps")]
    | Annotated[LinearRamp[_Momentum], Tag("linear")]
    | Annotated[CosineRamp[_Momentum], Tag("cosine")],
    Discriminator(_tag),
]


def interval_at(interval: Interval, round_index: int) -> int:
    """Return the inner steps of a round."""
    return interval if isinstance(interval, int) else interval(round_index)


def interval_values(interval: Interval) -> tuple[int, ...]:
    """Return the lengths that rounds may have, in the order in which they are listed."""
    return (interval,) if isinstance(interval, int) else tuple(v for _, v in interval.values)


def interval_words(interval: Interval, unit: str) -> str:
    """Return, for instance, ``30 steps, 60 from round 200`` for the unit ``step``."""
    first = interval_at(interval, 1)
    words = f"{first} {unit}{'' if first == 1 else 's'}"
    return words if isinstance(interval, int) else words + _later(interval)


def rate_words(rate: LearningRate | Momentum) -> str:
    """Return, for instance, ``0.9``, or ``0.9 to 0.7 over 500 rounds (cosine)``."""
    if isinstance(rate, Steps):
        return f"{rate(1):g}{_later(rate)}"
    if isinstance(rate, _Ramp):
        return f"{rate.start:g} to {rate.end:g} over {rate.rounds:,} rounds ({rate.kind})"
    return f"{rate:g}"


def _later(steps: Steps[Any]) -> str:
    return "".join(f", {value:g} from round {first:,}" for first, value in steps.values[1:])


# ------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------
# The code of pseudogradients in words, for the plan.


def compression_name(code: CompressionConfig) -> str:
    """Return what travels, in short: ``bf16`` or ``linear, 4 bits``."""
    if isinstance(code, NoCompression):
        return code.wire_dtype
    if isinstance(code, TopKCompression):
        return f"top-k, {100 * code.density:g} %"
    return f"{code.kind}, {_bits(code.bits)}"


def compression_words(code: LossyCompression) -> str:
    """Return what shares a scale, or how the largest values are sent."""
    if isinstance(code, TopKCompression):
        values = f"{_bits(code.value_bits)} each" if code.value_bits else code.wire_dtype
        return f"the largest of every {code.block_size} values, {values}, and their places"
    what = {"linear": "smallest and largest value", "e3m0": "scale"}.get(code.kind, "table")
    return f"a {what} per {_group(code)}"


def exception_words(code: LossyCompression) -> str:
    """Return what is coded otherwise; nothing where nothing is."""
    names = {"norm": "norms", "embedding": "embedding", "output": "output head"}
    bits = {what: getattr(code.exceptions, key) for key, what in names.items()}
    return ", ".join(
        f"{what} {'fp32' if value == 'none' else _bits(value)}"
        for what, value in bits.items()
        if value is not None
    )


def feedback_words(code: LossyCompression) -> tuple[str, str]:
    """Return the decay of error feedback, and what it keeps."""
    if not code.error_feedback:
        return "none", "what a code loses is lost"
    own = "what this replica's code loses"
    if isinstance(code, TopKCompression):
        return f"{code.error_decay:g}", own
    return f"{code.error_decay:g}", f"{own}, and the code of the mean it owns"


def _group(code: LinearCompression | StatisticalCompression | E3M0Compression) -> str:
    if code.granularity == "block":
        return f"block of {code.values_per_block}"
    return {"tensor": "piece of a tensor", "row": "row"}[code.granularity]


def _bits(bits: int) -> str:
    return f"{bits} {'bit' if bits == 1 else 'bits'}"
