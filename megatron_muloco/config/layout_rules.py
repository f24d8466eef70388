"""Rules about division: heads, layers, vocabulary and batch over ranks. See `config.rules`."""

import math
from collections.abc import Iterator

from megatron_muloco.config.derived import (
    MOST_INCREMENTS,
    padded_vocab_size,
    smallest_topology,
)
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.topology import Topology

__all__ = [
    "batch_divides",
    "context_parallel_attention_is_dense",
    "ffn_divides",
    "head_width_is_even",
    "heads_divide",
    "layers_divide",
    "rampup_reaches_the_batch",
    "sequence_divides",
    "tied_embedding_has_a_scale",
    "vocabulary_divides",
]


def heads_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that query heads and query groups divide evenly over tensor-parallel ranks."""
    heads, groups = config.model.num_attention_heads, config.model.query_groups
    tp = config.parallel.tensor_model_parallel_size
    if heads % groups:
        yield Problem(
            "model.num_query_groups",
            f"{groups} does not divide the {heads} attention heads, so heads cannot share keys "
            f"evenly.\nUse one of {_divisors(heads)}.",
        )
    if heads % tp:
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tp} does not divide the {heads} attention heads, but each rank holds whole heads.\n"
            f"Use one of {_divisors(heads)}.",
        )
    elif groups % tp:
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tp} does not divide the {groups} query groups, but each rank holds whole groups.\n"
            f"Use one of {_divisors(groups)}.",
        )


def head_width_is_even(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require an even head width, because rotary embeddings rotate pairs of channels."""
    if config.model.kv_channels % 2:
        yield Problem(
            "model.kv_channels",
            f"{config.model.kv_channels} is odd, but rotary embeddings rotate pairs of "
            "channels.\nUse an even number.",
        )


