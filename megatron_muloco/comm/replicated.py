"""Parameters that several ranks of one replica hold: one of them speaks, the others listen.

Two kinds exist: norms are the same on all tensor-parallel ranks, and a tied output embedding on the
last pipeline stage repeats the embedding of the first. Their copies sit in different outer groups,
which may add in different orders, so only the holder (tensor-parallel rank 0; the first stage)
takes part in the outer step and then hands its new values to the copies.
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
    """Copies the holders' masters to their duplicates inside the replica.

    Invariant: holder and duplicates have the same names and the same flat ranges (checked once).

    Args:
        groups: This rank's groups.
        shards: This rank's shards.
        masters: Their fp32 masters, by name.
        tied_name: Name of the tied embedding, or ``None`` when embeddings are untied.
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
        """Overwrite the duplicates of the named parameters.

        Collectives: a broadcast over the tensor-parallel group, and one over the embedding group on
        the first and last stage when embeddings are tied; 4 bytes an element. Every rank
        of the replica must call it with the same names.
        """
        wanted = frozenset(names)
        for group, members in self._routes:
            shards = [shard for shard in members if shard.name in wanted]
            if not shards:
                continue  # on all ranks of the group; gloo takes a later message for an empty one
            flat = self._packed(shards)
            torch.distributed.broadcast(flat, group=group, group_src=0)
            for shard, piece in zip(shards, self._pieces(flat, shards), strict=True):
                self._masters[shard.name].copy_(piece)

    @torch.no_grad()
    def check(self, round_index: int) -> None:
        """Raise `SyncError` naming the first parameter whose copies differ in any bit.

        Only ranks that differ from their holder raise; the job ends with them.

        Collectives: as the call, sending the same bytes.
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
                        f"rank {holder}, though both hold the same parameter; the replica's copies "
                        "have drifted apart. Resume from a checkpoint before this round; if it "
                        "happens again, suspect the hardware of one of them."
                    )

    def _packed(self, shards: Sequence[Shard]) -> Tensor:
        return torch.cat([self._masters[shard.name] for shard in shards])

    @staticmethod
    def _pieces(flat: Tensor, shards: Sequence[Shard]) -> Sequence[Tensor]:
        pieces: Sequence[Tensor] = flat.split([shard.numel for shard in shards])
        return pieces


def _check_equal_ranges(group: Any, shards: Sequence[Shard]) -> None:
    """All ranks of ``group`` must hold the same ranges of the duplicated parameters."""
    mine = [(shard.name, shard.start, shard.end) for shard in shards]
    theirs: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(theirs, mine, group=group)
    if any(other != mine for other in theirs):
        raise RuntimeMismatch(
            "ranks that hold the same parameters shard them differently over data parallelism: "
            f"{theirs}. Copies could not be kept equal."
        )
