"""`derive` and other pure functions of a config: parameter counts, layout, length, weight decay.

Letters of the closed forms: h hidden size, n query heads, g key/value heads, d head width, f MLP
width, V padded vocabulary.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from megatron_muloco.config.outer import (
    AverageOuter,
    Interval,
    NesterovOuter,
    NoOuter,
    interval_at,
    interval_values,
)
from megatron_muloco.config.schema import ModelConfig, RunConfig, TrainingConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = [
    "LOOP_FROM",
    "MOST_INCREMENTS",
    "BatchSchedule",
    "Derived",
    "ParameterCounts",
    "attention_has_a_mask",
    "attention_parameters_per_layer",
    "batch_schedule",
    "complete_rounds",
    "derive",
    "mlp_parameters_per_layer",
    "norm_parameters_per_layer",
    "padded_vocab_size",
    "parameter_counts",
    "sketch_width",
    "smallest_topology",
    "spacing_of_launches",
    "stage_layers",
    "topology_of",
    "train_iterations",
    "weight_decay",
]


# ---- parameter counts --------------------------------------------------------------------


def padded_vocab_size(model: ModelConfig) -> int:
    """Return V: the vocabulary size rounded up to a multiple that does not depend on the layout."""
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Number of parameters of a whole model, by kind.

    Attributes:
        embedding: Embedding, V*h.
        output: Output head, V*h, or 0 when tied to the embedding.
        attention: Query, key, value and projection matrices of all layers.
        mlp: Gate, up and down matrices of all layers.
        norms: RMSNorm weights of the whole model.
    """

    embedding: int
    output: int
    attention: int
    mlp: int
    norms: int

    @property
    def matrices(self) -> int:
        """Number of parameters that Muon orthogonalises."""
        return self.attention + self.mlp

    @property
    def vectors(self) -> int:
        """Number of parameters that AdamW updates beside Muon: embedding, output head, norms."""
        return self.embedding + self.output + self.norms

    @property
    def total(self) -> int:
        """Number of all parameters, including the padding of the vocabulary."""
        return self.matrices + self.vectors


def norm_parameters_per_layer(model: ModelConfig) -> int:
    """Return the number of RMSNorm weights of one layer: pre and post norms, q and k norms."""
    branch_norms = 4 if model.post_layernorm else 2
    head_norms = 2 if model.qk_layernorm else 0
    return branch_norms * model.hidden_size + head_norms * model.kv_channels


def attention_parameters_per_layer(model: ModelConfig) -> int:
    """Return the attention parameters of one layer: h*(n + 2g)*d + n*d*h."""
    query = model.num_attention_heads * model.kv_channels
    key = model.query_groups * model.kv_channels
    return model.hidden_size * (2 * query + 2 * key)


