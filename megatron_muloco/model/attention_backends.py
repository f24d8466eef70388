"""`choose_attention` chooses the attention backend of a run; here are those for accelerators.

- `VarlenKernel`: torch's ``varlen_attn``, flash attention over packed documents.
- `FlexAttention`: torch's ``flex_attention`` with a document mask by blocks.
- `TransformerEngineKernel`: the packed attention of Transformer Engine.

None of the three has been run on a GPU yet.
"""

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from typing_extensions import override

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import LOOP_FROM
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.attention import (
    AttentionBackend,
    DenseAttention,
    DocumentLoop,
    PackedAttention,
    causal_attention,
)

__all__ = [
    "ChosenAttention",
    "FlexAttention",
    "TransformerEngineKernel",
    "VarlenKernel",
    "choose_attention",
    "document_blocks",
    "kernel_under_a_mask",
]

_PROBED = (
    2048  # tokens with which torch is asked for its kernel; the answer does not depend on them
)
_BLOCK = 128  # flex_attention's own default
_WIDEST_HEAD = 256  # of torch's flash attention
_OLDEST_CARD = (8, 0)  # compute capability, likewise


# ---- the choice ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenAttention:
    """The attention backend of a run.

    Attributes:
        backend: The backend, for all layers.
        reason: Which one it is and why, for the first lines of the run.
    """

    backend: AttentionBackend
    reason: str


def choose_attention(config: RunConfig, device: torch.device) -> ChosenAttention:
    """Return the backend that ``model.attention_impl`` names, or chooses for this device.

    Raises:
        ConfigError: The configured backend does not run here.
    """
    wanted = config.model.attention_impl
    if config.parallel.context_parallel_size > 1:  # a rule refuses other backends by name
        return _dense(config, device, "as ranks share sequences (context parallelism)")
    if wanted == "auto":
        return _choose(config, device)
    if wanted == "dense":
        return _dense(config, device, "as configured")
    if wanted == "varlen":
        refusal = _why_no_varlen_kernel(config, device)
        if refusal:
            reason = f"varlen, as configured, by a loop over documents: {refusal}"
            return ChosenAttention(DocumentLoop(), reason)
        return ChosenAttention(VarlenKernel(), "varlen, as configured, by torch's varlen_attn")
    if wanted == "flex":
        if device.type != "cuda":
            raise _refused(config, "flex_attention has no backward pass without CUDA")
        return ChosenAttention(FlexAttention(compiled=True), "flex, as configured")
    if importlib.util.find_spec("transformer_engine") is None:
        raise _refused(config, "Transformer Engine is not installed")
    if device.type != "cuda" or config.training.precision != "bf16":
        raise _refused(config, "Transformer Engine needs CUDA and precision bf16 here")
    return ChosenAttention(TransformerEngineKernel(), "te, as configured")


def _choose(config: RunConfig, device: torch.device) -> ChosenAttention:
    """Return the choice of ``auto``."""
    length = config.model.seq_length
    if not config.data.mask_document_boundaries:
        return _dense(config, device, "documents are not masked")
    if device.type == "cuda":
        refusal = _why_no_varlen_kernel(config, device)
        if refusal:
            return _dense(config, device, refusal)
        return ChosenAttention(VarlenKernel(), "varlen, by torch's varlen_attn: CUDA and bf16")
    if length < LOOP_FROM:
        return _dense(config, device, f"sequences below {LOOP_FROM:,} tokens on a CPU")
    reason = f"varlen, by a loop over documents: sequences from {LOOP_FROM:,} tokens on a CPU"
    return ChosenAttention(DocumentLoop(), reason)


def _dense(config: RunConfig, device: torch.device, why: str) -> ChosenAttention:
    """Return the dense backend; its reason names torch's kernel on CUDA and warns of a slow one."""
    reason = f"dense, {why}"
    if config.data.mask_document_boundaries and device.type == "cuda":
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        kernel = kernel_under_a_mask(config.model, device, dtype)
        reason += f"; torch's kernel under the mask is {kernel}"
        if kernel == SDPBackend.MATH.name:
            reason += (
                ". WARNING: it is slow, and each layer keeps all scores, "
                f"{config.model.seq_length:,}^2 for every head and sequence. Use a newer torch, or "
                "model.attention_impl: varlen or flex"
            )
    return ChosenAttention(DenseAttention(), reason)