def tied_embedding_has_a_scale(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require branch norms for a tied embedding that starts at the head's scale.

    Without them the residual stream is mostly the input token's own row, and the tied head turns it
    into a logit of about sqrt(hidden_size): the first loss is many nats above ln(vocabulary).
    """
    model = config.model
    tied = not model.untie_embeddings_and_output_weights
    if tied and model.init == "muloco" and not model.post_layernorm:
        yield Problem(
            "model.untie_embeddings_and_output_weights",
            "false, but model.init is muloco and model.post_layernorm false; that initialisation "
            "has no scale\nfor a table that is embedding and output head without norms after the "
            "branches.\nUse model.init: megatron, or model.post_layernorm: true, or untie them.",
        )


def ffn_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that MLP rows divide evenly over tensor-parallel ranks."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_hidden_size
    if ffn % tp:
        yield Problem(
            "model.ffn_hidden_size",
            f"{ffn} is not divisible by tensor_model_parallel_size {tp}, but each rank holds an "
            "equal share of the MLP.\n"
            "Change one of them.",
        )


def vocabulary_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that the padded vocabulary divides evenly over tensor-parallel ranks."""
    tp, padded = config.parallel.tensor_model_parallel_size, padded_vocab_size(config.model)
    if padded % tp:
        yield Problem(
            "model.make_vocab_size_divisible_by",
            f"{config.model.make_vocab_size_divisible_by} pads the vocabulary to {padded}, which "
            f"tensor_model_parallel_size {tp} does not divide.\nThe padded size must not depend on "
            "the layout, so that a checkpoint fits every layout. Use a multiple of "
            f"{tp}.",
        )


def layers_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that pipeline stages without a number of their own share the rest evenly."""
    pp, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    given = {
        f"parallel.{key}": number
        for key in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (number := getattr(config.parallel, key)) is not None
    }
    others, rest = pp - len(given), layers - sum(given.values())
    if not given:
        if layers % pp:
            yield Problem("parallel.pipeline_model_parallel_size", _equal_stages(layers, pp))
    elif pp == 1:
        for key, number in given.items():
            yield Problem(
                key,
                f"{number}, but there is one pipeline stage, which holds all {layers} layers.\n"
                "Remove the key or use a larger parallel.pipeline_model_parallel_size.",
            )
    else:
        key = list(given)[-1]
        message = _uneven_stages(given[key], layers, rest, others)
        if message:
            yield Problem(key, message)


def _equal_stages(layers: int, pp: int) -> str:
    """Return why equal stages do not fit, with a number for the last stage that does."""
    message = (
        f"{pp} does not divide the {layers} layers, but without other keys all stages hold the "
        f"same number of layers.\nUse one of {_divisors(layers)}"
    )
    if layers < pp:
        return f"{message}."
    fewer = layers - (pp - 1) * -(-layers // pp)
    last = fewer if fewer > 0 else layers - (pp - 1) * (layers // pp)
    return f"{message}, or set parallel.num_layers_in_last_pipeline_stage, such as to {last}."


def _uneven_stages(number: int, layers: int, rest: int, others: int) -> str:
    """Return why the stages without a number cannot share the rest; nothing where they can.

    Args:
        number: Layers of one stage, as the config says.
        layers: Layers of the model.
        rest: Layers that no stage of the config holds.
        others: Stages without a number.
    """
    if not others and rest:
        return (
            f"{number}, but the two stages hold {layers - rest} layers then, and the model has "
            f"{layers}.\nRemove one of the two keys: the other stage holds the rest."
        )
    if rest < others:
        return (
            f"{number} of the {layers} layers, which leaves {max(0, rest)} for the other stages; "
            f"each of the {others} needs at least one.\nUse a smaller number."
        )
    if others and rest % others:
        more = number + rest % others
        fewer = f"{more - others} or " if more > others else ""
        return (
            f"{number} leaves {rest} of the {layers} layers for the {others} other stages, which "
            f"hold equal numbers.\nUse {fewer}{more}."
        )
    return ""


def sequence_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that sequence and context parallelism divide the sequence evenly."""
    parallel, length = config.parallel, config.model.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp > 1 and length % (2 * cp):
        yield Problem(
            "model.seq_length",
            f"{length} is not divisible by {2 * cp}, but each of the {cp} context-parallel ranks "
            "holds two chunks of a sequence.\n"
            "Change it or parallel.context_parallel_size.",
        )
    elif parallel.sequence_parallel and length // cp % tp:
        part = f"{length} / context_parallel_size {cp}" if cp > 1 else str(length)
        yield Problem(
            "model.seq_length",
            f"{part} is not divisible by tensor_model_parallel_size {tp}, over which "
            "sequence_parallel divides it.\nChange one of them or set sequence_parallel: false.",
        )


def context_parallel_attention_is_dense(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require an attention backend that can hide keys from a slice of the queries."""
    wanted, cp = config.model.attention_impl, config.parallel.context_parallel_size
    if cp > 1 and wanted not in ("auto", "dense"):
        yield Problem(
            "model.attention_impl",
            f"{wanted}, but with context_parallel_size {cp} a rank attends with slices of the "
            "sequences, for which only dense has a mask.\nUse auto or dense, or no context "
            "parallelism.",
        )


def batch_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require the same number of microbatches on every data-parallel rank."""
    batch = config.training.global_batch_size
    unit, product = _batch_unit(config, topology)
    if batch % unit:
        below = batch - batch % unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        yield Problem(
            "training.global_batch_size",
            f"{batch} is not divisible by {product}.\nIt is the number of sequences per inner step "
            f"over all replicas, and every rank takes the same share. Use {near}.",
        )


def rampup_reaches_the_batch(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require a ramp-up of the batch whose every stage divides over the ranks."""
    if config.training.rampup_batch_size is None:
        return
    batch = config.training.global_batch_size
    start, increment, _ = config.training.rampup_batch_size
    unit, product = _batch_unit(config, topology)
    if start >= batch or (batch - start) % increment:
        yield Problem(
            "training.rampup_batch_size",
            f"from {start} in increments of {increment} the batch does not reach "
            f"global_batch_size {batch}.\nUse a smaller start, and an increment that divides the "
            "difference.",
        )
    elif (batch - start) // increment > MOST_INCREMENTS:
        yield Problem(
            "training.rampup_batch_size",
            f"the batch would rise {(batch - start) // increment} times, and at most "
            f"{MOST_INCREMENTS} times are possible.\nUse a larger increment.",
        )
    elif start % unit or increment % unit:
        yield Problem(
            "training.rampup_batch_size",
            f"start {start} and increment {increment} are not both divisible by {product}.\nEvery "
            f"rank takes the same share of every batch. Use multiples of {unit}.",
        )


def _batch_unit(config: RunConfig, topology: Topology | None) -> tuple[int, str]:
    """Return the sequences of one forward pass of all ranks together, and the product in words."""
    layout, micro = topology or smallest_topology(config), config.training.micro_batch_size
    unit = layout.num_replicas * layout.data * micro
    words = f"{layout.num_replicas} replicas x dp {layout.data} x micro_batch_size {micro} = {unit}"
    return unit, words


def _divisors(number: int) -> str:
    """Return the divisors of a number, separated by commas."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(str(d) for d in sorted({*small, *(number // d for d in small)}))
