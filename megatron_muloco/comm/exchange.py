"""The all-to-all of the inner optimizer, as an object that does not show process groups."""

from collections.abc import Sequence

import deepspeed.comm as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["AllToAll"]


class AllToAll:
    """Blocking all-to-all of flat buffers with uneven splits over one group."""

    def __init__(self, group: ProcessGroup) -> None:
        """Remember the group and this rank's place in it."""
        self._group = group
        self.size: int = dist.get_world_size(group=group)
        self.rank: int = dist.get_rank(group=group)

    def __call__(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> None:
        """Send split i of ``sent`` to group rank i; fill ``received`` in the order of ranks.

        Collectives: one ``all_to_all_single`` over the group, blocking. Every rank of the group
        must call it, also one that sends and receives nothing; a rank that stays away blocks the
        others until the group's time limit.
        """
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(receive_splits),
            input_split_sizes=list(send_splits),
            group=self._group,
        )
