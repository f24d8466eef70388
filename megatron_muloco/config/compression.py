"""Schema of the code that pseudogradients travel in."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from megatron_muloco.config.section import Section

__all__ = [
    "CodeConfig",
    "CompressionConfig",
    "E3M0Compression",
    "ExceptionsConfig",
    "LinearCompression",
    "NoCompression",
    "StatisticalCompression",
    "TopKCompression",
]

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


class _Code(Section):
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


class _Grouped(_Code):
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


class TopKCompression(_Code):
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


CodeConfig = LinearCompression | StatisticalCompression | E3M0Compression | TopKCompression
CompressionConfig = Annotated[
    NoCompression | LinearCompression | StatisticalCompression | E3M0Compression | TopKCompression,
    Field(discriminator="kind"),
    BeforeValidator(_uncompressed),
]
