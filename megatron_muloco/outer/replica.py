"""What the outer step needs from the replica that it works for."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muloco.shards import Shard

__all__ = ["ReplicaPort"]


@dataclass(frozen=True)
class ReplicaPort:
    """One rank's access to its replica.

    All callables are collective over the replica: every one of its ranks calls them in the same
    order, also ranks without shards of the fragment at hand.

    Attributes:
        device: Where the masters are.
        shards: This rank's pieces, in an order that is the same at the same position of every
            replica. Pieces of parameters marked ``duplicate`` are not synchronised here.
        masters: Name to flat fp32 tensor of ``shard.numel`` elements; possibly views of parameters.
        total: Sums a small fp64 tensor over the ranks of the replica and returns the sum; bitwise
            equal on all of them.
        broadcast_duplicates: Gives the duplicates of the named parameters their owners' values,
            from masters to masters.
        publish: Copies masters to model parameters and gathers what other ranks need.
    """

    device: torch.device
    shards: Sequence[Shard]
    masters: Mapping[str, Tensor]
    total: Callable[[Tensor], Tensor]
    broadcast_duplicates: Callable[[Collection[str]], None]
    publish: Callable[[], None]

    def owned_names(self) -> tuple[str, ...]:
        """Return the names that this rank synchronises, in the order of ``shards``."""
        return tuple(shard.name for shard in self.shards if not shard.param.duplicate)
