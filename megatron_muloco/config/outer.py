"""Config schema of the outer step: when replicas synchronise, what they send, how the anchor moves.

The parts, in order: compression of pseudogradients, values that change from round to round, and the
outer step itself.
"""

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, SerializeAsAny, Tag
from typing_extensions import override

from megatron_muloco.config.section import PositiveInt, Section

__all__ = [
    "AverageOuter",
    "CompressionConfig",
    "CosineRamp",
    "E3M0Compression",
    "ExceptionsConfig",
    "FragmentPattern",
    "FragmentsConfig",
    "GroupedCompression",
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
    "SynchronizedOuter",
    "TopKCompression",
    "interval_at",
    "interval_values",
    "interval_words",
    "rate_words",
]


# ---- compression of pseudogradients ------------------------------------------------------

_KINDS = "none, linear, statistical, e3m0 or topk."


class ExceptionsConfig(Section):
    """Bits of the parameters that are compressed differently from the rest."""

    norm: Literal[8, 4, 2, 1, "none"] | None = Field(
        None,
        description="Bits of norm weights; none sends fp32, not set uses the bits of the rest.",
    )
    embedding: Literal[8, 4, 2, 1, "none"] | None = Field(
        None,
        description="Bits of the embedding; none sends fp32, not set uses the bits of the rest.",
    )
    output: Literal[8, 4, 2, 1, "none"] | None = Field(
        None,
        description="Bits of the output head; none sends fp32, not set uses the bits of the rest.",
    )

    def describe(self) -> str:
        """Return the exceptions in words: ``norms fp32, embedding 8 bits``; ``""`` without any."""
        bits = {"norms": self.norm, "embedding": self.embedding, "output head": self.output}
        return ", ".join(
            f"{what} {'fp32' if value == 'none' else _in_bits(value)}"
            for what, value in bits.items()
            if value is not None
        )


def _in_bits(bits: int) -> str:
    return f"{bits} {'bit' if bits == 1 else 'bits'}"


class NoCompression(Section):
    """Send pseudogradients uncompressed, in fp32 or bf16."""

    kind: Literal["none"] = Field("none", description=_KINDS)
    wire_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Dtype on the network; sums are computed in fp32."
    )
    deterministic: bool = Field(
        False,
        description="Sum in a fixed order on the owner rank of each chunk, so that the mean has "
        "the same bits on any network. The result of an all-reduce is equal on all replicas, but "
        "its order of summation depends on the library. bf16 and lossy compression are always "
        "deterministic.",
    )

    @property
    def is_all_reduce(self) -> bool:
        """Whether one all-reduce computes the mean, which progresses without a helper thread."""
        return self.wire_dtype == "fp32" and not self.deterministic

    @property
    def short_name(self) -> str:
        """The dtype on the network: ``fp32`` or ``bf16``."""
        return self.wire_dtype


class LossyCompression(Section):
    """Keys of every lossy compression, and what the rest of the package asks it.

    A codec outside of this package has a subclass of this section. It is registered with
    `compress.codecs.register_codec` and put into a config with `config.with_compression`.

    Attributes:
        mean_is_encoded: Whether the owner of a chunk encodes the mean again. Otherwise every rank
            decodes the payloads of all replicas, which suits codecs that send few of the values.
        has_bits: Whether ``exceptions`` may set another number of bits per value.
    """

    is_all_reduce: ClassVar[bool] = False
    mean_is_encoded: ClassVar[bool] = True
    has_bits: ClassVar[bool] = False
    if TYPE_CHECKING:
        kind: str  # a literal in each subclass, by which the union tells them apart

    error_feedback: bool = Field(
        True, description="Add the compression error to the next round's pseudogradient."
    )
    error_decay: float = Field(
        0.9, ge=0, le=1, description="Factor on the residual when it is added to the next round."
    )
    exceptions: ExceptionsConfig = Field(
        default_factory=ExceptionsConfig,
        description="Parameters that are compressed differently.",
    )

    @property
    def short_name(self) -> str:
        """Kind, and after a comma the amount that is sent: ``linear, 4 bits``."""
        return self.kind

    def describe(self) -> str:
        """Return further properties in words; ``""`` without any."""
        return ""

    def describe_feedback(self) -> tuple[str, str]:
        """Return the decay of error feedback and what its residual contains, in words."""
        if not self.error_feedback:
            return "none", "compression errors are dropped"
        own = "compression error of this replica"
        residual = f"{own} and of the means it owns" if self.mean_is_encoded else own
        return f"{self.error_decay:g}", residual


