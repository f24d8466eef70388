"""A codec from outside of the package: the sign of every value, and a scale for each block.

All that a program of its own needs to compress pseudogradients in its own way: a section, a codec,
and one entry in the table of codecs.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from megatron_muloco.compress.codec import GroupedCodec
from megatron_muloco.compress.codecs import CodecKind, register_codec
from megatron_muloco.compress.format import GroupedFormat, Grouping
from megatron_muloco.config.outer import LossyCompression

__all__ = ["Sign", "SignCompression"]


class SignCompression(LossyCompression):
    """One bit per value: its sign, times the mean magnitude of its block."""

    kind: Literal["sign"] = "sign"
    block_size: int = Field(256, ge=2, description="Values that share a scale.")

    @property
    @override
    def short_name(self) -> str:
        return "sign, 1 bit"

    @override
    def describe(self) -> str:
        return f"a scale per block of {self.block_size}"


class Sign(GroupedCodec):
    """Signs, scaled by the mean magnitude (EF-signSGD, Karimireddy et al. 2019, 1901.09847)."""

    @override
    def _encode_groups(self, values: Tensor, codes: Tensor) -> Tensor:
        codes.copy_(values > 0)
        return values.abs().mean(1, keepdim=True)

    @override
    def _levels(self, heads: Tensor) -> Tensor:
        return torch.cat([-heads, heads], dim=1)


def sign_format(section: SignCompression, bits: int | None) -> GroupedFormat:
    """Return one bit per value and one fp32 number per block."""
    return GroupedFormat(bits=1, head_width=1, grouping=Grouping("block", section.block_size))


register_codec("sign", CodecKind(format=sign_format, codec=Sign))
