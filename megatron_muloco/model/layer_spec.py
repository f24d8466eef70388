"""The decoder layer, as a Megatron layer specification.

::

    x -- input_layernorm -- linear_qkv -- (q, k norm) -- rope -- attention -- linear_proj --
    post_norm -- + --
    |____________________________________________________________________________________________________|

and the same around the SwiGLU MLP, whose post-norm sits behind ``linear_fc2``. Without
``post_layernorm`` this is a standard Llama layer.
"""

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from typing_extensions import override

from megatron_muloco.model.attention import SDPACoreAttention
from megatron_muloco.model.norm import QKRMSNorm, RMSNorm

__all__ = ["PostNormRowParallelLinear", "decoder_block_spec"]


class PostNormRowParallelLinear(RowParallelLinear):
    """A row-parallel linear layer whose output is normalised before the residual is added.

    The norm follows the reduction over tensor-parallel ranks, so it sees complete sums. Living
    inside the layer, it needs neither a new transformer layer nor a new residual path.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    @override
    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the normalised product and no bias."""
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


def decoder_block_spec(
    num_layers: int, *, qk_layernorm: bool, post_layernorm: bool
) -> TransformerBlockSubmodules:
    """Return the specification of one pipeline stage's decoder layers.

    Args:
        num_layers: Layers of this stage.
        qk_layernorm: Normalise queries and keys per head, before the rotary embedding.
        post_layernorm: Normalise the branch outputs before the residual is added.
    """
    qk_norm = QKRMSNorm if qk_layernorm else None
    row_linear = PostNormRowParallelLinear if post_layernorm else RowParallelLinear
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=row_linear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=row_linear),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
