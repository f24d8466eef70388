"""`SDPACoreAttention`: causal attention with torch's fused kernels, on CPU and GPU."""

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from typing_extensions import override

__all__ = ["SDPACoreAttention", "document_mask"]


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the attention mask that keeps each position inside its own document.

    Args:
        document_ids: [b, s] integers that change where a new document begins.

    Returns:
        Boolean [b, 1, s, s] in Megatron's convention: True is masked out. A position sees itself
        and earlier positions of its own document.
    """
    same = document_ids.unsqueeze(1) == document_ids.unsqueeze(2)
    length = document_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ~(same & earlier).unsqueeze(1)


class SDPACoreAttention(MegatronModule):
    """Causal attention of this rank's heads.

    Replaces Megatron's ``DotProductAttention``, which materialises the score matrix; Megatron's
    fused alternatives need Transformer Engine.

    Shapes: s sequence, b micro-batch, n query heads and g key/value heads of this rank, d head
    dimension. Query [s, b, n, d], key and value [s, b, g, d], result [s, b, n*d].
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout or attention_dropout:
            raise ValueError("attention dropout is not implemented in SDPACoreAttention")
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the attention output.

        Args:
            query: ``[s, b, n, d]``.
            key: ``[s, b, g, d]``.
            value: ``[s, b, g, d]``.
            attention_mask: ``[b, 1, s, s]`` with True for hidden positions; ``None`` for plain
                causal attention, for which the kernels need no mask in memory.
            attn_mask_type: Ignored, as are the following; Megatron passes them.
            attention_bias: Ignored.
            packed_seq_params: Ignored.
        """
        sequence, batch, heads, _ = query.shape
        out = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != heads,
        )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
