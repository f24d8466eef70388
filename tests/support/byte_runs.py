"""Whole runs of the real program on a byte-level dataset, which needs no trained tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_muloco.config import RunConfig
from tests.support.faults import count_calls
from tests.support.tensors import assert_equal
from tests.support.tiny_models import tiny_config

BYTE_MODEL = {"vocab_size": 512}  # ids of Megatron's byte-level tokenizer


def byte_dataset(directory: Path) -> str:
    """Prepare some documents for the byte-level tokenizer; return the prefix of the dataset."""
    from megatron_muloco.data.prepare import PrepareOptions, prepare

    texts = (f"{i} green bottles, hanging on the wall. " * (1 + i % 4) for i in range(40))
    lines = directory / "bottles.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = str(directory / "bottles")
    prepare([str(lines)], prefix, PrepareOptions("byte-level", workers=1))
    return prefix


def byte_sections(prefix: str) -> dict[str, dict[str, Any]]:
    """Return the configuration sections with which a tiny model reads the dataset."""
    return {
        "model": dict(BYTE_MODEL),
        "data": {
            "train": ({"path": prefix},),
            "valid": ({"path": prefix},),
            "tokenizer_type": "byte-level",
            "mask_document_boundaries": True,
        },
    }


def byte_config(prefix: str, **overrides: Mapping[str, Any]) -> RunConfig:
    """Return a tiny run on the dataset; keyword arguments replace keys of a section."""
    sections = byte_sections(prefix)
    training = {"train_iters": 7, "global_batch_size": 4}
    sections["training"] = training
    for section, keys in overrides.items():
        sections[section] = {**sections.get(section, {}), **keys}
    checkpoint = sections.pop("checkpoint", {})
    monitor = {"log_interval": 1, **sections.pop("monitor", {})}
    tree = tiny_config(**sections).model_dump()
    return RunConfig.model_validate({**tree, "checkpoint": checkpoint, "monitor": monitor})


@dataclass
class Ended:
    """Outcome of a run on one rank."""

    outcome: str
    first_step: int
    losses: dict[int, float]
    tensors: dict[str, torch.Tensor]

    def assert_same(self, other: "Ended") -> None:
        """Fail unless both runs ended with the same bits and agree on losses of common steps."""
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert_equal(tensor, other.tensors[name], name)
        both = self.losses.keys() & other.losses.keys()
        assert both, "no step was made by both"
        assert {s: self.losses[s] for s in both} == {s: other.losses[s] for s in both}


def run_here(config: RunConfig, *, around: Any = None) -> Ended:
    """Train on this rank to the end or to a stop, and leave the worker ready for another run.

    Args:
        config: The run.
        around: Called with the run context; returns a context manager (a fault) that surrounds
            the training.
    """
    from contextlib import nullcontext

    from megatron_muloco.runtime.parallel_state import unmirror_groups
    from megatron_muloco.training.build import build_run
    from megatron_muloco.training.loop import train
    from megatron_muloco.training.stopping import StopRequest

    with StopRequest() as stop:
        context = build_run(config)
        try:
            fault = around(context) if around else nullcontext()
            with fault, count_calls(context.monitor, "record") as calls:
                outcome = train(context, stop)
            context.monitor.close(outcome.value)
        finally:
            if context.store is not None:
                context.store.close()
            unmirror_groups()
    losses = {step: float(metrics["lm loss"]) for step, metrics in calls}
    return Ended(outcome.name, context.first_step, losses, _tensors(context))


def _tensors(context: Any) -> dict[str, torch.Tensor]:
    """Return copies of masters, inner moments, and the outer state, by kind and name."""
    optimizer = context.optimizer
    kinds: dict[str, Mapping[str, torch.Tensor]] = {"master": optimizer.view.masters}
    kinds |= {f"inner.{kind}": held for kind, held in optimizer.inner.named_state().items()}
    if optimizer.synchronizer is not None:
        outer = optimizer.synchronizer.state_dict()["tensors"]
        kinds |= {f"outer.{kind}": held for kind, held in outer.items()}
    return {
        f"{kind}.{name}": tensor.detach().clone()
        for kind, held in kinds.items()
        for name, tensor in held.items()
    }
