"""What the schema can say and the program does not do: refused by name, with the reason.

Two kinds of entry. Keys and values that are not offered at all, which people know from Megatron,
get a reason instead of "unknown key". Values that the schema has for coming versions are refused by
`UNSUPPORTED` rules until the code behind them exists; lifting one is deleting its function.
"""

from collections.abc import Iterator

from megatron_muloco.config.outer import NoCompression, NoOuter
from megatron_muloco.config.schema import RunConfig

__all__ = ["REFUSED_KEYS", "REFUSED_VALUES", "UNSUPPORTED"]

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


def compression(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Pseudogradients travel uncompressed."""
    if isinstance(config.outer, NoOuter) or isinstance(config.outer.compression, NoCompression):
        return
    yield (
        "outer.compression.kind",
        f"{config.outer.compression.kind} is not available yet.\nUse none; wire_dtype bf16 halves "
        "the traffic.",
    )


def host_transport(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Pseudogradients leave from device memory."""
    if not isinstance(config.outer, NoOuter) and config.outer.transport == "host":
        yield (
            "outer.transport",
            "host is not available yet.\nUse auto or device.",
        )


def async_save(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Checkpoints are written while training waits."""
    if config.checkpoint.async_save:
        yield ("checkpoint.async_save", "true is not available yet.\nUse false.")


UNSUPPORTED = (
    context_parallel,
    compression,
    host_transport,
    async_save,
)
