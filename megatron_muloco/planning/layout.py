"""Layout of a model over ranks, from the config: parameters, shards and Muon matrices of a stage.

It predicts, without building the model, what Megatron and this package will do with it:

- `stage_parameters`: the parameters of one rank's module, in the order of Megatron's modules. This
  order decides everything that is laid end to end: gradient buffer, fragments, chunks.
- `stage_shards`: the flat ranges whose fp32 masters each data-parallel rank holds.
- `stage_slices`: numbers of elements by kind.
- `stage_matrices`: the Muon matrices of a stage.
- `stage_flops`: FLOPs of every stage, and `best_split`, the split that balances them best.

Megatron lays the parameters of a stage end to end in a buffer, the last one first. It cuts the
buffer into buckets, and every bucket into equal slices, one for each dp x cp rank::

    bucket   | head ..|norm .|fc2 ........|fc1 ........ pad |
    ranks    |      0       |       1       |       2       |

A parameter starts at a multiple of 64 elements, and a bucket ends at a multiple of lcm(ranks, 128).
There is one bucket, unless gradients are reduced while backward runs: then the first stage closes a
bucket as soon as it is large enough. A tied embedding that two stages hold has its own bucket.

Source: ``_ParamAndGradBuffer`` of megatron-core 0.16.1 and ``_compute_per_buffer_param_layout`` of
0.19.2, which have the same rules. They do not hold for a program with its own Megatron loop and
another bucket size.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from megatron_muloco.config.derived import padded_vocab_size, stage_layers
from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import ModelConfig, RunConfig
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.optim.matrices import (
    LayerShape,
    MuonMatrix,
    implementation_for,
    is_vector,
    split,
)
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.params import GPT_NAMES, ParamInfo, Shard
from megatron_muloco.topology import Coords, Topology

__all__ = [
    "BYTES",
    "Slice",
    "Split",
    "best_split",
    "by_fragment",
    "cut_buffer",
    "rank_shards",
    "stage_flops",
    "stage_matrices",
    "stage_parameters",
    "stage_shards",
    "stage_slices",
]


# ------------------------------------------------------------------------------------------
# Parameters of one rank's module.


def stage_parameters(
    config: RunConfig, topology: Topology, *, stage: int, tp_rank: int
) -> tuple[ParamInfo, ...]:
    """Return the parameters that `model.names.describe_parameters` finds in a built stage.

    Args:
        config: The run.
        topology: Topology; only tensor and pipeline sizes matter.
        stage: Pipeline stage.
        tp_rank: Place in the tensor-parallel group. Norms are replicated over the group, and rank
            0 is their primary rank.
    """
    model, tensor = config.model, topology.tensor
    first, last = stage == 0, stage == topology.pipeline - 1
    table = (padded_vocab_size(model) // tensor, model.hidden_size)
    parameters = []
    if first:
        parameters.append(ParamInfo.from_name(GPT_NAMES.embedding, table, 0))
    for layer in stage_layers(config, topology)[stage]:
        parameters += [
            ParamInfo.from_name(
                GPT_NAMES.in_layer(layer, f"{name}.weight"),
                shape,
                dim,
                is_primary=dim is not None or tp_rank == 0,
            )
            for name, shape, dim in _layer(model, tensor)
        ]
    if last:
        parameters.append(
            ParamInfo.from_name(
                "decoder.final_layernorm.weight",
                (model.hidden_size,),
                None,
                is_primary=tp_rank == 0,
            )
        )
    if last and model.untie_embeddings_and_output_weights:
        parameters.append(ParamInfo.from_name(GPT_NAMES.output, table, 0))
    elif last and not first:  # a tied head repeats the embedding, whose name it has
        parameters.append(ParamInfo.from_name(GPT_NAMES.embedding, table, 0, is_primary=False))
    return tuple(parameters)


def _layer(model: ModelConfig, tensor: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Yield name, local shape and partition dimension of one layer's parameters."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    yield "input_layernorm", (hidden,), None
    yield "self_attention.linear_proj", (hidden, queries // tensor), 1
    if model.post_layernorm:
        yield "self_attention.linear_proj.post_norm", (hidden,), None
    yield "self_attention.linear_qkv", ((queries + 2 * keys) // tensor, hidden), 0
    if model.qk_layernorm:
        yield "self_attention.q_layernorm", (head,), None
        yield "self_attention.k_layernorm", (head,), None
    yield "pre_mlp_layernorm", (hidden,), None
    yield "mlp.linear_fc1", (2 * ffn // tensor, hidden), 0
    yield "mlp.linear_fc2", (hidden, ffn // tensor), 1
    if model.post_layernorm:
        yield "mlp.linear_fc2.post_norm", (hidden,), None


# ------------------------------------------------------------------------------------------
# Shards of the data-parallel ranks.

# megatron-core, both versions; in elements.
_PARAMETER_START = 64
_BUCKET_END = 128
_LEAST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


def stage_shards(
    config: RunConfig, topology: Topology, *, stage: int, tp_rank: int
) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards of every dp x cp rank of one pipeline stage and tensor-parallel rank."""
    bucket = None
    if config.training.overlap_grad_reduce and stage == 0:
        bucket = max(_LEAST_BUCKET, _BUCKET_PER_RANK * topology.data)
    tied = not config.model.untie_embeddings_and_output_weights and topology.pipeline > 1
    return cut_buffer(
        stage_parameters(config, topology, stage=stage, tp_rank=tp_rank),
        ranks=topology.sharding,
        bucket_elements=bucket,
        alone=(GPT_NAMES.embedding,) if tied else (),
    )