def mlp_parameters_per_layer(model: ModelConfig) -> int:
    """Return the MLP parameters of one layer: gate, up and down, 3*h*f."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def parameter_counts(model: ModelConfig) -> ParameterCounts:
    """Return the exact number of parameters of a model."""
    table = padded_vocab_size(model) * model.hidden_size
    layers = model.num_layers
    return ParameterCounts(
        embedding=table,
        output=table if model.untie_embeddings_and_output_weights else 0,
        attention=layers * attention_parameters_per_layer(model),
        mlp=layers * mlp_parameters_per_layer(model),
        norms=layers * norm_parameters_per_layer(model) + model.hidden_size,
    )


# ---- values that depend on the number of ranks -------------------------------------------


@dataclass(frozen=True, slots=True)
class Derived:
    """Values that follow from a config and a topology.

    Attributes:
        train_iters: Inner steps of the run.
        tokens_per_step: Tokens of one inner step over all replicas, after the ramp-up.
        train_tokens: Tokens of the whole run.
        replica_batch_size: Sequences per inner step of one replica, after the ramp-up.
        num_microbatches: Forward passes per inner step of one data-parallel rank, after the
            ramp-up.
        weight_decay: Decoupled weight decay, scaled to the per-replica batch.
        padded_vocab_size: Rows of the embedding.
        rounds: Complete rounds; 0 without an outer step.
        flushed_steps: Inner steps after the last complete round; the flush at the end of the run
            averages the replicas after them.
        parameters: Parameter counts of the whole model.
    """

    train_iters: int
    tokens_per_step: int
    train_tokens: int
    replica_batch_size: int
    num_microbatches: int
    weight_decay: float
    padded_vocab_size: int
    rounds: int
    flushed_steps: int
    parameters: ParameterCounts


def smallest_topology(config: RunConfig) -> Topology:
    """Return the smallest topology of a config, with one data-parallel rank per replica."""
    parallel = config.parallel
    return Topology.smallest_world(
        num_replicas=parallel.num_replicas,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )


def topology_of(config: RunConfig, world_size: int) -> Topology:
    """Return the topology of ``world_size`` ranks; raise TopologyError when they do not fit."""
    parallel = config.parallel
    return Topology.from_world(
        world_size,
        num_replicas=parallel.num_replicas,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
    )


def stage_layers(config: RunConfig, topology: Topology) -> tuple[range, ...]:
    """Return the layers of every pipeline stage, counted from 0 over the whole model.

    The first and the last stage hold what the config says, the others equal numbers. Megatron
    computes the same split from the same keys.

    Args:
        config: A checked config.
        topology: Topology; only the pipeline size matters.
    """
    parallel, stages = config.parallel, topology.pipeline
    first, last = (
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    equal = stages - (first is not None) - (last is not None)
    left = config.model.num_layers - (first or 0) - (last or 0)
    sizes = [left // equal if equal else 0] * stages
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    ends = list(accumulate(sizes))
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Global batch of every inner step: rises in stages, then stays.

    Attributes:
        stages: First step and batch of each stage; the first step of the first one is 1.
    """

    stages: tuple[tuple[int, int], ...]

    def consumed(self, step: int) -> int:
        """Return the sequences of the first ``step`` inner steps together."""
        ends = [first - 1 for first, _ in self.stages[1:]] + [step]
        return sum(
            max(0, min(end, step) - (first - 1)) * batch
            for (first, batch), end in zip(self.stages, ends, strict=True)
        )

    def steps(self, samples: float) -> int:
        """Return the fewest inner steps that read ``samples`` sequences."""
        begins = [first - 1 for first, _ in self.stages[1:]]
        stage = sum(self.consumed(step) < samples for step in begins)
        first, batch = self.stages[stage]
        return first - 1 + math.ceil((samples - self.consumed(first - 1)) / batch)


MOST_INCREMENTS = 1000
"""Most increments of a ramp-up of the batch: every question about a step looks at all of them."""


def batch_schedule(training: TrainingConfig) -> BatchSchedule:
    """Return the batch of every inner step.

    Source: Megatron's ``--rampup-batch-size``: after c samples the batch is ``start + increment *
    floor(c / (samples / number of increments))``, at most ``global_batch_size``.
    """
    if training.rampup_batch_size is None:
        return BatchSchedule(((1, training.global_batch_size),))
    start, increment, samples = training.rampup_batch_size
    increments = (training.global_batch_size - start) // increment
    if increments > MOST_INCREMENTS:
        raise ConfigError(f"training.rampup_batch_size: {increments} increments are too many.")
    stages, step, consumed = [(1, start)], 0, 0
    for number in range(1, increments + 1):
        # The next batch begins where this many samples have been read.
        wanted = Fraction(samples * number, increments)
        steps = math.ceil((wanted - consumed) / stages[-1][1])
        if steps > 0:
            step, consumed = step + steps, consumed + steps * stages[-1][1]
            stages.append((step + 1, start + number * increment))
        else:
            stages[-1] = (stages[-1][0], start + number * increment)
    return BatchSchedule(tuple(stages))


LOOP_FROM = 1024
"""Tokens of a sequence from which a CPU attends by a loop over documents. Measured: it was as fast
as the mask at 512 tokens, and twice as fast at 1,024."""


def attention_has_a_mask(config: RunConfig, *, accelerator: bool) -> bool:
    """Return whether attention builds a mask of s x s elements for each sequence.

    For ``attention_impl: auto`` on an accelerator it assumes a torch with ``varlen_attn``.
    """
    if config.parallel.context_parallel_size > 1:
        return True
    if not config.data.mask_document_boundaries:
        return False
    if config.model.attention_impl != "auto":
        return config.model.attention_impl == "dense"
    if accelerator:
        return config.training.precision != "bf16"
    return config.model.seq_length < LOOP_FROM


