"""Divisibility: what must hold for a model and a batch to be dealt out evenly.

Each rule is a function; `checks` lists and runs them.
"""

from collections.abc import Iterator

from megatron_muloco.config.counts import padded_vocab_size
from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.config.problems import Problem
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.topology import Topology

__all__ = [
    "batch_divides",
    "ffn_divides",
    "head_width_is_even",
    "heads_divide",
    "layers_divide",
    "sequence_divides",
    "vocabulary_divides",
]


def heads_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Attention heads and query groups divide over tensor-parallel ranks and each other."""
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
            f"{tp} does not divide the {heads} attention heads; each rank holds whole heads.\n"
            f"Use one of {_divisors(heads)}.",
        )
    elif groups % tp:
        yield Problem(
            "parallel.tensor_model_parallel_size",
            f"{tp} does not divide the {groups} query groups; each rank holds whole groups.\n"
            f"Use one of {_divisors(groups)}.",
        )


def head_width_is_even(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Rotary embeddings turn pairs of channels."""
    if config.model.kv_channels % 2:
        yield Problem(
            "model.kv_channels",
            f"{config.model.kv_channels} is odd; rotary embeddings turn pairs of channels.\nUse an "
            "even number.",
        )


def ffn_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """MLP rows divide over tensor-parallel ranks."""
    tp, ffn = config.parallel.tensor_model_parallel_size, config.model.ffn_hidden_size
    if ffn % tp:
        yield Problem(
            "model.ffn_hidden_size",
            f"{ffn} is not divisible by tensor_model_parallel_size {tp}; each rank holds an equal "
            "share of the MLP.\nChange one of them.",
        )


def vocabulary_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Embedding rows divide over tensor-parallel ranks without padding that depends on them."""
    tp, padded = config.parallel.tensor_model_parallel_size, padded_vocab_size(config.model)
    if padded % tp:
        yield Problem(
            "model.make_vocab_size_divisible_by",
            f"{config.model.make_vocab_size_divisible_by} pads the vocabulary to {padded}, which "
            f"tensor_model_parallel_size {tp} does not divide.\nThe padded size may not depend on "
            "the layout, or a checkpoint would fit one layout only. Use a multiple of "
            f"{tp}.",
        )


def layers_divide(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Pipeline stages have equally many layers."""
    pp, layers = config.parallel.pipeline_model_parallel_size, config.model.num_layers
    if layers % pp:
        yield Problem(
            "parallel.pipeline_model_parallel_size",
            f"{pp} does not divide the {layers} layers; stages hold equally many.\nUse one of "
            f"{_divisors(layers)}.",
        )


def sequence_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Sequence parallelism divides the tokens of a sequence."""
    tp, length = config.parallel.tensor_model_parallel_size, config.model.seq_length
    if config.parallel.sequence_parallel and length % tp:
        yield Problem(
            "model.seq_length",
            f"{length} is not divisible by tensor_model_parallel_size {tp}, over which "
            "sequence_parallel divides it.\nChange one of them or set sequence_parallel: false.",
        )


def batch_divides(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Every data-parallel rank of every replica gets the same number of microbatches."""
    layout = topology or smallest_topology(config)
    micro, batch = config.training.micro_batch_size, config.training.global_batch_size
    unit = layout.num_replicas * layout.data * micro
    if batch % unit:
        below = batch - batch % unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        yield Problem(
            "training.global_batch_size",
            f"{batch} is not divisible by {layout.num_replicas} replicas x dp {layout.data} x "
            f"micro_batch_size {micro} = {unit}.\nIt counts sequences per inner step over all "
            f"replicas, and all ranks take equally many. Use {near}.",
        )


def _divisors(number: int) -> str:
    """Return the divisors of a number as text."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