def kernel_under_a_mask(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the kernel that torch takes with a mask for the heads of this model.

    With grouped heads some versions of torch have no fused kernel for a mask, and take MATH.
    """
    length = min(model.seq_length, _PROBED)

    def heads(count: int) -> Tensor:
        shape = (1, count, length, model.kv_channels)
        return torch.empty(shape, device=device, dtype=dtype, requires_grad=True)

    choice = torch._fused_sdp_choice(
        heads(model.num_attention_heads),
        heads(model.query_groups),
        heads(model.query_groups),
        attn_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=device),
        enable_gqa=model.query_groups != model.num_attention_heads,
    )
    return str(SDPBackend(choice).name)


def _why_no_varlen_kernel(config: RunConfig, device: torch.device) -> str:
    """Return why torch's packed attention cannot be used, else ``""``."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if config.training.precision != "bf16":
        return f"varlen_attn has no {config.training.precision}"
    if config.model.kv_channels > _WIDEST_HEAD:
        return f"varlen_attn has heads of at most {_WIDEST_HEAD} channels"
    if torch.cuda.get_device_capability(device) < _OLDEST_CARD:
        return "varlen_attn needs compute capability 8.0"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    from torch.nn.attention.varlen import varlen_attn

    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"varlen_attn of torch {torch.__version__} has no window and no grouped heads"
    return ""


def _refused(config: RunConfig, why: str) -> ConfigError:
    text = f"{config.model.attention_impl}, but {why}.\nUse auto, dense or varlen."
    return ConfigError([Problem("model.attention_impl", text).format(config.where)])


# ---- packed kernels ------------------------------------------------------------------------------


class VarlenKernel(PackedAttention):
    """torch's ``varlen_attn``: flash attention that skips all pairs of different documents.

    Dtypes: bf16. Not run yet.
    """

    @override
    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, scale: float
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        longest = int(boundaries.diff().max())
        places = boundaries.to(query.device, non_blocking=True)
        out = varlen_attn(
            query,
            key,
            value,
            places,
            places,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # all earlier positions and no later one
            enable_gqa=key.shape[1] != query.shape[1],
        )
        assert isinstance(out, Tensor)
        return out


class TransformerEngineKernel(PackedAttention):
    """Transformer Engine's ``DotProductAttention`` on packed documents.

    Dtypes: bf16. Not run yet.
    """

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int, float], Any] = {}

    @override
    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, scale: float
    ) -> Tensor:
        te = importlib.import_module("transformer_engine.pytorch")
        shape = (query.shape[1], key.shape[1], query.shape[2], scale)
        if shape not in self._modules:
            self._modules[shape] = te.DotProductAttention(
                query.shape[1],
                query.shape[2],
                num_gqa_groups=key.shape[1],
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                softmax_scale=scale,
            )
        longest = int(boundaries.diff().max())
        places = boundaries.to(query.device, non_blocking=True)
        out: Tensor = self._modules[shape](
            query,
            key,
            value,
            cu_seqlens_q=places,
            cu_seqlens_kv=places,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return out.view(query.shape)


# ---- a mask by blocks ----------------------------------------------------------------------------


def document_blocks(document_ids: Tensor) -> BlockMask:
    """Return the blocks of the attention matrix that documents make visible, for flex_attention.

    Documents follow each other, so the first and the last one of each block tell which pairs of
    blocks see each other; no element of the s x s pairs is looked at.

    Args:
        document_ids: [b, s] integers that rise from document to document.
    """
    length = document_ids.shape[1]
    beyond = document_ids[:, -1:].expand(-1, -length % _BLOCK)
    padded = torch.cat([document_ids, beyond], dim=1)
    blocks = padded.unflatten(1, (-1, _BLOCK))
    first, last = blocks[..., 0], blocks[..., -1]
    count = first.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=padded.device).tril()
    visible = (last.unsqueeze(1) >= first.unsqueeze(2)) & earlier
    whole = (first.unsqueeze(1) == last.unsqueeze(2)) & earlier.tril(-1)

    def mask_mod(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (row >= column) & (padded[batch, row] == padded[batch, column])

    return BlockMask.from_kv_blocks(
        *_listed(visible & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return number and indices of the columns that are True, [b, 1, rows] and [.., columns]."""
    order = pairs.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return pairs.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


class FlexAttention:
    """torch's ``flex_attention``, which skips the blocks that no document makes visible.

    Args:
        compiled: Compile it. Without that it computes all scores, and is for tests alone.

    Compiled, it has not been run yet.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._attend: Any = torch.compile(flex_attention) if compiled else flex_attention

    def documents(self, document_ids: Tensor, device: torch.device) -> Tensor:
        """Return the document of each position, int32 [b, s]."""
        return document_ids.to(device, torch.int32)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, *, scale: float
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        if documents is None:
            return causal_attention(query, key, value, scale=scale)
        sequence, batch, heads, _ = query.shape
        out: Tensor = self._attend(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            block_mask=document_blocks(documents),
            scale=scale,
            enable_gqa=key.shape[2] != heads,
        )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
