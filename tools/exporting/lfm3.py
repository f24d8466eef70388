"""``Lfm3ForCausalLM``: the same computation as ours, so its weights are ours bit for bit.

With sandwich norms, all layers of full attention and no attention gate, the class has the norms,
the rotary embedding (in fp32) and the SwiGLU of our decoder, under other names.

Source: transformers 5.24, ``models/lfm3``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from tools.exporting.family import Names, Role, expect, model_fields

__all__ = ["Lfm3"]


class Lfm3:
    """See `Family`."""

    key = "lfm3"
    model_class = "Lfm3ForCausalLM"
    model_type = "lfm3"
    names = Names(
        input_norm="operator_norm",
        post_attention_norm="post_operator_norm",
        mlp_norm="ffn_norm",
        post_mlp_norm="post_ffn_norm",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        final_norm="model.embedding_norm",
    )

    def unsupported(self, model: ModelConfig) -> list[str]:
        """See `Family.unsupported`."""
        if not model.qk_layernorm:
            return ["model.qk_layernorm is false, and the class always normalises queries and keys"]
        return []

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """See `Family.config`."""
        return {
            "norm_eps": model.norm_epsilon,
            "use_sandwich_norm": model.post_layernorm,
            "use_attention_gate": False,
            "conv_bias": False,
            "layer_types": ["full_attention"] * model.num_layers,
            "sliding_window": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": model.rotary_base}
            },
        }

    def model(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family.model`."""
        why = "Our decoder has layers of full attention without a gate only."
        layers = ["full_attention"] * int(config.get("num_hidden_layers", 0))
        # The class's defaults are a gate and mixed layers, so a missing key differs too.
        full = {"layer_types": None, "use_attention_gate": True, "rope_parameters": {}, **config}
        expect(full, {"layer_types": layers, "use_attention_gate": False}, why)
        expect(full, {"attention_bias": False}, "Our linear layers have no bias.")
        rope = full["rope_parameters"].get("full_attention", {})
        if "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_parameters {rope}, not plain rotary embedding.")
        fields = model_fields(full, rotary_base=float(rope["rope_theta"]), epsilon="norm_eps")
        sandwich = bool(config.get("use_sandwich_norm", True))
        return {**fields, "qk_layernorm": True, "post_layernorm": sandwich}

    def encode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.encode`."""
        return values

    def decode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """See `Family.decode`."""
        return values
