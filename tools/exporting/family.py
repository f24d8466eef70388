"""`Family`: how a model class of the transformers library stores a decoder of this package.

A family has three parts: which architectures it can express, its config.json, and its weights. The
weights of all families are cut alike: query, key and value are separate matrices there and fused
group by group here, gate and up are separate there and stacked here. A family names the pieces, and
may store other values (`Family.encode`) that its own forward pass turns back into ours.

A family is in one module with what its class computes; `FAMILIES` in `hugging_face` lists them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_muloco.config.derived import padded_vocab_size
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.params import GPT_NAMES

__all__ = [
    "Family",
    "Names",
    "Role",
    "expect",
    "join",
    "model_fields",
    "pieces",
    "shared_config",
    "split",
]

Role = Literal["embedding", "output", "norm", "final_norm", "matrix"]
"""What a stored tensor is, as far as a family may store it in its own way."""

_FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Names:
    """Names of a family's tensors; those of a layer are relative to ``model.layers.N``.

    A norm that the architecture does not have is never asked for.
    """

    input_norm: str = "input_layernorm"
    post_attention_norm: str = "post_attention_layernorm"
    mlp_norm: str = "pre_feedforward_layernorm"
    post_mlp_norm: str = "post_feedforward_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    projection: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    output: str = "lm_head"

    def of(self, name: str) -> tuple[str, ...]:
        """Return the names of the pieces of a parameter of ours."""
        whole = {
            GPT_NAMES.embedding: self.embedding,
            _FINAL_NORM: self.final_norm,
            GPT_NAMES.output: self.output,
        }
        if name in whole:
            return (f"{whole[name]}.weight",)
        place = GPT_NAMES.layer_of(name)
        assert place is not None, name
        inside = {
            "input_layernorm": (self.input_norm,),
            "self_attention.linear_qkv": (self.query, self.key, self.value),
            "self_attention.q_layernorm": (self.query_norm,),
            "self_attention.k_layernorm": (self.key_norm,),
            "self_attention.linear_proj": (self.projection,),
            "self_attention.linear_proj.post_norm": (self.post_attention_norm,),
            "pre_mlp_layernorm": (self.mlp_norm,),
            "mlp.linear_fc1": (self.gate, self.up),
            "mlp.linear_fc2": (self.down,),
            "mlp.linear_fc2.post_norm": (self.post_mlp_norm,),
        }[place[1].removesuffix(".weight")]
        return tuple(f"model.layers.{place[0]}.{piece}.weight" for piece in inside)


class Family(Protocol):
    """One model class of the transformers library.

    Attributes:
        key: Value of ``--target``.
        model_class: Name of the class.
        model_type: The config.json's ``model_type``.
        names: Names of its tensors.
    """

    key: str
    model_class: str
    model_type: str
    names: Names

    def unsupported(self, model: ModelConfig) -> list[str]:
        """Return what the class cannot express of an architecture, each with the reason."""

    def config(self, model: ModelConfig) -> dict[str, Any]:
        """Return the class's own keys of config.json."""

    def model(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the section ``model`` that a config.json of this class describes.

        Raises:
            ConfigError: Our decoder cannot express it.
        """

    def encode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """Return what the class stores for values of ours, computed in fp64."""

    def decode(self, role: Role, values: Tensor, model: ModelConfig, dtype: torch.dtype) -> Tensor:
        """Return our values of what the class stores; the inverse of `encode` up to rounding."""


# ---- weights -----------------------------------------------------------------------------------


def _role(name: str) -> Role:
    if name == GPT_NAMES.embedding:
        return "embedding"
    if name == GPT_NAMES.output:
        return "output"
    if name == _FINAL_NORM:
        return "final_norm"
    return "norm" if GPT_NAMES.kind_of(name) == "norm" else "matrix"


def pieces(
    family: Family, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]]]:
    """Yield each parameter of ours with name and shape of its pieces in the family."""
    width = model.kv_channels
    rows = {"self_attention.linear_qkv.weight": (
        model.num_attention_heads * width, model.query_groups * width, model.query_groups * width
    ), "mlp.linear_fc1.weight": (model.ffn_hidden_size,) * 2}  # fmt: skip
    for name, shape in shapes.items():
        place = GPT_NAMES.layer_of(name)
        cut = rows.get(place[1] if place else "", (shape[0],))
        found = [
            (piece, (count, *shape[1:]))
            for piece, count in zip(family.names.of(name), cut, strict=True)
        ]
        yield name, tuple(found)


def split(
    family: Family, model: ModelConfig, name: str, values: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return the pieces of a parameter as the family stores them, before the cast to ``dtype``."""
    if name.endswith("linear_qkv.weight"):
        fused = values.view(model.query_groups, -1, model.kv_channels, values.size(-1))
        parts = fused.split([fused.size(1) - 2, 1, 1], dim=1)
        cut = [part.reshape(-1, values.size(-1)) for part in parts]
    elif name.endswith("linear_fc1.weight"):
        cut = list(values.chunk(2))
    else:
        cut = [values]
    return [family.encode(_role(name), part, model, dtype) for part in cut]


def join(
    family: Family, model: ModelConfig, name: str, parts: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Return our parameter of a family's pieces, in fp32; the inverse of `split`."""
    decoded = [family.decode(_role(name), part, model, dtype) for part in parts]
    if name.endswith("linear_qkv.weight"):
        groups, width, columns = model.query_groups, model.kv_channels, decoded[0].size(-1)
        blocks = [part.view(groups, -1, width, columns) for part in decoded]
        return torch.cat(blocks, dim=1).reshape(-1, columns)
    return torch.cat(decoded) if len(decoded) > 1 else decoded[0]


# ---- config.json -------------------------------------------------------------------------------


def shared_config(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keys of config.json that all families have."""
    name = str(dtype).removeprefix("torch.")
    return {
        # Padding of the vocabulary stays: its logits are part of every softmax of training.
        "vocab_size": padded_vocab_size(model),
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.seq_length,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "dtype": name,
        "torch_dtype": name,  # its name before transformers 5
    }


def expect(config: Mapping[str, Any], wanted: Mapping[str, Any], why: str) -> None:
    """Require values of a config.json; a missing key counts as the first wanted value's default.

    Raises:
        ConfigError: A value that our decoder cannot express.
    """
    wrong = [
        f"{key}: {config[key]!r}, not {value!r}"
        for key, value in wanted.items()
        if key in config and config[key] != value
    ]
    if wrong:
        raise ConfigError(f"config.json: {'; '.join(wrong)}. {why}")


def model_fields(config: Mapping[str, Any], *, rotary_base: float, epsilon: str) -> dict[str, Any]:
    """Return what all families say alike about a decoder; the norms are the family's part.

    Args:
        config: Contents of config.json.
        rotary_base: Base period of the rotary embedding.
        epsilon: Key of the norms' epsilon.

    Raises:
        ConfigError: A key is missing.
    """
    try:
        heads = int(config["num_attention_heads"])
        vocabulary = int(config["vocab_size"])
        return {
            "num_layers": int(config["num_hidden_layers"]),
            "hidden_size": int(config["hidden_size"]),
            "ffn_hidden_size": int(config["intermediate_size"]),
            "num_attention_heads": heads,
            "num_query_groups": int(config.get("num_key_value_heads") or heads),
            "kv_channels": int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            "seq_length": int(config["max_position_embeddings"]),
            "vocab_size": vocabulary,
            "make_vocab_size_divisible_by": math.gcd(vocabulary, 128),
            "rotary_base": rotary_base,
            "norm_epsilon": float(config[epsilon]),
            "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        }
    except KeyError as error:
        raise ConfigError(
            f"config.json has no {error.args[0]}, which its class needs. Write it as the class's "
            "config has it (save_pretrained of a loaded model does)."
        ) from error
