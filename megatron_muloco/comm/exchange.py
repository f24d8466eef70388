"""The all-to-all of the inner optimizer, as an object that does not show process groups."""

from collections.abc import Sequence
from typing import Any

import deepspeed.comm as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["AllToAll"]


class AllToAll:
    """All-to-all of flat buffers with uneven splits over one group."""

    def __init__(self, group: ProcessGroup) -> None:
        """Remember the group and this rank's place in it."""
        self._group = group
        self.size: int = dist.get_world_size(group=group)
        self.rank: int = dist.get_rank(group=group)

    def start(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> Any:
        """Start sending split i of ``sent`` to group rank i; return a handle.

        Neither buffer may be touched before the handle's ``wait()``; then ``received`` is filled in
        the order of ranks. On an accelerator ``wait()`` holds the current stream, not the host.

        Collectives: one ``all_to_all_single`` over the group. Every rank of the group must start
        it, in the same order among others, also a rank that sends and receives nothing; one that
        stays away blocks the others until the group's time limit.
        """
        return dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(receive_splits),
            input_split_sizes=list(send_splits),
            group=self._group,
            async_op=True,
        )

    def __call__(
        self,
        received: Tensor,
        sent: Tensor,
        *,
        receive_splits: Sequence[int],
        send_splits: Sequence[int],
    ) -> None:
        """Send split i of ``sent`` to group rank i; return when ``received`` is filled.

        Collectives: as `start`.
        """
        self.start(received, sent, receive_splits=receive_splits, send_splits=send_splits).wait()
