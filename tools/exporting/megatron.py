"""A release checkpoint that Megatron's own GPT model loads.

Its layer specifications store the parameters of all layers as one tensor ``decoder.layers.*``, and
name the two norms before the branches after the linear layers that follow them, because
Transformer Engine fuses each pair. The local specification maps its names to the same keys. So one
checkpoint fits both.

They have no norm after a branch: a model with ``post_layernorm`` loads into a specification that
has one, such as `megatron_muloco.decoder_block_spec`, and not into Megatron's own.

Source: megatron-core 0.16.1 and 0.19.2, ``models/gpt/gpt_layer_specs.py``.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_muloco.checkpoint.layout import write_file
from megatron_muloco.config.derived import padded_vocab_size
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.params import GPT_NAMES
from tools.exporting.source import TrainedModel
from tools.exporting.torch_dist import layer_of_stack, whole, write_torch_dist

__all__ = ["arguments", "release_key", "require_expressible", "write_release"]

RELEASE = "release"  # Megatron's name of a checkpoint that belongs to no iteration
TRACKER = "latest_checkpointed_iteration.txt"
_RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def require_expressible(model: ModelConfig) -> None:
    """Refuse an architecture that Megatron's own layer specifications do not have.

    Raises:
        ConfigError: It has norms after the branches.
    """
    if model.post_layernorm:
        raise ConfigError(
            "--format megatron: model.post_layernorm is true, and Megatron's own GPT layer "
            "specifications have no norm after attention and MLP, so they would leave out its "
            "weights. Use --format hf (gemma3 and lfm3 have these norms), or load the checkpoint "
            "as it is into a model of megatron_muloco.decoder_block_spec."
        )


def release_key(name: str) -> tuple[str, int | None]:
    """Return the key of a parameter, and its layer where the key holds all layers."""
    place = GPT_NAMES.layer_of(name)
    if place is None:
        return name, None
    layer, inside = place
    return f"{GPT_NAMES.layers}.{_RENAMED.get(inside, inside)}", layer


def write_release(source: TrainedModel, directory: Path, *, dtype: torch.dtype) -> None:
    """Write ``release/`` and Megatron's tracker file into an existing directory.

    Raises:
        ConfigError: Megatron cannot express the model, or the tensors are not those of the save.
    """
    require_expressible(source.model)

    def tensors() -> Iterator[ShardedTensor]:
        for name in source.shapes:
            values = source.tensor(name).to(dtype)
            key, layer = release_key(name)
            if layer is None:
                yield whole(key, values)
            else:
                yield layer_of_stack(key, values, layer, source.model.num_layers)

    collected = list(tensors())
    source.verify()
    (directory / RELEASE).mkdir()
    write_torch_dist(directory / RELEASE, collected, {"checkpoint_version": 3.0, "iteration": 0})
    write_file(directory / TRACKER, RELEASE + "\n")


def arguments(model: ModelConfig) -> list[str]:
    """Return the arguments of Megatron-LM's training script that build the same model."""
    listed = {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--ffn-hidden-size": model.ffn_hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--kv-channels": model.kv_channels,
        "--seq-length": model.seq_length,
        "--max-position-embeddings": model.seq_length,
        "--make-vocab-size-divisible-by": padded_vocab_size(model),
        "--normalization": "RMSNorm",
        "--norm-epsilon": model.norm_epsilon,
        "--position-embedding-type": "rope",
        "--rotary-base": round(model.rotary_base),
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
    }
    if model.query_groups != model.num_attention_heads:
        listed |= {"--group-query-attention": "", "--num-query-groups": model.query_groups}
    flags = ["--swiglu", "--disable-bias-linear"]
    flags += ["--qk-layernorm"] if model.qk_layernorm else []
    if model.untie_embeddings_and_output_weights:
        flags.append("--untie-embeddings-and-output-weights")
    return [f"{key} {value}".strip() for key, value in listed.items()] + flags