class GroupedCompression(LossyCompression):
    """Keys of the quantizers: a value takes a few bits, and groups of values share a scale."""

    _scale: ClassVar[str]

    granularity: Literal["tensor", "row", "block"] = Field(
        "tensor",
        description="Values that share one scale: the part of a tensor that a rank holds, each row "
        "of it, or each block of block_size values.",
    )
    block_size: int | None = Field(
        None, ge=2, description="Values per block, by default 256; only with granularity block."
    )

    @property
    def values_per_block(self) -> int:
        """Number of values per block, for granularity block."""
        # 256 is chosen: two fp32 numbers per block add 64 / 256 = 0.25 bits per value.
        return self.block_size or 256

    @override
    def describe(self) -> str:
        """Return which values share a scale, in words: ``a table per row``."""
        if self.granularity == "block":
            return f"a {self._scale} per block of {self.values_per_block}"
        group = {"tensor": "part of a tensor", "row": "row"}[self.granularity]
        return f"a {self._scale} per {group}"


class _WithBits(GroupedCompression):
    """Keys of the quantizers with a choice of bits."""

    has_bits: ClassVar[bool] = True

    bits: Literal[8, 4, 2, 1] = Field(description="Bits per value.")

    @property
    @override
    def short_name(self) -> str:
        """Kind and bits: ``linear, 4 bits``."""
        return f"{self.kind}, {_in_bits(self.bits)}"


class LinearCompression(_WithBits):
    """Quantization to uniform levels between the smallest and the largest value of a group."""

    _scale: ClassVar[str] = "smallest and largest value"

    kind: Literal["linear"] = Field(description=_KINDS)


class StatisticalCompression(_WithBits):
    """Quantization to bins around the mean, each decoded to the mean of its values."""

    _scale: ClassVar[str] = "table"

    kind: Literal["statistical"] = Field(description=_KINDS)
    bins: Literal["least_error", "centred", "edged"] = Field(
        "least_error",
        description="Edges of the bins. Widths of six standard deviations over the number of bins: "
        "centred has a bin around the mean, as the public code of MuLoCo; edged has an edge at the "
        "mean. least_error chooses among both and what Lloyd's algorithm makes of them, for every "
        "group of values; with 8 bits it is edged.",
    )

    @override
    def describe(self) -> str:
        """Return which values share a table, and the rule for its bins unless it is the default."""
        rule = "" if self.bins == "least_error" else f", {self.bins} bins"
        return super().describe() + rule


class E3M0Compression(GroupedCompression):
    """Quantization to 4 bits, sign and exponent: the format of the Streaming DiLoCo paper."""

    _scale: ClassVar[str] = "scale"

    kind: Literal["e3m0"] = Field(description=_KINDS)

    @property
    @override
    def short_name(self) -> str:
        """Kind and bits: ``e3m0, 4 bits``."""
        return f"{self.kind}, {_in_bits(4)}"


class TopKCompression(LossyCompression):
    """Sending only the largest values of each block, with their indices."""

    mean_is_encoded: ClassVar[bool] = False  # the mean has up to K times as many values

    kind: Literal["topk"] = Field(description=_KINDS)
    density: float = Field(gt=0, le=1, description="Fraction of the values that are sent.")
    block_size: int = Field(
        4096,
        ge=2,
        le=65536,
        description="Values per block, of which the largest are sent; an index takes "
        "log2(block_size) bits.",
    )
    wire_dtype: Literal["fp32", "bf16"] = Field("fp32", description="Dtype of the values sent.")
    value_bits: Literal[8, 4, 2, 1] | None = Field(
        None, description="Quantize the values sent to this many bits, as kind statistical does."
    )

    @property
    @override
    def short_name(self) -> str:
        """Kind and density: ``top-k, 1 %``."""
        return f"top-k, {100 * self.density:g} %"

    @override
    def describe(self) -> str:
        """Return how the largest values are sent, in words."""
        values = f"{_in_bits(self.value_bits)} each" if self.value_bits else self.wire_dtype
        return f"the largest of every {self.block_size} values, {values}, and their indices"


def _uncompressed(value: Any) -> Any:
    """Accept the keys of uncompressed exchange without ``kind: none``."""
    return {"kind": "none", **value} if isinstance(value, dict) else value


CompressionConfig = Annotated[
    NoCompression | LinearCompression | StatisticalCompression | E3M0Compression | TopKCompression,
    Field(discriminator="kind"),
    BeforeValidator(_uncompressed),
]


