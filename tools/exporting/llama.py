"""``LlamaForCausalLM`` and ``Qwen3ForCausalLM``: decoders without norms after the branches.

Both are ours bit for bit where ``model.post_layernorm`` is false; Qwen3 is Llama with norms of
queries and keys.

Source: transformers 5.24, ``models/llama`` and ``models/qwen3``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from tools.exporting.family import Names, Role, expect, model_fields

__all__ = ["Llama", "Qwen3"]


class Llama:
    """See `Family`."""

    key = "llama"
    model_class = "LlamaForCausalLM"
    model_type = "llama"
    names = Names(mlp_norm="post_attention_layernorm")
    _normalises_queries = False

    def unsupported(self, model: ModelConfig) -> list[str]:
        """See `Family.unsupported`."""
        problems = []
        if model.post_layernorm:
            problems.append(
                "model.post_layernorm is true, and the class has no norm after attention and MLP"
            )
        if model.qk_layernorm != self._normalises_queries:
            always = "always normalises" if self._normalises_queries else "does not normalise"
            problems.append(
                f"model.qk_layernorm is {str(model.qk_layernorm).lower()}, and the class {always} "
                "queries and keys"
            )
        if not self._normalises_queries and model.hidden_size % model.num_attention_heads:
            problems.append(
                f"model.hidden_size {model.hidden_size} is no multiple of the "
                f"{model.num_attention_heads} heads, which the class's config demands"
            )
        return problems

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """See `Family.config`."""
        own = (
            {"use_sliding_window": False, "layer_types": ["full_attention"] * model.num_layers}
            if self._normalises_queries
            else {"mlp_bias": False}
        )
        return {
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
            "rope_theta": model.rotary_base,  # its name before transformers 5
            **own,
        }

    def model(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family.model`."""
        layers = ["full_attention"] * int(config.get("num_hidden_layers", 0))
        expect(config, {"hidden_act": "silu"}, "Our MLP is SwiGLU.")
        expect(
            config,
            {"attention_bias": False, "mlp_bias": False},
            "Our linear layers have no bias.",
        )
        if config.get("layer_types") is not None:
            expect(config, {"layer_types": layers}, "Our layers all have full attention.")
        expect(config, {"use_sliding_window": False}, "Our layers all have full attention.")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        base = rope.get("rope_theta", config.get("rope_theta"))
        if base is None or rope.get("rope_type", "default") != "default":
            raise ConfigError(
                f"config.json: rotary embedding {rope or 'without rope_theta'}, which is not the "
                "plain one of our decoder."
            )
        fields = model_fields(config, rotary_base=float(base), epsilon="rms_norm_eps")
        own = {"qk_layernorm": self._normalises_queries, "post_layernorm": False}
        return {**fields, **own, "init": "megatron"}  # "muloco" has no scale for tied ones

    def encode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.encode`."""
        return values

    def decode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.decode`."""
        return values


class Qwen3(Llama):
    """See `Family`."""

    key = "qwen3"
    model_class = "Qwen3ForCausalLM"
    model_type = "qwen3"
    _normalises_queries = True