def rank_shards(config: RunConfig, topology: Topology, coords: Coords) -> tuple[Shard, ...]:
    """Return one rank's non-empty shards, in the order of the stage's parameters."""
    stage = stage_shards(config, topology, stage=coords.pp, tp_rank=coords.tp)
    return stage[coords.dp * topology.context + coords.cp]


def cut_buffer(
    parameters: Sequence[ParamInfo],
    *,
    ranks: int,
    bucket_elements: int | None = None,
    alone: Collection[str] = (),
) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards of every rank, each rank's in the order of ``parameters``.

    Args:
        parameters: Parameters of one stage, in the order of its modules.
        ranks: Number of ranks over which masters are divided, dp x cp.
        bucket_elements: Size from which a bucket is closed; ``None`` for one bucket.
        alone: Names of parameters with their own bucket.
    """
    shards: list[list[Shard]] = [[] for _ in range(ranks)]
    members: list[tuple[ParamInfo, int]] = []
    start = position = 0
    for param in reversed(parameters):
        position = _round_up(position, _PARAMETER_START)
        if members and param.name in alone:
            start = position = _close(shards, members, start, position)
        members.append((param, position))
        position += param.numel
        full = bucket_elements is not None and position - start >= bucket_elements
        if full or param.name in alone:
            start = position = _close(shards, members, start, position)
    if members:
        _close(shards, members, start, position)
    return tuple(tuple(reversed(of_rank)) for of_rank in shards)


def _close(
    shards: list[list[Shard]], members: list[tuple[ParamInfo, int]], start: int, end: int
) -> int:
    """Divide the bucket from ``start`` to ``end`` over all ranks; return where the next starts."""
    end = _round_up(end, math.lcm(len(shards), _BUCKET_END))
    length = (end - start) // len(shards)
    for param, place in members:
        first, last = (place - start) // length, (place + param.numel - 1 - start) // length
        for rank in range(first, last + 1):
            edge = start + rank * length - place  # the slice's begin, relative to the parameter
            shards[rank].append(Shard(param, max(0, edge), min(param.numel, edge + length)))
    members.clear()
    return end


def by_fragment(config: RunConfig, shards: Sequence[Shard]) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards that a rank sends in outer steps, by fragment; none without outer steps.

    Copies of replicated parameters are not among them: only the primary rank sends those.
    """
    outer = config.outer
    if isinstance(outer, NoOuter):
        return ()
    owned = {shard.name: shard for shard in shards if shard.param.is_primary}
    plan = FragmentPlan.from_config(
        outer, (shard.param for shard in owned.values()), num_layers=config.model.num_layers
    )
    return tuple(tuple(owned[name] for name in names) for names in plan.fragments)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# ------------------------------------------------------------------------------------------
# Elements of one rank's module, by kind.


BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements in the module of each tensor-parallel rank of one pipeline stage.

    Attributes:
        stage: Index of the pipeline stage.
        matrices: Elements of attention and MLP matrices.
        vectors: Elements of embedding, output head and RMSNorm weights. The first two are divided
            over tensor-parallel ranks, norms are whole on each. With more than one stage a tied
            head is a second copy of the embedding.
    """

    stage: int
    matrices: int
    vectors: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.matrices + self.vectors


def stage_slices(config: RunConfig, topology: Topology) -> tuple[Slice, ...]:
    """Return the slice of every pipeline stage, in order."""
    slices = []
    for stage in range(topology.pipeline):
        parameters = stage_parameters(config, topology, stage=stage, tp_rank=0)
        vectors = sum(param.numel for param in parameters if is_vector(param))
        total = sum(param.numel for param in parameters)
        slices.append(Slice(stage, total - vectors, vectors))
    return tuple(slices)


# ------------------------------------------------------------------------------------------
# Muon matrices of one pipeline stage.


def stage_matrices(
    config: RunConfig, topology: Topology, *, stage: int, accelerator: bool
) -> tuple[MuonMatrix, ...]:
    """Return the Muon matrices of a pipeline stage, as its parameter table has them.

    With AdamW there are none.

    Args:
        config: The run.
        topology: Topology; only tensor and pipeline sizes matter.
        stage: Pipeline stage.
        accelerator: Whether ranks have an accelerator. It decides the Newton-Schulz implementation,
            and with it the cost of a matrix.
    """
    if not isinstance(config.inner, MuonInner):
        return ()
    model, tensor, muon = config.model, topology.tensor, config.inner.muon
    shape = LayerShape.from_config(model)
    parameters = stage_parameters(config, topology, stage=stage, tp_rank=0)
    return tuple(
        matrix
        for param in parameters  # the order of the modules breaks ties between owners
        if not is_vector(param)
        for matrix in split(
            param,
            shape,
            tensor_size=tensor,
            steps=muon.num_ns_steps,
            split_heads=muon.split_heads,
            choose_impl=implementation_for(muon, accelerator=accelerator),
        )
    )


# ------------------------------------------------------------------------------------------
# FLOPs of the pipeline stages.

# Per logit: maximum, difference, exponential and sum; backward multiplies once.
_LOSS_FORWARD = 4
_LOSS_BACKWARD = 1


@dataclass(frozen=True, slots=True)
class Split:
    """Layers of the first, of each middle, and of the last pipeline stage.

    Attributes:
        first: Layers of the first stage.
        middle: Layers of every stage between the first and the last; 0 where there is none.
        last: Layers of the last stage.
        balance: FLOPs of the fullest stage over the mean of all stages; 1 is perfect.
    """

    first: int
    middle: int
    last: int
    balance: float


def stage_flops(config: RunConfig, topology: Topology) -> tuple[float, ...]:
    """Return the FLOPs that every pipeline stage computes for one token, forward and backward.

    Besides its layers, which includes what backward recomputes, the last stage has the output head
    and the loss. The embedding is a lookup and counts nothing.
    """
    layers = stage_layers(config, topology)
    return tuple(
        _flops_of(config, len(own), is_last=stage == len(layers) - 1)
        for stage, own in enumerate(layers)
    )


def best_split(config: RunConfig, topology: Topology) -> Split:
    """Return the split of the layers with the least work on the fullest of at least two stages.

    Among splits of equal balance, the one whose stages differ least in their numbers of layers.
    """
    stages, layers = topology.pipeline, config.model.num_layers
    between = stages - 2
    splits = []
    for first in range(1, layers):
        for last in range(1, layers - first + 1):
            middle, left_over = divmod(layers - first - last, max(1, between))
            if left_over or bool(middle) != bool(between):
                continue
            flops = [_flops_of(config, number, is_last=False) for number in (first, middle)]
            flops.append(_flops_of(config, last, is_last=True))
            total = flops[0] + between * flops[1] + flops[2]
            splits.append(Split(first, middle, last, max(flops) * stages / total))
    return min(splits, key=lambda split: (split.balance, _spread(split)))


def _spread(split: Split) -> int:
    """Return by how many layers the stages of a split differ."""
    numbers = [n for n in (split.first, split.middle, split.last) if n]
    return max(numbers) - min(numbers)


def _flops_of(config: RunConfig, layers: int, *, is_last: bool) -> float:
    """Return the FLOPs of a stage with this many layers."""
    model, training = config.model, config.training
    parts = flops_per_token(model)
    layer, recomputed = (parts.forward - parts.logits) / model.num_layers, 0.0
    if training.recompute_granularity == "selective":
        recomputed = layers * parts.scores / model.num_layers
    elif training.recompute_granularity == "full":
        block = training.recompute_method == "block"
        recomputed = layer * (min(layers, training.recompute_num_layers or 1) if block else layers)
    loss = (_LOSS_FORWARD + _LOSS_BACKWARD) * padded_vocab_size(model)
    return 3 * layers * layer + recomputed + is_last * (3 * parts.logits + loss)
