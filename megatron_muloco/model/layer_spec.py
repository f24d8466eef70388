"""The decoder layer as a Megatron layer specification, with the norms that Megatron lacks.

A layer adds the output of two branches to the residual stream x::

    x += post_norm(linear_proj(attention(rope(qk_norm(linear_qkv(input_layernorm(x)))))))
    x += post_norm(linear_fc2(swiglu(linear_fc1(pre_mlp_layernorm(x)))))

Without ``post_layernorm`` and ``qk_layernorm`` this is a standard Llama layer. Linear layers and
norms are Megatron's and this module's own, or Transformer Engine's; names, shapes and division over
ranks of the parameters are the same.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from typing_extensions import override

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.model.attention import AttentionBackend, CoreAttention, DenseAttention

__all__ = [
    "LOCAL_PARTS",
    "LayerParts",
    "PostNormRowParallelLinear",
    "QKRMSNorm",
    "RMSNorm",
    "decoder_block_spec",
    "transformer_engine_parts",
]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, for every norm of the model.

    Megatron's torch fallback refuses sequence parallelism. This module marks its weight instead,
    and Megatron sums the weight's gradient over tensor-parallel ranks.

    Dtypes: the mean square and the division are computed in fp32 whatever the input is; the result
    has the input's dtype.
    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Without sequence parallelism every tensor-parallel rank normalises the same values and
        # gets the same gradient. With it, each rank sees its slice of the sequence only, and
        # Megatron sums the gradients of weights that carry this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class QKRMSNorm(RMSNorm):
    """RMSNorm over one attention head, for queries and keys.

    Each tensor-parallel rank normalises its own heads over the full sequence, so its weight
    gradient is a partial sum. Megatron 0.16 finds these weights by their names, ``q_layernorm`` and
    ``k_layernorm``, and sums their gradients over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        # The mark means "saw a slice of the sequence", which this weight did not; see above.
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]


class PostNormRowParallelLinear(RowParallelLinear):
    """A row-parallel linear layer whose output is normalised before the residual is added.

    The norm follows the reduction over tensor-parallel ranks, so it sees complete sums. Inside the
    linear layer it needs neither another transformer layer class nor another residual path.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    @override
    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the normalised product and no bias."""
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


@dataclass(frozen=True)
class LayerParts:
    """The classes that a decoder layer is built of; their constructors take Megatron's arguments.

    Attributes:
        column_linear: Linear layer that is divided along its outputs.
        row_linear: Linear layer that is divided along its inputs.
        post_norm_row_linear: The same with a norm of the sum over tensor-parallel ranks.
        norm: Norm over the hidden size. Queries and keys have `QKRMSNorm` always.
    """

    column_linear: type[Any]
    row_linear: type[Any]
    post_norm_row_linear: type[Any]
    norm: type[Any]


LOCAL_PARTS = LayerParts(
    ColumnParallelLinear, RowParallelLinear, PostNormRowParallelLinear, RMSNorm
)


def transformer_engine_parts() -> LayerParts:
    """Return Transformer Engine's linear layers and norm, as Megatron wraps them.

    Norm and linear layer stay separate modules: in the fused one the norm's weight has another
    name, and checkpoints would fit one implementation only. (It has not been run with Transformer
    Engine yet.)

    Raises:
        RuntimeMismatch: Transformer Engine cannot be imported.
    """
    from megatron.core.extensions import transformer_engine as engine

    if not engine.HAVE_TE:
        raise RuntimeMismatch(
            "model.transformer_impl is transformer_engine, but Transformer Engine cannot be "
            "imported. Install it, or use model.transformer_impl: local."
        )

    class PostNormTERowParallelLinear(engine.TERowParallelLinear):
        """As `PostNormRowParallelLinear`."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_norm = engine.TENorm(config, output_size, config.layernorm_epsilon)

        @override
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return self.post_norm(output), bias

    return LayerParts(
        engine.TEColumnParallelLinear,
        engine.TERowParallelLinear,
        PostNormTERowParallelLinear,
        engine.TENorm,
    )


def decoder_block_spec(
    num_layers: int,
    *,
    qk_layernorm: bool,
    post_layernorm: bool,
    attention_backend: AttentionBackend | None = None,
    parts: LayerParts = LOCAL_PARTS,
) -> TransformerBlockSubmodules:
    """Return the specification of one pipeline stage's decoder layers.

    Args:
        num_layers: Layers of this stage.
        qk_layernorm: Normalise queries and keys per head, before the rotary embedding.
        post_layernorm: Normalise the branch outputs before the residual is added.
        attention_backend: Backend of attention; by default `DenseAttention`, whose layers take
            Megatron's boolean attention mask.
        parts: Linear layers and norms.
    """
    backend = attention_backend or DenseAttention()
    qk_norm = QKRMSNorm if qk_layernorm else None
    row_linear = parts.post_norm_row_linear if post_layernorm else parts.row_linear
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts.column_linear,
            core_attention=partial(CoreAttention, backend=backend),
            linear_proj=row_linear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=parts.column_linear, linear_fc2=row_linear),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=parts.norm)
