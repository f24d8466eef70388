"""`ReplicatedBroadcast`: keeps replicated parameters identical inside a replica.

Two kinds of parameters exist on several ranks of one replica. Norms are the same on all
tensor-parallel ranks, and a tied output embedding on the last pipeline stage repeats the embedding
of the first. Their copies are in different outer groups, whose sums may differ in the order of
addition. Therefore only the primary rank (tensor-parallel rank 0; the first stage) takes part in
the outer step, and broadcasts its new values to the copies.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.errors import RuntimeMismatch, SyncError
from megatron_muloco.params import Shard

__all__ = ["ReplicatedBroadcast"]


class ReplicatedBroadcast:
    """Copies the masters of replicated parameters from their primary rank to the other ranks.

    Invariant: all copies have the same names and the same flat ranges (checked once).

    Args:
        groups: This rank's groups.
        shards: This rank's shards.
        masters: fp32 masters of the shards, by name.
        tied_name: Name of the tied embedding, or ``None`` when embeddings are untied.

    Raises:
        RuntimeMismatch: Copies are cut differently over data-parallel ranks.

    Collectives: the constructor gathers objects over the tensor-parallel group and, with tied
    embeddings, over the embedding group; every rank of the replica constructs it.
    """

    def __init__(
        self,
        groups: Groups,
        shards: Sequence[Shard],
        masters: Mapping[str, Tensor],
        *,
        tied_name: str | None,
    ) -> None:
        self._masters = masters
        pg = groups.pg
        replicated = [shard for shard in shards if shard.param.partition_dim is None]
        tied = [shard for shard in shards if shard.name == tied_name]
        self._routes: list[tuple[Any, list[Shard]]] = []
        if pg.tp.size() > 1:
            self._routes.append((pg.tp, replicated))
        if tied_name is not None and pg.embd is not None and pg.embd.size() > 1:
            self._routes.append((pg.embd, tied))
        for group, members in self._routes:
            _check_equal_ranges(group, members)
        self._routes = [(group, members) for group, members in self._routes if members]

    @torch.no_grad()
    def __call__(self, names: Collection[str]) -> None:
        """Overwrite the copies of the named parameters with the primary rank's masters.

        Collectives: a broadcast over the tensor-parallel group, and one over the embedding group on
        the first and last stage when embeddings are tied; 4 bytes per element. Every rank of the
        replica must call it with the same names.
        """
        wanted = frozenset(names)
        for group, members in self._routes:
            shards = [shard for shard in members if shard.name in wanted]
            if not shards:
                # On all ranks of the group alike. An empty broadcast is skipped, because gloo
                # would match a later message with it.
                continue
            flat = self._packed(shards)
            torch.distributed.broadcast(flat, group=group, group_src=0)
            for shard, piece in zip(shards, self._pieces(flat, shards), strict=True):
                self._masters[shard.name].copy_(piece)

    @torch.no_grad()
    def check(self, round_index: int) -> None:
        """Raise `SyncError` naming the first parameter whose copies differ in any bit.

        Only ranks that differ from their primary rank raise; their end ends the job.

        Collectives: as for the call, with the same bytes.
        """
        for group, shards in self._routes:
            mine = self._packed(shards)
            spoken = mine.clone()
            torch.distributed.broadcast(spoken, group=group, group_src=0)
            for shard, own, other in zip(
                shards, self._pieces(mine, shards), self._pieces(spoken, shards), strict=True
            ):
                if not torch.equal(own.view(torch.int32), other.view(torch.int32)):
                    rank = torch.distributed.get_rank()
                    holder = torch.distributed.get_global_rank(group, 0)
                    raise SyncError(
                        f"round {round_index}: {shard.name}: rank {rank} holds other values than "
                        f"rank {holder}, though both hold the same parameter. The copies inside "
                        "the replica have drifted apart. Resume from a checkpoint before this "
                        "round; if it happens again, suspect the hardware of one of them."
                    )

    def _packed(self, shards: Sequence[Shard]) -> Tensor:
        return torch.cat([self._masters[shard.name] for shard in shards])

    @staticmethod
    def _pieces(flat: Tensor, shards: Sequence[Shard]) -> Sequence[Tensor]:
        pieces: Sequence[Tensor] = flat.split([shard.numel for shard in shards])
        return pieces


def _check_equal_ranges(group: Any, shards: Sequence[Shard]) -> None:
    """Raise unless all ranks of ``group`` hold the same ranges of the replicated parameters."""
    mine = [(shard.name, shard.start, shard.end) for shard in shards]
    theirs: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(theirs, mine, group=group)
    if any(other != mine for other in theirs):
        raise RuntimeMismatch(
            "ranks that hold the same parameters shard them differently over data-parallel ranks: "
            f"{theirs}. The copies could not be kept equal. Give all of them the same settings of "
            "Megatron's distributed optimizer."
        )
