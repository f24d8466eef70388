"""Numbers that follow from a config: pure functions, no torch."""

import math
from dataclasses import dataclass

from megatron_muloco.config.counts import (
    ParameterCounts,
    padded_vocab_size,
    parameter_counts,
)
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.round_schedules import Interval, interval_at, interval_values
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = [
    "Derived",
    "complete_rounds",
    "derive",
    "padded_vocab_size",
    "smallest_topology",
    "spacing_of_launches",
    "topology_of",
    "train_iterations",
    "weight_decay",
]


@dataclass(frozen=True, slots=True)
class Derived:
    """What a config means in a given world.

    Attributes:
        train_iters: Inner steps of the run.
        tokens_per_step: Tokens of one inner step over all replicas.
        train_tokens: Tokens of the whole run.
        replica_batch_size: Sequences per inner step of one replica.
        num_microbatches: Forward passes per inner step of one data-parallel rank.
        weight_decay: Decoupled weight decay after the batch rule.
        lr_warmup_iters: Inner steps of warm-up.
        padded_vocab_size: Rows of the embedding.
        rounds: Complete rounds; 0 without an outer step.
        flushed_steps: Inner steps after the last complete round, ended by the final plain mean.
        parameters: Parameters by kind.
    """

    train_iters: int
    tokens_per_step: int
    train_tokens: int
    replica_batch_size: int
    num_microbatches: int
    weight_decay: float
    lr_warmup_iters: int
    padded_vocab_size: int
    rounds: int
    flushed_steps: int
    parameters: ParameterCounts


def smallest_topology(config: RunConfig) -> Topology:
    """Return the smallest world that a config runs on: one data-parallel rank per replica."""
    parallel = config.parallel
    return Topology.smallest_world(
        num_replicas=parallel.num_replicas,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )


def topology_of(config: RunConfig, world_size: int) -> Topology:
    """Return the layout of ``world_size`` ranks; raises TopologyError when they do not factor."""
    parallel = config.parallel
    return Topology.from_world(
        world_size,
        num_replicas=parallel.num_replicas,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )


def train_iterations(config: RunConfig) -> int | None:
    """Return the inner steps of a run, lengths in tokens rounded up; None when none is given."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    tokens: float | None = training.train_tokens
    if training.tokens_per_parameter is not None:
        tokens = training.tokens_per_parameter * parameter_counts(config.model).total
    if tokens is None:
        return None
    return math.ceil(tokens / (training.global_batch_size * config.model.seq_length))


def weight_decay(config: RunConfig) -> float:
    """Return the decoupled weight decay, scaled to the per-replica batch where a base is given.

    Source: MuLoCo research code, wd = wd0 * steps(512 sequences) / (steps * K), which is
    wd0 * (per-replica batch / 512).
    """
    inner = config.inner
    if inner.weight_decay_base is None:
        return inner.weight_decay or 0.0
    replica_batch = config.training.global_batch_size / config.parallel.num_replicas
    return inner.weight_decay_base * replica_batch / inner.weight_decay_reference_batch


def spacing_of_launches(outer: NesterovOuter | AverageOuter) -> int:
    """Return the fewest inner steps between the launches of two fragments.

    In a round of H steps fragment i of P starts after floor(H*(i+1)/P), so neighbours are
    floor(H/P) or one more apart. All lengths of rounds count, also those beyond the end of the run.
    """
    return min(interval_values(outer.sync_interval)) // outer.fragments.count


def complete_rounds(interval: Interval, train_iters: int) -> tuple[int, int]:
    """Return the complete rounds of a run, and the inner steps after the last of them."""
    rounds, left = 0, train_iters
    while left >= (steps := interval_at(interval, rounds + 1)):
        rounds, left = rounds + 1, left - steps
    return rounds, left


def derive(config: RunConfig, topology: Topology | None = None) -> Derived:
    """Return everything that follows from a checked config in a world; the smallest by default."""
    layout = topology or smallest_topology(config)
    training, outer = config.training, config.outer
    iterations = train_iterations(config)
    if iterations is None:
        raise ConfigError("training.train_iters: no length is given.")
    replica_batch = training.global_batch_size // layout.num_replicas
    tokens_per_step = training.global_batch_size * config.model.seq_length
    rounds, flushed = (
        (0, 0) if isinstance(outer, NoOuter) else complete_rounds(outer.sync_interval, iterations)
    )
    return Derived(
        train_iters=iterations,
        tokens_per_step=tokens_per_step,
        train_tokens=iterations * tokens_per_step,
        replica_batch_size=replica_batch,
        num_microbatches=replica_batch // (layout.data * training.micro_batch_size),
        weight_decay=weight_decay(config),
        lr_warmup_iters=config.inner.lr_warmup_iters,
        padded_vocab_size=padded_vocab_size(config.model),
        rounds=rounds,
        flushed_steps=flushed,
        parameters=parameter_counts(config.model),
    )
