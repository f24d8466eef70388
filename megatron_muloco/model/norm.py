"""RMSNorm for every normalisation of the model, aware of sequence parallelism.

Megatron's torch fallback refuses sequence parallelism; this module only needs to mark its weight,
and Megatron then sums the weight's gradient over tensor-parallel ranks.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["QKRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension.

    Dtypes: the mean square and the division are computed in fp32 whatever the input is; the result
    has the input's dtype.
    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Without sequence parallelism every tensor-parallel rank normalises the same values and
        # gets the same gradient; with it each sees its slice of the sequence and Megatron adds them
        # up.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class QKRMSNorm(RMSNorm):
    """The same over one attention head, for queries and keys.

    Each tensor-parallel rank normalises its own heads over the full sequence, so its weight
    gradient is a partial sum. Megatron 0.16 finds these weights by their names, ``q_layernorm`` and
    ``k_layernorm``, and sums them over tensor-parallel ranks; the mark would be read as something
    else.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
