"""The mean of tensors of which every replica sends only the largest values, once, to all others.

The union of K selections is K times as long as one of them, so the mean is not encoded again: every
rank decodes what all the others sent, and adds it up in replica order::

    launch   v = x + decay * e;  q = D(E(v));  e <- v - q;  all-gather [row | E(v)]
    wait     mean = sum w_k q_k / sum w_k, from the same bytes on all ranks, hence the same bits
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_muloco.comm.encoding import EncodingReducer
from megatron_muloco.comm.wire import Pending
from megatron_muloco.outer.reducer import Reduced

__all__ = ["GatheredMean"]


class GatheredMean(EncodingReducer):
    """Mean of encoded tensors that all ranks of the outer group decode for themselves.

    A rank's whole shard of a tensor is one coding unit.

    Collectives: `launch` starts an all-gather over the outer group, `wait` finishes it.
    Wire bytes a rank: ``K - 1`` times row and payload.
    """

    @property
    @override
    def _chunk_count(self) -> int:
        """The whole fragment."""
        return 1

    @override
    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        received = self._pool.take(self._size * sent.numel(), torch.uint8)
        return received, self._wire.all_gather(received, sent)

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        rows, payloads = self._arrived(handle)
        mean = {name: torch.zeros(size, device=self._device) for name, size in handle.layout.sizes}
        usable = [(k, weight) for k, weight in enumerate(rows[:, 0].tolist()) if weight]
        if usable:
            weights = [weight for _, weight in usable]
            with handle.clock("decode"):
                for piece, place in self._places(handle.chunks[0]):
                    units = [payloads[k, place] for k, _ in usable]
                    self._mean_of_units(piece, units, weights, mean[piece.name])
        sent, _ = handle.buffers
        return self._reduced(handle, mean, rows, (self._size - 1) * sent.numel())
