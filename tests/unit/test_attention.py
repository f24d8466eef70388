"""Attention backends against the dense mask, and which one a run takes."""

import importlib.util
from typing import Any

import pytest
import torch

from megatron_muloco.data.batches import document_ids
from megatron_muloco.errors import ConfigError
from megatron_muloco.model import attention_backends
from megatron_muloco.model.attention import (
    AttentionBackend,
    DenseAttention,
    DocumentLoop,
    document_boundaries,
    document_mask,
)
from megatron_muloco.model.attention_backends import (
    ChosenAttention,
    FlexAttention,
    VarlenKernel,
    choose_attention,
    document_blocks,
    kernel_under_a_mask,
)
from tests.support.tiny_models import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDTH = 16
# Two orders of sums of at most 96 values: sqrt(96) = 10 roundings of 2^-24, 6e-7 of the norm.
RELATIVE = 1e-6


def random_documents(batch: int, length: int, seed: int) -> torch.Tensor:
    """Return document ids [b, s] with a boundary after about every eighth token."""
    generator = torch.Generator().manual_seed(seed)
    return document_ids(torch.randint(0, 8, (batch, length), generator=generator), eod=0)


def random_heads(
    batch: int, length: int, heads: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = (
        torch.randn(length, batch, count, WIDTH, generator=generator)
        for count in (heads, groups, groups)
    )
    return query, key, value


def results(
    backend: AttentionBackend, ids: torch.Tensor | None, heads: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Return the output and the gradients of query, key and value."""
    documents = None if ids is None else backend.documents(ids, CPU)
    query, key, value = (each.detach().requires_grad_() for each in heads)
    out = backend.attend(query, key, value, documents, scale=WIDTH**-0.5)
    out.backward(torch.linspace(-1.0, 1.0, out.numel()).view(out.shape))
    gradients = (each.grad for each in (query, key, value))
    return [out.detach(), *(each for each in gradients if each is not None)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for name, one, two in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert one.shape == two.shape
        assert (one - two).norm() <= RELATIVE * two.norm(), name


@pytest.mark.parametrize("groups", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_loop_over_documents_is_the_dense_mask(groups: int, batch: int, seed: int) -> None:
    ids = random_documents(batch, 96, seed)
    heads = random_heads(batch, 96, 4, groups)
    assert_close(results(DocumentLoop(), ids, heads), results(DenseAttention(), ids, heads))


@pytest.mark.parametrize("backend", [DocumentLoop(), FlexAttention(compiled=False)])
def test_without_documents_all_backends_are_causal_attention(backend: AttentionBackend) -> None:
    heads = random_heads(2, 32, 4, 2)
    for one, two in zip(
        results(backend, None, heads), results(DenseAttention(), None, heads), strict=True
    ):
        assert torch.equal(one, two)


def test_boundaries_begin_with_each_document_and_each_sequence() -> None:
    tokens = torch.tensor([[1, 9, 2, 3], [4, 5, 6, 7], [9, 9, 1, 9]])
    boundaries = document_boundaries(document_ids(tokens, eod=9))
    assert boundaries.tolist() == [0, 2, 4, 8, 9, 10, 12]
    assert boundaries.dtype is torch.int32


# ---- backends for accelerators, as far as a CPU can show -----------------------------------------


def test_the_kernel_gets_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    said: dict[str, Any] = {}

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: torch.Tensor,
        places_k: torch.Tensor,
        longest: int,
        longest_k: int,
        *,
        scale: float,
        **options: Any,
    ) -> torch.Tensor:
        said.update(options, longest=(longest, longest_k), dtype=places.dtype)
        assert places is places_k
        return DocumentLoop().attend_packed(query, key, value, places, scale=scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    ids, heads = random_documents(2, 96, 1), random_heads(2, 96, 4, 2)
    assert_close(results(VarlenKernel(), ids, heads), results(DocumentLoop(), ids, heads))
    longest = int(document_boundaries(ids).diff().max())
    assert said == {
        "window_size": (-1, 0),
        "enable_gqa": True,
        "longest": (longest, longest),
        "dtype": torch.int32,
    }


@pytest.mark.parametrize("length", [128, 300, 512])
def test_blocks_are_those_of_the_dense_mask(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    ends = torch.rand(3, length, generator=generator) < 4 / length
    ids = document_ids(ends.int(), eod=1)
    blocks = document_blocks(ids.int())
    seen = ~document_mask(ids)
    size = -(-length // 128)
    expected = torch.zeros(3, 1, size, size, dtype=torch.bool)
    whole = torch.zeros_like(expected)
    for row in range(size):
        for column in range(size):
            pairs = seen[..., row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            expected[..., row, column] = pairs.flatten(-2).any(-1)
            whole[..., row, column] = pairs.flatten(-2).all(-1) & (column < row)
    assert torch.equal(blocks.to_dense().bool(), expected)
    assert blocks.full_kv_num_blocks is not None
    assert torch.equal(blocks.full_kv_num_blocks.long(), whole.sum(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_the_dense_mask_shows() -> None:
    ids, heads = random_documents(2, 130, 1), random_heads(2, 130, 4, 2)
    outs = [
        backend.attend(*heads, backend.documents(ids, CPU), scale=WIDTH**-0.5)
        for backend in (FlexAttention(compiled=False), DenseAttention())
    ]
    assert (outs[0] - outs[1]).norm() <= RELATIVE * outs[1].norm()


# ---- the choice ----------------------------------------------------------------------------------


def chosen(
    device: torch.device, *, masks: bool = True, precision: str = "bf16", **model: Any
) -> ChosenAttention:
    config = tiny_config(
        model=model,
        data={"mask_document_boundaries": masks},
        training={"precision": precision},
    )
    return choose_attention(config, device)


@pytest.mark.parametrize(
    ("length", "masks", "backend"),
    [(1023, True, DenseAttention), (1024, True, DocumentLoop), (1024, False, DenseAttention)],
)
def test_a_cpu_takes_the_loop_from_1024_tokens_with_documents(
    length: int, masks: bool, backend: type
) -> None:
    assert type(chosen(CPU, masks=masks, seq_length=length).backend) is backend


def _modern_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_cuda_takes_the_packed_kernel_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    _modern_card(monkeypatch)
    pytest.importorskip("torch.nn.attention.varlen")
    assert type(chosen(CUDA).backend) is VarlenKernel
    assert type(chosen(CUDA, masks=False).backend) is DenseAttention


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"precision": "fp32"}, "varlen_attn has no fp32"),
        ({"kv_channels": 512}, "heads of at most 256 channels"),
    ],
)
def test_cuda_without_the_kernel_says_why(
    change: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _modern_card(monkeypatch)
    monkeypatch.setattr(attention_backends, "kernel_under_a_mask", lambda *_: "MATH")
    for wanted, backend in (("auto", DenseAttention), ("varlen", DocumentLoop)):
        choice = chosen(CUDA, **change, attention_impl=wanted)
        assert type(choice.backend) is backend
        assert why in choice.reason


def test_the_kernel_that_torch_takes_is_found() -> None:
    model = tiny_config().model
    assert kernel_under_a_mask(model, CPU, torch.float32) == "FLASH_ATTENTION"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kernel_under_a_mask(model, CPU, torch.float32) == "MATH"


@pytest.mark.parametrize("wanted", ["auto", "dense"])
@pytest.mark.parametrize("kernel", ["MATH", "EFFICIENT_ATTENTION"])
def test_a_slow_kernel_on_cuda_is_a_warning(
    wanted: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_backends, "kernel_under_a_mask", lambda *_: kernel)
    reason = chosen(CUDA, precision="fp32", attention_impl=wanted).reason
    assert f"torch's kernel under the mask is {kernel}" in reason
    assert ("WARNING" in reason) == (kernel == "MATH")


@pytest.mark.parametrize("wanted", ["flex", "te"])
def test_what_cannot_run_is_refused(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"model.attention_impl: {wanted}, but .*\n.*Use auto"):
        chosen(CPU, attention_impl=wanted)
