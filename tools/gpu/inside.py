"""Runs of the program inside this process: `write_documents`, `run_config`, `opened` and `trained`.

A check that needs more of a run than its output builds it here. The data are made up and read as
bytes, so no tokenizer and no corpus is needed.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.training.build import RunContext
from tools.gpu import staged

__all__ = [
    "Joined",
    "Result",
    "Sections",
    "leave",
    "merged",
    "opened",
    "run_config",
    "trained",
    "write_documents",
]

ROOT = Path(__file__).resolve().parents[2]
Sections = Mapping[str, Mapping[str, Any]]
VOCABULARY = 512  # ids of Megatron's byte-level tokenizer
MINUTES = 5  # time limit of a collective

# A model of 2 layers that every layout of two divides.
SMALL: Sections = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "seq_length": 64,
    },
    "training": {
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "train_iters": 6,
        "precision": "fp32",
        "eval_interval": 0,
    },
    "inner": {
        "kind": "muon",
        "lr": 0.02,
        "lr_warmup_iters": 2,
        "weight_decay": 0.01,
        "muon": {"ns_dtype": "fp32", "exchange_dtype": "fp32"},  # as on a CPU
    },
    "outer": {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 2},
}


def write_documents(directory: Path, count: int = 200) -> str:
    """Write a dataset of made-up documents of 50 to 800 bytes; return its prefix."""
    from megatron_muloco.data.prepare import PrepareOptions, prepare

    directory.mkdir(parents=True, exist_ok=True)
    lines = directory / "documents.jsonl"
    texts = (f"{i} green bottles, hanging on the wall. " * (1 + i * i % 19) for i in range(count))
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    prefix = str(directory / "documents")
    prepare([str(lines)], prefix, PrepareOptions("byte-level", workers=1))
    return prefix


def merged(*all_sections: Sections) -> dict[str, dict[str, Any]]:
    """Return all sections in one; later keys win."""
    tree: dict[str, dict[str, Any]] = {}
    for sections in all_sections:
        for name, keys in sections.items():
            tree[name] = {**tree.get(name, {}), **keys}
    return tree


def run_config(prefix: str, *sections: Sections, base: Sequence[str] = ()) -> RunConfig:
    """Return a configuration on the data of `write_documents`.

    Args:
        prefix: The dataset.
        sections: Keys to set; later ones win.
        base: Shipped files to start from, below ``configs/``; none for `SMALL`.
    """
    import tempfile

    import yaml

    own: Sections = {
        "model": {"vocab_size": VOCABULARY},
        "data": {
            "train": [{"path": prefix}],
            "valid": [{"path": prefix}],
            "tokenizer_type": "byte-level",
            "mask_document_boundaries": True,
            "cache_dir": f"{prefix}_index",
        },
        "checkpoint": {"dir": None},
        "monitor": {"dir": None, "log_interval": 1, "sample_tokens": 0},
    }
    tree: dict[str, Any] = merged({} if base else SMALL, own, *sections)
    if base:
        tree["extends"] = [str(ROOT / "configs" / each) for each in base]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(tree, file)
    try:
        return load_config(file.name, ())
    finally:
        os.unlink(file.name)


@dataclass(frozen=True)
class Joined:
    """How this process joins a job.

    Attributes:
        rank: Its rank.
        size: Ranks of the job.
        port: Port of the store, which the parent holds.
        prefix: Names of this job in the store.
        backend: ``gloo``, ``nccl`` or ``staged``.
        delay: For ``staged``: see `staged.register`.
        device: Index of the GPU; without one it means nothing.
    """

    rank: int
    size: int
    port: int
    prefix: str
    backend: str
    delay: float = 0.0
    device: int = 0

    def join(self) -> None:
        """Initialise the default group, which the program then adopts."""
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_SIZE=str(self.size))
        os.environ.update(LOCAL_RANK=str(self.rank), LOCAL_WORLD_SIZE=str(self.size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port))
        if torch.cuda.is_available():
            torch.cuda.set_device(self.device)
        if self.backend == staged.NAME:
            staged.register(self.delay)
        limit = timedelta(minutes=MINUTES)
        store = dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=limit)
        dist.init_process_group(
            self.backend,
            store=dist.PrefixStore(self.prefix, store),
            rank=self.rank,
            world_size=self.size,
            timeout=limit,
        )


def leave() -> None:
    """Remove the groups and what Megatron and DeepSpeed keep of them."""
    from megatron_muloco.runtime.parallel_state import unmirror_groups

    unmirror_groups()
    for module, function in (
        ("megatron.core.parallel_state", "destroy_model_parallel"),
        ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
        ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], function)()
    if dist.is_initialized():
        dist.destroy_process_group()
    communication: Any = sys.modules.get("deepspeed.comm.comm")
    if communication is not None:  # it would use the destroyed group again
        communication.cdb = None
    gc.collect()


@contextmanager
def opened(config: RunConfig, joined: Joined | None = None) -> Iterator[RunContext]:
    """Build a run and leave the job at the end; without ``joined`` it has one rank."""
    from megatron_muloco.training.build import build_run

    if joined is not None:
        joined.join()
    try:
        yield build_run(config)
    finally:
        leave()


@dataclass
class Result:
    """What a run of this rank came to.

    Attributes:
        losses: Training loss of this rank's replica by step.
        digest: Digest of its final anchor.
    """

    losses: list[float] = field(default_factory=list)
    digest: str = ""


def trained(config: RunConfig, joined: Joined | None = None) -> Result:
    """Train this rank to the end."""
    from megatron_muloco.checkpoint.io import digests_of
    from megatron_muloco.checkpoint.state import ANCHOR
    from megatron_muloco.runtime.accelerator import training_device
    from megatron_muloco.training.loop import train
    from megatron_muloco.training.stopping import StopRequest

    result = Result()
    with StopRequest() as stop, opened(config, joined) as context:
        record: Any = context.monitor.record

        def recording(step: int, metrics: Mapping[str, Any]) -> None:
            result.losses.append(float(metrics["lm loss"]))
            record(step, metrics)

        context.monitor.record = recording  # type: ignore[method-assign]
        train(context, stop)
        state = context.state
        kinds = {ANCHOR: state.anchors()}
        result.digest = digests_of(state.groups, state.view.shards, kinds, training_device())[
            ANCHOR
        ]
        context.monitor.close("done")
    return result
