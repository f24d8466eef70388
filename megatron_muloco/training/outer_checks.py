"""Are replicas the same where they have to be? Asked after outer steps, never between them."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.digests import check_equal
from megatron_muloco.comm.duplicates import DuplicateBroadcast
from megatron_muloco.outer.report import OuterReport

__all__ = ["OuterChecks"]


class OuterChecks:
    """Compares anchors over replicas, and in debug mode duplicates inside them.

    Args:
        anchors: Of this rank's shards; the live tensors.
        duplicates: Of this rank's masters.
        group: The outer group.
        device: What the group's backend sends from.
        interval: Rounds between comparisons of the anchors; 0 is off.
        debug: Compare anchors and duplicates after every outer step instead.
    """

    def __init__(
        self,
        anchors: Mapping[str, Tensor],
        duplicates: DuplicateBroadcast,
        group: ProcessGroup,
        device: torch.device,
        *,
        interval: int,
        debug: bool,
    ) -> None:
        self._anchors, self._duplicates = anchors, duplicates
        self._group, self._device = group, device
        self._interval, self._debug = interval, debug

    def after(self, report: OuterReport) -> None:
        """Compare what is due after an outer step.

        Raises:
            SyncError: Names the first differing parameter, the round and the ranks.

        Collectives: 8 bytes a parameter over the outer group where a comparison is due; in debug
        mode also the duplicates over their ranks. Every rank calls it after every outer step.
        """
        # Each fragment is launched once a round; the first one stands for its round.
        in_turn = any(
            self._interval and part.fragment == 0 and part.round_index % self._interval == 0
            for part in report.applied
        )
        if in_turn or (self._debug and report.applied):
            self._compare_anchors(report.round_index)
        if self._debug and report.applied:
            self._duplicates.check(report.round_index)

    def at_the_end(self, report: OuterReport) -> None:
        """Compare once more after the flush, also in runs that are shorter than the interval."""
        if self._interval or self._debug:
            self._compare_anchors(report.round_index)
        if self._debug:
            self._duplicates.check(report.round_index)

    def _compare_anchors(self, round_index: int) -> None:
        check_equal(
            self._anchors, self._group, self._device, what="the anchor", round_index=round_index
        )
