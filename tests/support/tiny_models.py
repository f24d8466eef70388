"""A real Megatron model small enough for tests, trained by the real optimizers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.model.build import build_model
from megatron_muloco.runtime.megatron import wrap_data_parallel
from megatron_muloco.runtime.parallel_state import unmirror_groups
from megatron_muloco.training.build_optimizer import build_replica_optimizer
from megatron_muloco.training.forward import ForwardBackward
from megatron_muloco.training.replica_optimizer import ReplicaOptimizer
from megatron_muloco.training.start import initialize_replicas

MUON = {"kind": "muon", "lr": 0.02, "lr_warmup_iters": 2, "weight_decay": 0.01}
ADAMW = {"kind": "adamw", "lr": 0.003, "lr_warmup_iters": 2, "weight_decay": 0.01}
NESTEROV = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 2}


def tiny_config(**overrides: Any) -> RunConfig:
    """Return a configuration; keyword arguments replace keys of a section (``training=...``)."""
    tree: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 8,
            "seq_length": 16,
            "vocab_size": 60,
            "make_vocab_size_divisible_by": 4,
        },
        "parallel": {},
        "data": {
            "train": ({"path": "none"},),
            "tokenizer_type": "byte-level",
            "mask_document_boundaries": False,
        },
        "training": {
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "train_iters": 8,
            "precision": "fp32",
        },
        "inner": dict(ADAMW),
        "outer": dict(NESTEROV),
    }
    for section, keys in overrides.items():
        replaced = "kind" in keys
        tree[section] = dict(keys) if replaced else {**tree.get(section, {}), **keys}
    return RunConfig.model_validate(tree)


def made_up_tokens(sample: int, length: int, vocabulary: int) -> torch.Tensor:
    """Return the tokens of sample ``sample``, the same on every rank and in every call."""
    generator = torch.Generator().manual_seed(1000 + sample)
    return torch.randint(0, vocabulary, (length,), generator=generator)


Assignment = Callable[[int, Groups, RunConfig], list[int]]


def global_order(step: int, groups: Groups, config: RunConfig) -> list[int]:
    """Return this rank's samples of ``step`` when replicas and dp ranks share one global order."""
    batch = config.training.global_batch_size
    coords, topology = groups.coords, groups.topology
    ranks = topology.num_replicas * topology.data
    size = batch // ranks
    first = (step - 1) * batch + (coords.replica * topology.data + coords.dp) * size
    return list(range(first, first + size))


def same_for_all_replicas(step: int, groups: Groups, config: RunConfig) -> list[int]:
    """Return the samples of ``step`` when all replicas train on those of a single replica."""
    batch = config.training.global_batch_size // groups.topology.num_replicas
    size = batch // groups.topology.data
    first = (step - 1) * batch + groups.coords.dp * size
    return list(range(first, first + size))


@dataclass
class TinyRun:
    """Training run on one rank; call `train` again to train on."""

    config: RunConfig
    groups: Groups
    model: Any
    optimizer: ReplicaOptimizer
    forward: ForwardBackward
    assignment: Assignment = global_order
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def train(self, steps: int) -> "TinyRun":
        """Make ``steps`` inner steps, with the outer steps that are due."""
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            step = self.optimizer.steps + 1
            samples = self.assignment(step, self.groups, self.config)
            micro = self.config.training.micro_batch_size
            count = len(samples) // micro
            loss = self.forward(self.batches(samples), count) / count
            self.optimizer.step()
            self.losses.append(self.replica_loss(loss))
            assert self.optimizer.last_inner is not None
            self.grad_norms.append(self.optimizer.last_inner.grad_norm)
        return self

    def batches(self, samples: list[int]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield microbatches of made-up tokens."""
        model, micro = self.config.model, self.config.training.micro_batch_size
        for first in range(0, len(samples), micro):
            rows = torch.stack(
                [
                    made_up_tokens(index, model.seq_length + 1, model.vocab_size)
                    for index in samples[first : first + micro]
                ]
            )
            yield {
                "tokens": rows[:, :-1].contiguous(),
                "labels": rows[:, 1:].contiguous(),
                "position_ids": torch.arange(model.seq_length).expand(len(rows), -1),
            }

    def replica_loss(self, loss: torch.Tensor) -> float:
        """Return the loss of the last stage averaged over dp, on every rank of the replica."""
        mine = self.groups.on_last_stage and self.groups.coords.tp == 0
        total = loss.detach().double() if mine else torch.zeros((), dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.groups.replica)
        return float(total) / self.groups.topology.data

    def masters(self) -> dict[str, tuple[int, torch.Tensor]]:
        """Return name -> (start of the shard, its fp32 values)."""
        view = self.optimizer.view
        return {s.name: (s.start, view.masters[s.name].clone()) for s in view.shards}

    def whole_parameters(self) -> dict[str, torch.Tensor]:
        """Return this rank's local parameters as the model sees them."""
        from megatron_muloco.model.names import named_parameters

        return {name: p.detach().clone() for name, p in named_parameters(self.model.module)}


def start_tiny(
    config: RunConfig,
    assignment: Assignment = global_order,
    *,
    bucket_size: int | None = None,
    change: Callable[[Any], Any] | None = None,
    end_of_document: int | None = None,
    **options: Any,
) -> TinyRun:
    """Build everything for one rank; call `finish_tiny` at the end of the rank function.

    ``bucket_size`` acts with ``training.overlap_grad_reduce`` only, as in Megatron. ``change``
    may change the model before anything is built on it; ``options`` go to `wrap_optimizer`.
    """
    groups = initialize_replicas(config)
    return build_tiny(
        config,
        groups,
        assignment,
        bucket_size=bucket_size,
        change=change,
        end_of_document=end_of_document,
        **options,
    )


def build_tiny(
    config: RunConfig,
    groups: Groups,
    assignment: Assignment = global_order,
    *,
    bucket_size: int | None = None,
    change: Callable[[Any], Any] | None = None,
    end_of_document: int | None = None,
    **options: Any,
) -> TinyRun:
    """Build everything for one rank with these groups; see `start_tiny`."""
    stage = build_model(config, groups)
    if change is not None:
        stage = change(stage)
    training = config.training
    model = wrap_data_parallel(
        stage,
        groups,
        reduce_in_fp32=training.accumulate_dtype == "fp32",
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        bucket_size=bucket_size,
    )
    forward = ForwardBackward(
        model,
        groups,
        micro_batch_size=training.micro_batch_size,
        seq_length=config.model.seq_length,
        end_of_document=end_of_document,
    )
    optimizer = build_replica_optimizer(model, config, groups, **options)
    return TinyRun(config, groups, model, optimizer, forward, assignment)


def finish_tiny() -> None:
    """Remove the mirrored groups, so that the next test in this warm worker can build others."""
    unmirror_groups()
