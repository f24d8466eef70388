"""The table of codecs: the payload format and the implementation of each ``compression.kind``.

The planner calls `format_of`, which loads no torch; the reducers call `codec_lookup`. Neither knows
a codec by its name. A new codec is a section of the config (`LossyCompression`), a codec class, and
one entry here. A codec outside of this package adds its entry with `register_codec`, and its
section with `config.with_compression`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from megatron_muloco.compress.format import (
    Format,
    GroupedFormat,
    Grouping,
    RawFormat,
    StatisticalFormat,
    TopKFormat,
    e3m0_format,
    linear_format,
    statistical_format,
)
from megatron_muloco.config.outer import (
    GroupedCompression,
    LossyCompression,
    StatisticalCompression,
    TopKCompression,
)
from megatron_muloco.params import ParamKind

if TYPE_CHECKING:
    from megatron_muloco.compress.codec import Codec

__all__ = [
    "CodecKind",
    "codec_lookup",
    "format_of",
    "main_format",
    "register_codec",
]


@dataclass(frozen=True, slots=True)
class CodecKind:
    """One kind of codec.

    Attributes:
        format: Function of a section of the config and the bits per value that an exception sets
            (else ``None``); returns the payload format. In this package it loads no torch.
        codec: Function of such a format; returns the codec, whose payloads have exactly
            ``format.payload_bytes`` for every unit. Here it imports torch when it is called.
    """

    format: Callable[[Any, int | None], Format]
    codec: Callable[[Any], "Codec"]


def _grouping(section: GroupedCompression) -> Grouping:
    return Grouping(section.granularity, section.values_per_block)


def _statistical_format(section: StatisticalCompression, bits: int | None) -> StatisticalFormat:
    return statistical_format(bits or section.bits, _grouping(section), section.bins)


def _topk_format(section: TopKCompression, bits: int | None) -> TopKFormat:
    value_bytes = {"fp32": 4, "bf16": 2}[section.wire_dtype]
    grouping = Grouping("block", section.block_size)
    return TopKFormat(section.density, value_bytes, grouping, section.value_bits)


def _linear(payload_format: GroupedFormat) -> "Codec":
    from megatron_muloco.compress.quantizers import Linear

    return Linear(payload_format.bits, payload_format.grouping)


def _statistical(payload_format: StatisticalFormat) -> "Codec":
    from megatron_muloco.compress.statistical import Statistical

    return Statistical(payload_format.bits, payload_format.grouping, payload_format.bins)


def _e3m0(payload_format: GroupedFormat) -> "Codec":
    from megatron_muloco.compress.quantizers import E3M0

    return E3M0(payload_format.grouping)


def _topk(payload_format: TopKFormat) -> "Codec":
    from megatron_muloco.compress.topk import TopK

    wire_dtype: Literal["fp32", "bf16"] = "bf16" if payload_format.value_bytes == 2 else "fp32"
    return TopK(
        payload_format.density,
        wire_dtype,
        payload_format.grouping.block_size,
        payload_format.value_bits,
    )


_CODECS: dict[str, CodecKind] = {
    "linear": CodecKind(
        lambda section, bits: linear_format(bits or section.bits, _grouping(section)), _linear
    ),
    "statistical": CodecKind(_statistical_format, _statistical),
    "e3m0": CodecKind(lambda section, bits: e3m0_format(_grouping(section)), _e3m0),
    "topk": CodecKind(_topk_format, _topk),
}


def register_codec(kind: str, entry: CodecKind) -> None:
    """Add a kind of codec from outside of this package.

    Call it when the module of the codec is imported, on every rank, before the config is planned or
    the optimizer is built.

    Args:
        kind: ``kind`` of the config section that describes the codec.
        entry: Format and implementation.

    Raises:
        ValueError: There is a codec of this kind.
    """
    if kind in _CODECS:
        raise ValueError(f"a codec of kind {kind!r} exists; choose another name")
    _CODECS[kind] = entry


def main_format(compression: LossyCompression) -> Format:
    """Return the format of all parameters that are not exceptions."""
    return _entry(compression).format(compression, None)


def format_of(compression: LossyCompression, kind: ParamKind | None) -> Format:
    """Return the format of parameters of a kind; the same on every rank."""
    exception = None
    if kind in ("norm", "embedding", "output"):
        exception = getattr(compression.exceptions, kind)
    if exception == "none":
        return RawFormat()
    return _entry(compression).format(compression, exception)


def codec_lookup(
    compression: LossyCompression, kinds: Mapping[str, ParamKind | None]
) -> Callable[[str], "Codec"]:
    """Return the function from a parameter's name to its codec.

    Args:
        compression: Section of the config.
        kinds: Kind of each parameter, by name.
    """
    from megatron_muloco.compress.codec import Uncoded

    build = cache(_entry(compression).codec)  # parameters of one format share a codec

    def codec_of(name: str) -> "Codec":
        payload_format = format_of(compression, kinds[name])
        return Uncoded() if isinstance(payload_format, RawFormat) else build(payload_format)

    return cache(codec_of)


def _entry(compression: LossyCompression) -> CodecKind:
    if compression.kind not in _CODECS:
        raise ValueError(
            f"there is no codec of kind {compression.kind!r}; known are {', '.join(_CODECS)}. "
            "Import the module that registers it on every rank."
        )
    return _CODECS[compression.kind]
