"""Do ranks at the same position of their replicas hold the same pieces? Asked once."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.shards import Shard

__all__ = ["check_same_shards"]


def check_same_shards(group: ProcessGroup, shards: Sequence[Shard]) -> None:
    """Raise on every rank of the outer group unless all hold the same shards in the same order.

    Sums over replicas pair elements by their place in a flat buffer: of different pieces they would
    be finite, plausible and wrong.

    Collectives: a blocking object gather over ``group``; all its ranks call it.

    Raises:
        RuntimeMismatch: Names the first difference and the ranks.
    """
    mine = [_description(shard) for shard in shards]
    by_rank: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(by_rank, mine, group=group)
    ranks = get_process_group_ranks(group)
    for rank, theirs in zip(ranks, by_rank, strict=True):
        if theirs == by_rank[0]:
            continue
        pairs = zip_longest(by_rank[0], theirs, fillvalue="nothing")
        here, there = next((here, there) for here, there in pairs if here != there)
        raise RuntimeMismatch(
            f"ranks {ranks[0]} and {rank} are at the same position of their replicas, but rank "
            f"{ranks[0]} holds {here} where rank {rank} holds {there}. Their pseudogradients could "
            "not be averaged. Give every replica the same model, the same parallel sizes and the "
            "same settings of Megatron's distributed optimizer."
        )


def _description(shard: Shard) -> str:
    copy = ", a duplicate" if shard.param.duplicate else ""
    shape = "x".join(map(str, shard.param.local_shape))
    return f"{shard.name} [{shape}] from {shard.start} to {shard.end}{copy}"
