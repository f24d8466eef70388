"""Which flat ranges of a stage's parameters each data-parallel rank masters.

Megatron lays the parameters of a stage end to end in a buffer, the last one first, and cuts the
buffer into buckets, and every bucket into equal slices, one for each dp x cp rank::

    bucket   | head ..|norm .|fc2 ........|fc1 ........ pad |
    ranks    |      0       |       1       |       2       |

A parameter starts at a multiple of 64 elements, a bucket ends at one of lcm(ranks, 128). There is
one bucket, unless gradients are reduced while backward runs: then the first stage closes a bucket
as soon as it is large enough. A tied embedding that two stages hold has a bucket of its own.

Source: ``_ParamAndGradBuffer`` of megatron-core 0.16.1 and ``_compute_per_buffer_param_layout`` of
0.19.2, which have the same rules. A program with its own Megatron loop may choose another size of
buckets; then these ranges are not its.
"""

import math
from collections.abc import Collection, Sequence

from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.planning.parameters import EMBEDDING, stage_parameters
from megatron_muloco.shards import ParamInfo, Shard
from megatron_muloco.topology import Coords, Topology

__all__ = ["by_fragment", "cut_buffer", "rank_shards", "stage_shards"]

# megatron-core, both versions; elements.
_PARAMETER_START = 64
_BUCKET_END = 128
_LEAST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


def stage_shards(
    config: RunConfig, topology: Topology, *, stage: int, tp_rank: int
) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards of every dp x cp rank of one pipeline stage and tensor-parallel rank."""
    model = config.model
    bucket = None
    if config.training.overlap_grad_reduce and stage == 0:
        bucket = max(_LEAST_BUCKET, _BUCKET_PER_RANK * topology.data)
    tied = not model.untie_embeddings_and_output_weights and topology.pipeline > 1
    return cut_buffer(
        stage_parameters(model, topology, stage=stage, tp_rank=tp_rank),
        ranks=topology.sharding,
        bucket_elements=bucket,
        alone=(EMBEDDING,) if tied else (),
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
        parameters: Of one stage, in the order of its modules.
        ranks: Over which masters are divided: dp x cp.
        bucket_elements: Close a bucket that has as many; ``None`` never does.
        alone: Names that get a bucket of their own.
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
    """Deal the bucket from ``start`` to ``end`` out to all ranks; return where the next starts."""
    end = _round_up(end, math.lcm(len(shards), _BUCKET_END))
    length = (end - start) // len(shards)
    for param, place in members:
        first, last = (place - start) // length, (place + param.numel - 1 - start) // length
        for rank in range(first, last + 1):
            edge = start + rank * length - place  # where the rank's slice begins in the parameter
            shards[rank].append(Shard(param, max(0, edge), min(param.numel, edge + length)))
    members.clear()
    return end


def by_fragment(config: RunConfig, shards: Sequence[Shard]) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards that a rank exchanges, fragment by fragment; none without an outer step.

    Duplicates are not among them: another rank speaks for them.
    """
    outer = config.outer
    if isinstance(outer, NoOuter):
        return ()
    owned = {shard.name: shard for shard in shards if not shard.param.duplicate}
    plan = FragmentPlan.by_layer(
        owned,
        num_layers=config.model.num_layers,
        count=outer.fragments.count,
        pattern=outer.fragments.pattern,
    )
    return tuple(tuple(owned[name] for name in names) for names in plan.fragments)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
