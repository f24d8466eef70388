"""Attention, masks and norms of the model, each against its formula."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_muloco.data.batches import document_ids
from megatron_muloco.model.attention import (
    CoreAttention,
    DenseAttention,
    SequenceSlice,
    document_mask,
)
from megatron_muloco.model.initialise import has_poison, poison
from megatron_muloco.model.layer_spec import QKRMSNorm, RMSNorm

END = 9


def attention(heads: int, groups: int, width: int = 8) -> CoreAttention:
    """Return core attention of one rank that holds all heads."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=width,
        attention_dropout=0.0,
    )
    return CoreAttention(config, 1, AttnMaskType.causal, "self", backend=DenseAttention())


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(d)) v in float64, by heads; True in ``hidden`` is not seen."""
    sequence, batch, heads, width = query.shape
    share = heads // key.shape[2]
    out = torch.empty(sequence, batch, heads, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[:, b, h], key[:, b, h // share], value[:, b, h // share]
            scores = (q.double() @ k.double().T / width**0.5).masked_fill(hidden[b], float("-inf"))
            out[:, b, h] = scores.softmax(-1) @ v.double()
    return out.reshape(sequence, batch, -1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_attention_is_the_formula(heads: int, groups: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(6, 2, heads, 8, generator=generator)
    key, value = (torch.randn(6, 2, groups, 8, generator=generator) for _ in range(2))
    tokens = torch.tensor([[1, END, 2, 3, END, 4], [5, 6, 7, 8, 1, 2]])
    later = torch.ones(6, 6, dtype=torch.bool).triu(1).expand(2, 6, 6)
    mask = document_mask(document_ids(tokens, END)) if masked else None
    hidden = mask[:, 0] if mask is not None else later
    out = attention(heads, groups)(query, key, value, mask)
    # Dot products of 8 and sums of 6 terms of size about 1 in fp32: a few dozen roundings of 2^-24.
    torch.testing.assert_close(
        out.double(), plain_attention(query, key, value, hidden), rtol=0, atol=64 * 2.0**-24
    )


def test_a_position_sees_the_earlier_ones_of_its_document() -> None:
    tokens = torch.tensor([[1, END, 2, 3]])
    seen = ~document_mask(document_ids(tokens, END))[0, 0]
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_slices_of_a_sequence_partition_positions_and_mask(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, END + 1, (2, 12), generator=generator)
    documents = document_ids(tokens, END)
    whole = document_mask(documents)
    causal = document_mask(torch.zeros(1, 12))
    slices = [SequenceSlice(12, rank=rank, size=size) for rank in range(size)]
    gathered = torch.cat([each.positions for each in slices])
    assert gathered.sort().values.tolist() == list(range(12))
    for rank, each in enumerate(slices):
        assert torch.equal(each.gathered, gathered)
        assert torch.equal(each.take({"tokens": tokens})["tokens"], tokens[:, each.positions])
        for mask, expected in ((each.mask(documents), whole), (each.mask(None), causal)):
            assert torch.equal(mask, expected[:, :, each.positions][..., gathered])
        # all ranks see the same number of keys: an early chunk and a late one
        assert int((~each.mask(None)).sum()) == 78 // size, rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_norm_divides_by_the_root_mean_square_in_fp32(dtype: torch.dtype) -> None:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, 64, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 64))
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    # One rounding to the dtype at the end, and one of the product with the weight before it.
    tolerance = 2.0**-22 if dtype is torch.float32 else 2.0**-7
    torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)
    assert norm(x).dtype is dtype


def test_only_norms_of_whole_tokens_follow_the_sequence() -> None:
    """Megatron sums gradients of marked weights over tensor ranks; q and k norms by their name."""
    config: Any = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    assert RMSNorm(config, 8, 1e-6).weight.sequence_parallel is True
    assert QKRMSNorm(config, 8, 1e-6).weight.sequence_parallel is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poison_is_a_nan_that_no_arithmetic_makes(dtype: torch.dtype) -> None:
    poisoned = poison(torch.zeros(3, dtype=dtype))
    assert poisoned.isnan().all()
    assert has_poison(poisoned.float()), "a master is made of a bf16 parameter"
    filled = torch.ones(3, dtype=dtype)
    assert not has_poison(filled)
    filled[2] = poisoned[0]
    assert has_poison(filled)
    zero, infinite = torch.zeros(3, dtype=dtype), torch.full((3,), torch.inf, dtype=dtype)
    for made in (
        zero / zero,
        infinite - infinite,
        zero * infinite,
        torch.full_like(zero, torch.nan),
    ):
        assert made.isnan().all()
        assert not has_poison(made)
