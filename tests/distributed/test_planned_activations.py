"""The activations in the plan are the storages that autograd saves in the real model.

Without recompute they are equal to the byte. A recomputed layer also saves small arguments: the
kind of the mask, 4 bytes a layer, and one table of rotary angles that all microbatches share.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import topology_of
from megatron_muloco.planning.activations import Activations, stage_activations
from tests.support.allocated import AllocatedBytes, SavedBytes
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 88,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 8,
    "seq_length": 32,
    "vocab_size": 128,
    "qk_layernorm": True,
    "post_layernorm": True,
}
ANGLES = 4 * 32 * 8  # fp32, tokens, head width
FULL = {"recompute_granularity": "full"}

# Sizes (tp, pp) or (tp, pp, cp), and sections of the config.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "fp32": ((1, 1), {}),
    "bf16-masked": ((1, 1), {"training": {"precision": "bf16"}, "data": {"masked": True}}),
    "plain-norms": ((1, 1), {"model": {"qk_layernorm": False, "post_layernorm": False}}),
    "grouped-heads": ((1, 1), {"model": {"num_query_groups": 2}}),
    "grouped-bf16": (
        (1, 1),
        {"model": {"num_query_groups": 2}, "training": {"precision": "bf16"}},
    ),
    "selective-masked": (
        (1, 1),
        {"training": {"recompute_granularity": "selective"}, "data": {"masked": True}},
    ),
    "full": ((1, 1), {"training": {**FULL, "recompute_num_layers": 1}}),
    "full-chunks-masked-bf16": (
        (1, 1),
        {
            "training": {**FULL, "recompute_num_layers": 2, "precision": "bf16"},
            "data": {"masked": True},
        },
    ),
    "block": (
        (1, 1),
        {"training": {**FULL, "recompute_num_layers": 3, "recompute_method": "block"}},
    ),
    "tp2": ((2, 1), {}),
    "tp2-sequence-parallel-bf16": (
        (2, 1),
        {"parallel": {"sequence_parallel": True}, "training": {"precision": "bf16"}},
    ),
    "cp2": ((1, 1, 2), {}),
    "cp2-masked-bf16": ((1, 1, 2), {"training": {"precision": "bf16"}, "data": {"masked": True}}),
    "cp2-plain-norms-grouped": (
        (1, 1, 2),
        {"model": {"qk_layernorm": False, "post_layernorm": False, "num_query_groups": 2}},
    ),
    "cp2-full-masked": (
        (1, 1, 2),
        {"training": {**FULL, "recompute_num_layers": 1}, "data": {"masked": True}},
    ),
    "pp2": ((1, 2), {}),
    "pp2-one-microbatch": ((1, 2), {"training": {"global_batch_size": 2}}),
    "tp2-pp2-full-sp": (
        (2, 2),
        {
            "parallel": {"sequence_parallel": True},
            "training": {**FULL, "recompute_num_layers": 1},
        },
    ),
}


def config_of(sizes: tuple[int, ...], **sections: Any) -> RunConfig:
    tensor, pipeline, context = (*sizes, 1)[:3]
    masked = sections.pop("data", {}).get("masked", False)
    return tiny_config(
        model=MODEL | sections.pop("model", {}),
        data={"mask_document_boundaries": masked},
        parallel={
            "num_replicas": 1,
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "context_parallel_size": context,
            **sections.pop("parallel", {}),
        },
        training={
            "micro_batch_size": 2,
            "global_batch_size": 6,
            **sections.pop("training", {}),
        },
    )


def saved(configs: list[RunConfig]) -> list[tuple[dict[str, int], int]]:
    """Return the bytes that autograd saves on this rank in one step, by kind, and their maximum."""
    return [saved_of(config) for config in configs]


def saved_of(config: RunConfig) -> tuple[dict[str, int], int]:
    run = start_tiny(config)
    if config.data.mask_document_boundaries:
        run.forward._end_of_document = 3
    samples = list(run.assignment(1, run.groups, config))
    batches: Iterator[Any] = run.batches(samples)
    count = len(samples) // config.training.micro_batch_size
    with SavedBytes(run.model.module, kind_of) as counted:
        run.forward(batches, count)
    finish_tiny()
    return counted.at_most, counted.most


def kind_of(module: str, tensor: torch.Tensor) -> str:
    """Return the plan's kind of a tensor saved by a module."""
    s = MODEL["seq_length"]
    # Context-parallel ranks have the rows of their own half of a sequence.
    if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[2:] in ((s, s), (s // 2, s)):
        return "mask"
    if "layers." not in module:
        return "embedding" if module.startswith("embedding") else "head_or_inputs"
    if module.endswith("norm"):
        return "norms"
    return "mlp" if ".mlp" in module else "attention"


def planned(activations: Activations) -> dict[str, int]:
    layers, flights = activations.layers, activations.in_flight
    # What saves the input of a stage: a recomputed layer, or the first layer's norm.
    received = activations.received
    kinds = {
        "norms": flights * layers.norms + (0 if layers.inputs else received),
        "attention": flights * layers.attention,
        "mask": flights * layers.mask,
        "mlp": flights * layers.mlp,
        "embedding": flights * activations.embedding,
        "head_or_inputs": (
            activations.head + flights * layers.inputs + (received if layers.inputs else 0)
        ),
    }
    return {kind: size for kind, size in kinds.items() if size}


@pytest.mark.parametrize("sizes", sorted({sizes for sizes, _ in CASES.values()}))
def test_planned_activations_are_what_autograd_saves(sizes: tuple[int, ...]) -> None:
    cases = [name for name, (wanted, _) in CASES.items() if wanted == sizes]
    configs = [config_of(sizes, **CASES[name][1]) for name in cases]
    world = math.prod(sizes)
    for rank, of_rank in enumerate(run_ranks(saved, world, configs)):
        for name, config, (kinds, most) in zip(cases, configs, of_rank, strict=True):
            topology = topology_of(config, world)
            plan = stage_activations(config, topology, topology.coords(rank).pp, accelerator=False)
            if config.training.recompute_granularity == "none":
                assert (kinds, most) == (planned(plan), plan.kept), name
            else:
                small = 4 * config.model.num_layers + plan.in_flight * ANGLES
                assert plan.kept == pytest.approx(most, abs=small), name
                assert kinds == pytest.approx(planned(plan), abs=small), name


# ---- peak of forward and backward ----------------------------------------------------------------

# Logits or layers at the peak. Sequences are long enough that tables and masks do not matter.
PEAKS = {
    f"{precision}-{recompute}-{vocabulary}": (precision, recompute, vocabulary)
    for precision in ("fp32", "bf16")
    for recompute in ("none", "full")
    for vocabulary in (128, 4096)
}


def peaks(configs: list[RunConfig]) -> list[int]:
    """Return the most bytes that forward and backward of one microbatch allocate."""
    found = []
    for config in configs:
        run = start_tiny(config)
        batches = run.batches(list(run.assignment(1, run.groups, config)))
        with AllocatedBytes() as counted:
            run.forward(batches, 1)
        finish_tiny()
        found.append(counted.most)
    return found


def test_the_planned_peak_is_what_forward_and_backward_allocate() -> None:
    configs = []
    for precision, recompute, vocabulary in PEAKS.values():
        layers = {"recompute_granularity": recompute}
        if recompute == "full":
            layers["recompute_num_layers"] = 1
        configs.append(
            tiny_config(
                model=MODEL
                | {
                    "hidden_size": 64,
                    "ffn_hidden_size": 176,
                    "kv_channels": 16,
                    "seq_length": 128,
                    "vocab_size": vocabulary,
                },
                training={
                    "micro_batch_size": 4,
                    "global_batch_size": 4,
                    "precision": precision,
                    **layers,
                },
            )
        )
    (measured,) = run_ranks(peaks, 1, configs)
    for name, config, most in zip(PEAKS, configs, measured, strict=True):
        plan = stage_activations(config, topology_of(config, 1), 0, accelerator=False)
        # From below a per cent. From above, because a layer's backward is planned as if nothing of
        # the layer were freed before its MLP's gradients are there.
        assert 0.99 * most <= plan.peak <= 1.2 * most, name
