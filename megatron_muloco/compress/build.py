"""Codecs from the config."""

from collections.abc import Callable
from functools import cache

from megatron_muloco.compress.codec import Codec, Uncoded
from megatron_muloco.compress.float4 import E3M0
from megatron_muloco.compress.linear import Linear
from megatron_muloco.compress.spec import CodeSpec, spec_of
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.compress.topk import TopK
from megatron_muloco.config.compression import CodeConfig

__all__ = ["build_codec", "codec_chooser"]


def codec_chooser(code: CodeConfig) -> Callable[[str], Codec]:
    """Return the function from a parameter's name to its codec."""
    build = cache(build_codec)
    return cache(lambda name: build(spec_of(code, name)))


def build_codec(spec: CodeSpec) -> Codec:
    """Return the codec of a spec."""
    if spec.kind == "raw":
        return Uncoded()
    if spec.kind == "topk":
        return TopK(spec.density, spec.wire_dtype, spec.grouping.block_size, spec.bits)
    if spec.kind == "e3m0":
        return E3M0(spec.grouping)
    assert spec.bits is not None
    return (Linear if spec.kind == "linear" else Statistical)(spec.bits, spec.grouping)
