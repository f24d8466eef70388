"""``Gemma3ForCausalLM``: our decoder up to one rounding of norms and embedding.

The class scales normalised values by 1 + w, so w - 1 is stored. It multiplies the embedding by the
square root of the hidden size, so the embedding is stored divided by it. Where the embedding is
also the output head, the final norm takes the factor back: its weight times the factor is stored.

The factor is the square root *in the dtype of the weights*: 68.0 instead of 67.88 for a hidden size
of 4,608 in bf16.

Source: transformers 5.24, ``models/gemma3``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from tools.exporting.family import Names, Role, expect, model_fields

__all__ = ["Gemma3", "embedding_scale"]


def embedding_scale(hidden_size: int, dtype: torch.dtype) -> float:
    """Return the factor of the embedding, in the dtype that the class gives it."""
    return float(torch.tensor(hidden_size**0.5).to(dtype))


class Gemma3:
    """See `Family`."""

    key = "gemma3"
    model_class = "Gemma3ForCausalLM"
    model_type = "gemma3_text"
    names = Names()

    def unsupported(self, model: ModelConfig) -> list[str]:
        """See `Family.unsupported`."""
        problems = []
        if not model.qk_layernorm:
            problems.append(
                "model.qk_layernorm is false, and the class always normalises queries and keys"
            )
        if not model.post_layernorm:
            problems.append(
                "model.post_layernorm is false, and the class always normalises the outputs of "
                "attention and MLP"
            )
        if model.hidden_size % model.num_attention_heads:
            problems.append(
                f"model.hidden_size {model.hidden_size} is no multiple of the "
                f"{model.num_attention_heads} heads, which the class's config demands"
            )
        return problems

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """See `Family.config`."""
        rope = {"rope_type": "default", "rope_theta": model.rotary_base}
        return {
            "hidden_activation": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "query_pre_attn_scalar": model.kv_channels,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "layer_types": ["full_attention"] * model.num_layers,
            "sliding_window": model.seq_length,  # no layer has one, but the class needs a number
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
            # Their names before transformers 5.
            "rope_theta": model.rotary_base,
            "rope_local_base_freq": model.rotary_base,
        }

    def model(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family.model`."""
        full = {
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": None,
            "query_pre_attn_scalar": 256,
            "head_dim": 256,
            "tie_word_embeddings": True,
            **config,
        }
        layers = ["full_attention"] * int(config.get("num_hidden_layers", 0))
        expect(full, {"hidden_activation": "silu"}, "Our MLP is SwiGLU.")
        expect(full, {"layer_types": layers}, "Our layers all have full attention.")
        expect(full, {"attention_bias": False}, "Our linear layers have no bias.")
        expect(
            full,
            {
                "query_pre_attn_scalar": full["head_dim"],
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
            "Our attention scales by the width of a head, is causal and caps no logits.",
        )
        rope = full.get("rope_parameters", {}).get("full_attention", {})
        base = rope.get("rope_theta", full.get("rope_theta"))
        if base is None or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_parameters {rope}, not plain rotary embedding.")
        fields = model_fields(full, rotary_base=float(base), epsilon="rms_norm_eps")
        return {**fields, "qk_layernorm": True, "post_layernorm": True}

    def encode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.encode`."""
        scale = embedding_scale(model.hidden_size, dtype)
        if role == "embedding":
            return (values.double() / scale).float()
        if role == "norm":
            return (values.double() - 1).float()
        if role == "final_norm":
            return (values.double() * _taken_back(model, scale) - 1).float()
        return values

    def decode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.decode`."""
        scale = embedding_scale(model.hidden_size, dtype)
        if role == "embedding":
            return (values.double() * scale).float()
        if role == "norm":
            return (values.double() + 1).float()
        if role == "final_norm":
            return ((values.double() + 1) / _taken_back(model, scale)).float()
        return values


def _taken_back(model: ModelConfig, scale: float) -> float:
    return 1.0 if model.untie_embeddings_and_output_weights else scale