# ---- values that may change from round to round ------------------------------------------
# A plain number is constant. A schedule is called with the round, counted from 1, so resuming needs
# no state:
#
#     sync_interval: {kind: steps, values: [[1, 30], [200, 60]]}    # 60 steps from round 200 on
#     lr: {kind: cosine, start: 0.9, end: 0.7, rounds: 500}         # 0.7 from round 500 on
#     momentum: {kind: linear, start: 0.7, end: 0.8, rounds: 500}
#
# The bounds of a key hold for every value of its schedule; `config.rules` checks the rounds.

Value = TypeVar("Value", int, float)


class Steps(Section, Generic[Value]):
    """A schedule of constant values, each of which holds from its round on."""

    kind: Literal["steps"] = Field(description="Kind of schedule, where one is given.")
    values: tuple[Annotated[tuple[PositiveInt, Value], Field(strict=False)], ...] = Field(
        strict=False,
        min_length=1,
        description="Pairs [round, value]: the value holds from that round on. The first round is "
        "1.",
    )

    def __call__(self, round_index: int) -> Value:
        """Return the value of a round."""
        begun = bisect_right(self.values, round_index, key=lambda pair: pair[0])
        return self.values[max(begun, 1) - 1][1]


class _Ramp(Section, Generic[Value]):
    """A schedule that goes from ``start`` to ``end`` in ``rounds`` rounds and then stays there."""

    start: Value = Field(description="Value of round 1.")
    end: Value = Field(description="Value from round `rounds` on.")
    rounds: int = Field(ge=2, description="First round with the value `end`.")

    def _between(self, remaining: float) -> float:
        return self.start * remaining + self.end * (1.0 - remaining)  # exact at both ends

    def _progress(self, round_index: int) -> float:
        return min(1.0, (round_index - 1) / (self.rounds - 1))


