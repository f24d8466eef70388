"""Which code each parameter travels in, from the config. No torch: plans and runs both ask."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_muloco.compress.sizes import GroupedSize, PayloadSize, RawSize, TopKSize
from megatron_muloco.compress.units import Grouping
from megatron_muloco.config.compression import (
    CodeConfig,
    ExceptionsConfig,
    TopKCompression,
)

__all__ = ["CodeSpec", "ParameterClass", "parameter_class", "payload_size", "spec_of"]

ParameterClass = Literal["norm", "embedding", "output", "matrix"]

# fp32 numbers in the head of a group: what a decoder needs beside the codes.
_HEAD_WIDTH: dict[str, Callable[[int], int]] = {
    "linear": lambda bits: 2,
    "statistical": lambda bits: 1 << bits,
    "e3m0": lambda bits: 1,
}
_VALUE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class CodeSpec:
    """The code of one parameter.

    Attributes:
        kind: ``raw`` is fp32 as it is.
        bits: Of a value; for ``topk`` of a value sent, ``None`` where those travel as they are.
        grouping: What shares a scale, or competes for being sent.
        density: Share of the values that is sent; ``topk`` only.
        wire_dtype: Of values that are sent as they are; ``topk`` only.
    """

    kind: Literal["raw", "linear", "statistical", "e3m0", "topk"]
    bits: int | None = None
    grouping: Grouping = field(default_factory=Grouping)
    density: float = 1.0
    wire_dtype: Literal["fp32", "bf16"] = "fp32"


def parameter_class(name: str) -> ParameterClass:
    """Return what a parameter is, from its model-wide name."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("output_layer."):
        return "output"
    return "norm" if "norm" in name else "matrix"


def spec_of(code: CodeConfig, name: str) -> CodeSpec:
    """Return the code of a parameter; the same on every rank."""
    exception = _exception(code.exceptions, parameter_class(name))
    if exception == "none":
        return CodeSpec("raw")
    if isinstance(code, TopKCompression):
        grouping = Grouping("block", code.block_size)
        return CodeSpec("topk", code.value_bits, grouping, code.density, code.wire_dtype)
    grouping = Grouping(code.granularity, code.values_per_block)
    return CodeSpec(code.kind, exception or code.bits, grouping)


def payload_size(spec: CodeSpec) -> PayloadSize:
    """Return what knows the bytes of a unit in this code."""
    if spec.kind == "raw":
        return RawSize()
    if spec.kind == "topk":
        return TopKSize(spec.density, _VALUE_BYTES[spec.wire_dtype], spec.grouping, spec.bits)
    assert spec.bits is not None
    return GroupedSize(spec.bits, _HEAD_WIDTH[spec.kind](spec.bits), spec.grouping)


def _exception(
    exceptions: ExceptionsConfig, of: ParameterClass
) -> Literal[8, 4, 2, 1, "none"] | None:
    return None if of == "matrix" else getattr(exceptions, of)