def train_iterations(config: RunConfig) -> int | None:
    """Return the inner steps of a run; None when the config gives no length.

    A length in tokens is rounded up to whole steps.
    """
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    tokens: float | None = training.train_tokens
    if training.tokens_per_parameter is not None:
        tokens = training.tokens_per_parameter * parameter_counts(config.model).total
    if tokens is None:
        return None
    return batch_schedule(training).steps(tokens / config.model.seq_length)


def weight_decay(config: RunConfig) -> float:
    """Return the decoupled weight decay; a base value is scaled to the per-replica batch.

    Source: MuLoCo research code, wd = wd0 * steps(512 sequences) / (steps * K), which is
    wd0 * (per-replica batch / 512).
    """
    inner = config.inner
    if inner.decay_base is None:
        return inner.weight_decay or 0.0
    replica_batch = config.training.global_batch_size / config.parallel.num_replicas
    return inner.decay_base * replica_batch / inner.weight_decay_reference_batch


def spacing_of_launches(outer: NesterovOuter | AverageOuter) -> int:
    """Return the fewest inner steps between the launches of two fragments.

    In a round of H steps, fragment i of P is launched after floor(H*(i+1)/P) steps, so neighbours
    are floor(H/P) or floor(H/P) + 1 steps apart. The minimum is taken over all round lengths of the
    schedule, also those after the end of the run.
    """
    return min(interval_values(outer.sync_interval)) // outer.fragments.count


def complete_rounds(interval: Interval, train_iters: int) -> tuple[int, int]:
    """Return the number of complete rounds of a run and the inner steps after the last one."""
    values = ((1, interval),) if isinstance(interval, int) else interval.values
    rounds, left = 0, train_iters
    for place, (_, steps) in enumerate(values):
        count = left // steps
        if place + 1 < len(values):
            # The next value holds from this round on.
            count = min(count, max(0, values[place + 1][0] - 1 - rounds))
        rounds, left = rounds + count, left - count * steps
        if left < interval_at(interval, rounds + 1):
            break
    return rounds, left


def derive(config: RunConfig, topology: Topology | None = None) -> Derived:
    """Return the derived values of a checked config.

    Args:
        config: A checked config.
        topology: The layout of the ranks; the smallest one by default.
    """
    layout = topology or smallest_topology(config)
    training, outer = config.training, config.outer
    iterations = train_iterations(config)
    if iterations is None:
        raise ConfigError("training.train_iters: the length of the run is not given.")
    replica_batch = training.global_batch_size // layout.num_replicas
    tokens_per_step = training.global_batch_size * config.model.seq_length
    rounds, flushed = (
        (0, 0) if isinstance(outer, NoOuter) else complete_rounds(outer.sync_interval, iterations)
    )
    return Derived(
        train_iters=iterations,
        tokens_per_step=tokens_per_step,
        train_tokens=batch_schedule(training).consumed(iterations) * config.model.seq_length,
        replica_batch_size=replica_batch,
        num_microbatches=replica_batch // (layout.data * training.micro_batch_size),
        weight_decay=weight_decay(config),
        padded_vocab_size=padded_vocab_size(config.model),
        rounds=rounds,
        flushed_steps=flushed,
        parameters=parameter_counts(config.model),
    )


# Values of a replica's sketch. The standard error of a cosine is 1 / sqrt(4096) = 0.016.
_SKETCH_VALUES = 4096

# Lower bound per rank, for replicas of many ranks; alone it would give an error of 0.06.
_LEAST_SKETCH_VALUES = 256


def sketch_width(config: RunConfig, topology: Topology) -> int:
    """Return the length of one rank's sketch of a fragment; 0 where replicas are not compared."""
    if topology.num_replicas == 1 or not config.monitor.pseudogradient_interval:
        return 0
    return max(_SKETCH_VALUES // topology.replica_size, _LEAST_SKETCH_VALUES)