class LinearRamp(_Ramp[Value], Generic[Value]):
    """A ramp with the same change in every round."""

    kind: Literal["linear"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(1.0 - self._progress(round_index))


class CosineRamp(_Ramp[Value], Generic[Value]):
    """A ramp along half a cosine, which is slow at both ends."""

    kind: Literal["cosine"] = Field(description="Kind of schedule, where one is given.")

    def __call__(self, round_index: int) -> float:
        """Return the value of a round."""
        return self._between(0.5 * (1.0 + math.cos(math.pi * self._progress(round_index))))


def _tag(value: Any) -> str | None:
    """Return the ``kind`` of a schedule, given as keys or as an object, else ``number``."""
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
    """Return the number of inner steps of a round, counted from 1."""
    return interval if isinstance(interval, int) else interval(round_index)


def interval_values(interval: Interval) -> tuple[int, ...]:
    """Return the lengths of rounds that an interval allows, in the order of the config."""
    return (interval,) if isinstance(interval, int) else tuple(v for _, v in interval.values)


def interval_words(interval: Interval, unit: str) -> str:
    """Return an interval in words: ``30 steps, 60 from round 200`` for the unit ``step``."""
    first = interval_at(interval, 1)
    words = f"{first} {unit}{'' if first == 1 else 's'}"
    return words if isinstance(interval, int) else words + _later(interval)


def rate_words(rate: LearningRate | Momentum) -> str:
    """Return a rate in words: ``0.9``, or ``0.9 to 0.7 over 500 rounds (cosine)``."""
    if isinstance(rate, Steps):
        return f"{rate(1):g}{_later(rate)}"
    if isinstance(rate, _Ramp):
        return f"{rate.start:g} to {rate.end:g} over {rate.rounds:,} rounds ({rate.kind})"
    return f"{rate:g}"


def _later(steps: Steps[Any]) -> str:
    return "".join(f", {value:g} from round {first:,}" for first, value in steps.values[1:])


# ---- the outer step ----------------------------------------------------------------------


FragmentPattern = Literal["sequential", "strided"]


class FragmentsConfig(Section):
    """Division of the parameters into fragments, which are synchronised separately."""

    count: int = Field(
        1, ge=1, description="Fragments per round; 1 synchronises all parameters at once."
    )
    pattern: FragmentPattern = Field(
        "sequential",
        description="Layers of a fragment: consecutive layers, or every count-th layer.",
    )


class GuardConfig(Section):
    """Protection of the anchor from a replica that has failed numerically."""

    max_norm_ratio: float = Field(
        0.0,
        ge=0,
        description="Exclude a replica from the mean when the norm of its pseudogradient, divided "
        "by the sum of the round's inner learning rates, is more than max_norm_ratio times the "
        "median of the previous round, or less than the median divided by it. 0 is off; needs at "
        "least 4 replicas. A pseudogradient that is not finite is always excluded, and so is a "
        "replica that skipped every step of the round.",
    )
    min_usable_replicas: PositiveInt = Field(
        1, description="Replicas that a round needs; with fewer it counts as empty."
    )
    max_empty_rounds: int = Field(
        3,
        ge=0,
        description="Empty rounds in a row after which the run saves its state and stops with exit "
        "code 17; 0 never stops.",
    )


class NoOuter(Section):
    """Plain data parallelism: one replica and no outer step."""

    kind: Literal["none"] = Field(description="nesterov, average or none.")


class _Synchronised(Section):
    """Keys of every kind of outer step."""

    sync_interval: Interval = Field(
        30,
        description="H, inner steps between two outer steps of the same parameters; with a "
        "schedule, the inner steps of each round.",
    )
    fragments: FragmentsConfig = Field(
        default_factory=FragmentsConfig, description="Division of the parameters into fragments."
    )
    overlap_steps: int = Field(
        0,
        ge=0,
        description="Inner steps between the launch of a fragment and the apply of its result; 0 "
        "waits for the result. Must be less than the shortest sync_interval and less than "
        "max_in_flight times the steps between two launches.",
    )
    max_in_flight: int = Field(
        1, ge=1, description="Maximum number of fragments between launch and apply at one time."
    )
    mixing_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Weight of the local value when a result is applied; by default 0.5 with "
        "overlap_steps above 0, else 0.",
    )
    apply: Literal["mix", "additive"] = Field(
        "mix",
        description="mix averages the new anchor and the local value; additive adds to the new "
        "anchor the progress made since the launch.",
    )
    transport: Literal["device", "host"] = Field(
        "device",
        description="Memory that pseudogradients are sent from: device memory, or pinned host "
        "memory.",
    )
    # SerializeAsAny: a section from outside of the package is dumped with all its keys.
    compression: SerializeAsAny[CompressionConfig] = Field(
        default_factory=NoCompression, description="Compression of the pseudogradients."
    )
    state_device: Literal["device", "cpu"] = Field(
        "device", description="Memory that holds the anchor and the outer momentum."
    )
    weighting: Literal["replica", "tokens"] = Field(
        "replica",
        description="Weight of a replica in the mean: equal for all replicas that trained, or the "
        "share of the interval's tokens that each trained on. The two differ where a replica "
        "skipped steps, for instance because its gradients were not finite.",
    )
    guard: GuardConfig = Field(
        default_factory=GuardConfig, description="Exclusion of replicas that failed numerically."
    )

    @property
    def sends_from_host(self) -> bool:
        """Whether pseudogradients are sent from host memory."""
        return self.transport == "host"

    @property
    def reduces_beside_training(self) -> bool:
        """Whether something has to work on reductions while training continues.

        A reduction of several phases (copies, encoding, more than one collective) needs it to start
        the next phase. One all-reduce of device memory progresses by itself.
        """
        one_phase = self.compression.is_all_reduce and not self.sends_from_host
        return self.overlap_steps > 0 and not one_phase

    def reduces_in_thread(self, *, accelerator: bool) -> bool:
        """Whether that is a helper thread, and not the main thread between inner steps.

        One thread talks to NCCL: collectives on the memory of an accelerator are the main thread's.

        Args:
            accelerator: Whether the run uses accelerators.
        """
        return self.reduces_beside_training and (self.sends_from_host or not accelerator)

    @property
    def effective_mixing_weight(self) -> float:
        """The mixing weight with its default filled in; 0.5 is from the Streaming DiLoCo paper."""
        if self.mixing_weight is not None:
            return self.mixing_weight
        return 0.5 if self.overlap_steps > 0 else 0.0


class NesterovOuter(_Synchronised):
    """Outer SGD with Nesterov momentum on the pseudogradient, as in ``torch.optim.SGD``."""

    kind: Literal["nesterov"] = Field(description="nesterov, average or none.")
    lr: LearningRate = Field(description="Outer learning rate; a plain number is constant.")
    momentum: Momentum = Field(description="Outer momentum; a plain number is constant.")


class AverageOuter(_Synchronised):
    """Plain averaging: the anchor becomes the mean of the replicas."""

    kind: Literal["average"] = Field(description="nesterov, average or none.")

    @property
    def lr(self) -> float:
        """1: the anchor moves all the way to the mean."""
        return 1.0

    @property
    def momentum(self) -> float:
        """0: there is no momentum."""
        return 0.0


SynchronizedOuter = NesterovOuter | AverageOuter
"""The kinds with an outer step."""

OuterConfig = Annotated[NesterovOuter | AverageOuter | NoOuter, Field(discriminator="kind")]
