"""Builds one pipeline stage of the model from the configuration.

apex is optional here. Megatron finds apex's fused norms and optimizers by itself. What else runs
fused is decided in `model.fused`.
"""

from functools import lru_cache
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import padded_vocab_size, stage_layers
from megatron_muloco.model.attention import AttentionBackend, SequenceSlice
from megatron_muloco.model.attention_backends import choose_attention
from megatron_muloco.model.fused import UNFUSED, Fusions, choose_fusions, install
from megatron_muloco.model.initialise import initialise_weights, poison_weights
from megatron_muloco.model.layer_spec import (
    LOCAL_PARTS,
    decoder_block_spec,
    transformer_engine_parts,
)

__all__ = ["build_model", "transformer_config"]


def transformer_config(
    config: RunConfig, fusions: Fusions = UNFUSED, *, draw: bool = True
) -> TransformerConfig:
    """Translate the configuration for Megatron; the same input gives the same object.

    Args:
        config: The configuration of the run.
        fusions: What runs fused.
        draw: Whether Megatron may draw initial weights, where ``model.init`` asks it to.
    """
    model, parallel, training = config.model, config.parallel, config.training
    bf16 = training.precision == "bf16"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        perform_initialization=draw and model.init == "megatron",
        # Drawn whole on the CPU and then cut, initial values do not depend on tensor parallelism.
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        **_recompute(config),
        gradient_accumulation_fusion=fusions.weight_gradients,
        bias_activation_fusion=fusions.swiglu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=bool(fusions.rotary),
        persist_layer_norm=False,
        cross_entropy_loss_fusion=fusions.cross_entropy,
        cross_entropy_fusion_impl="native",
        deallocate_pipeline_outputs=True,
        # With True, every exchange between stages would synchronise the whole device and so wait
        # for outer-step communication that is meant to overlap with training.
        batch_p2p_sync=False,
        # On a CPU, Megatron's deterministic embedding is the one whose gradient torch does not sum
        # in a fixed order.
        deterministic_mode=config.training.deterministic and torch.cuda.is_available(),
        timers=None,
    )


def _recompute(config: RunConfig) -> dict[str, Any]:
    """Return Megatron's keys for activation recomputation; none where nothing is recomputed."""
    training = config.training
    if training.recompute_granularity == "none":
        return {}
    if training.recompute_granularity == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method,
        "recompute_num_layers": training.recompute_num_layers or 1,
    }


def build_model(
    config: RunConfig,
    groups: Groups,
    fusions: Fusions | None = None,
    attention: AttentionBackend | None = None,
    *,
    draw: bool = True,
) -> GPTModel:
    """Return this rank's pipeline stage, initialised, on the training device.

    Args:
        config: The configuration of the run.
        groups: This rank's groups.
        fusions: What runs fused; by default what `choose_fusions` finds.
        attention: Backend of attention; by default what `choose_attention` chooses.
        draw: Whether to draw initial weights. Without them every parameter is poison (a NaN), for a
            run that loads a checkpoint.

    Raises:
        ConfigError: The configured attention does not run on this device.
        RuntimeMismatch: ``model.transformer_impl`` names a package that cannot be imported.

    Collectives: with tied embeddings and more than one pipeline stage, Megatron all-reduces the
    embedding over the first and the last stage; every rank must call.
    """
    model = config.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fusions = choose_fusions(config.training, device) if fusions is None else fusions
    install(fusions)
    megatron_config = transformer_config(config, fusions, draw=draw)
    stage = GPTModel(
        config=megatron_config,
        transformer_layer_spec=decoder_block_spec(
            len(stage_layers(config, groups.topology)[groups.coords.pp]),
            qk_layernorm=model.qk_layernorm,
            post_layernorm=model.post_layernorm,
            attention_backend=attention or choose_attention(config, device).backend,
            parts=LOCAL_PARTS if model.transformer_impl == "local" else transformer_engine_parts(),
        ),
        vocab_size=padded_vocab_size(model),
        max_sequence_length=model.seq_length,
        pre_process=groups.on_first_stage,
        post_process=groups.on_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        pg_collection=groups.pg,
    )
    if groups.topology.context > 1:
        _slice_positions(stage, config, groups)
    if not draw:
        poison_weights(stage)
    elif model.init == "muloco":
        initialise_weights(
            stage,
            groups.pg,
            seed=config.training.seed,
            std=model.init_method_std,
            hidden_size=model.hidden_size,
        )
    return stage.to(device)


def _slice_positions(stage: GPTModel, config: RunConfig, groups: Groups) -> None:
    """Make the rotary embedding return the positions of this context-parallel rank.

    Megatron's own slicing, of the same positions, needs a GPU. Without a group it returns all.
    """
    coords, topology = groups.coords, groups.topology
    own = SequenceSlice(config.model.seq_length, rank=coords.cp, size=topology.context)
    rotary: Any = stage.rotary_pos_emb
    rotary.cp_group = None

    # Megatron caches the whole table; the same object gives the same slice, so that cosines and
    # sines of it are computed once as well.
    @lru_cache(maxsize=1)
    def own_part(whole: Tensor) -> Tensor:
        return whole[own.positions.to(whole.device)]

    rotary.register_forward_hook(lambda _module, _inputs, whole: own_part(whole))
