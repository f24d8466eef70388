"""What the schema can say and the program does not do: refused by name, with the reason.

Two kinds of entry. Keys and values that are not offered at all, which people know from Megatron,
get a reason instead of "unknown key"; other programs' names for keys of the schema lead to them.
Values that the schema has for coming versions are refused by `UNSUPPORTED` rules until the code
behind them exists; lifting one is deleting its function.
"""

from collections.abc import Iterator

from megatron_muloco.config.schema import RunConfig

__all__ = ["OTHER_NAMES", "REFUSED_KEYS", "REFUSED_VALUES", "UNSUPPORTED"]

_MOE = "mixture-of-experts models are not trained here. Remove the key; the MLP is dense."
_FP8 = "fp8 is not trained here. Use training.precision bf16."
_FP4 = "fp4 is not trained here. Use training.precision bf16."
_FP16 = "fp16 needs loss scaling, which is not built. Use training.precision bf16 or fp32."
_VIRTUAL = "virtual pipeline stages are not scheduled here. Use pipeline_model_parallel_size alone."
_DROPOUT = "the models here train without dropout, as in the papers. Remove the key."
_FSDP = "parameters are sharded by Megatron's distributed optimizer only. Remove the key."
_DP = "it follows from the number of ranks: world / (replicas x tp x pp). Remove the key."
_OFFLOAD = "the inner optimizer keeps its state in fp32 on the device. Remove the key."

REFUSED_KEYS = {
    "num_moe_experts": _MOE,
    "num_experts": _MOE,
    "moe_router_topk": _MOE,
    "expert_model_parallel_size": _MOE,
    "fp8": _FP8,
    "fp8_format": _FP8,
    "fp8_recipe": _FP8,
    "fp4": _FP4,
    "fp16": _FP16,
    "loss_scale": _FP16,
    "bf16": "precision is one key. Use training.precision: bf16.",
    "virtual_pipeline_model_parallel_size": _VIRTUAL,
    "num_layers_per_virtual_pipeline_stage": _VIRTUAL,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "use_megatron_fsdp": _FSDP,
    "use_torch_fsdp2": _FSDP,
    "use_distributed_optimizer": "it is always on. Remove the key.",
    "use_precision_aware_optimizer": _OFFLOAD,
    "optimizer_cpu_offload": _OFFLOAD,
    "data_parallel_size": _DP,
}

# What Hugging Face, nanoGPT, DeepSpeed and Megatron's command line call keys of the schema.
OTHER_NAMES = {
    "adam_beta1": "inner.adam.beta1",
    "adam_beta2": "inner.adam.beta2",
    "adam_eps": "inner.adam.eps",
    "batch_size": "training.global_batch_size",
    "d_ff": "model.ffn_hidden_size",
    "d_model": "model.hidden_size",
    "dtype": "training.precision",
    "eval_iterations": "training.eval_iters",
    "gradient_clipping": "training.clip_grad",
    "grad_clip": "training.clip_grad",
    "head_dim": "model.kv_channels",
    "intermediate_size": "model.ffn_hidden_size",
    "learning_rate": "inner.lr",
    "load": "checkpoint.resume",
    "max_grad_norm": "training.clip_grad",
    "max_iters": "training.train_iters",
    "max_lr": "inner.lr",
    "max_position_embeddings": "model.seq_length",
    "max_steps": "training.train_iters",
    "micro_batch": "training.micro_batch_size",
    "n_embd": "model.hidden_size",
    "n_head": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads",
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_heads": "model.num_attention_heads",
    "num_hidden_layers": "model.num_layers",
    "num_key_value_heads": "model.num_query_groups",
    "num_kv_heads": "model.num_query_groups",
    "num_steps": "training.train_iters",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "replicas": "parallel.num_replicas",
    "rope_theta": "model.rotary_base",
    "save": "checkpoint.dir",
    "save_dir": "checkpoint.dir",
    "seq_len": "model.seq_length",
    "sequence_length": "model.seq_length",
    "tensor_parallel_size": "parallel.tensor_model_parallel_size",
    "tensorboard_dir": "monitor.dir",
    "tp": "parallel.tensor_model_parallel_size",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "vocab": "model.vocab_size",
    "warmup_iters": "inner.lr_warmup_iters",
    "warmup_steps": "inner.lr_warmup_iters",
    "wd": "inner.weight_decay",
}

REFUSED_VALUES = {
    ("training.precision", "fp16"): _FP16,
    ("training.precision", "fp8"): _FP8,
    ("training.precision", "fp4"): _FP4,
}


def context_parallel(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Sequences are not divided over ranks."""
    size = config.parallel.context_parallel_size
    if size > 1:
        yield (
            "parallel.context_parallel_size",
            f"{size} is not available: attention here runs on whole sequences (context parallelism "
            "needs Transformer Engine).\nUse 1; spend the ranks on tensor or data parallelism.",
        )


def async_save(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Checkpoints are written while training waits."""
    if config.checkpoint.async_save:
        yield ("checkpoint.async_save", "true is not available.\nUse false.")


UNSUPPORTED = (
    context_parallel,
    async_save,
)
