"""Packing loses nothing, uses each bit once, and takes exactly the bytes that it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.compress.codec import pack, unpack
from megatron_muloco.compress.format import packed_bytes
from tests.support.tensors import assert_equal

BITS = [*range(1, 17)]


def codes(count: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    return torch.randint(0, 1 << bits, (count,), generator=generator).to(dtype)


@given(count=st.integers(0, 70), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(count: int, bits: int, seed: int) -> None:
    values = codes(count, bits, seed)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits)
    assert_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_the_payload_belongs_to_one_value(bits: int) -> None:
    """One value of all ones at a time: the bytes sum to all ones, so no two share a bit."""
    total = torch.zeros(packed_bytes(8, bits), dtype=torch.int32)
    for index in range(8):
        single = torch.zeros_like(codes(8, bits, 0))
        single[index] = (1 << bits) - 1
        total += pack(single, bits)
    assert total.tolist() == [255] * bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_first_value_lies_in_the_lowest_bits(bits: int) -> None:
    assert pack(torch.tensor([1, 0, 0], dtype=torch.uint8), bits)[0] == 1
    assert pack(torch.tensor([0, 1, 0], dtype=torch.uint8), bits)[0] == 1 << bits


def test_packing_keeps_the_codes() -> None:
    values = codes(16, 8, 1)
    kept = values.clone()
    pack(values, 8).zero_()
    assert_equal(values, kept)
