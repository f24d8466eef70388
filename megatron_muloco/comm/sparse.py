"""The mean of tensors of which every replica sends only the largest values, once, to all others.

The union of K selections is K times as long as one of them, so the mean is not encoded again: every
rank decodes what all the others sent, and adds it up in replica order::

    launch   v = x + decay * e;  q = D(E(v));  e <- v - q;  all-gather [row | E(v)]
    wait     mean = sum w_k q_k / sum w_k, from the same bytes on all ranks, hence the same bits
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.buffers import Layout
from megatron_muloco.comm.chunks import chunk_pieces, payload_sizes
from megatron_muloco.comm.encoding import EncodingReducer, LaunchedCode
from megatron_muloco.comm.outer_group import Stopwatch
from megatron_muloco.outer.reducer import Reduced

__all__ = ["GatheredMean"]


class GatheredMean(EncodingReducer):
    """Mean of encoded tensors that all ranks of the outer group decode for themselves.

    A rank's whole shard of a tensor is one coding unit.

    Collectives: `launch` starts an all-gather over the outer group, `wait` finishes it.
    Wire bytes a rank: ``K - 1`` times row and payload.
    """

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        riders: Tensor,
        *,
        round_index: int,
    ) -> LaunchedCode:
        """See `Reducer.launch`."""
        layout, clock = Layout.of(tensors), Stopwatch()
        chunks = chunk_pieces(layout.sizes, 1, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        row = self._row(weight, riders).view(torch.uint8)
        sent, payloads = self._buffer(row, sizes)
        with clock("encode"):
            squares = self._encode_chunks(tensors, chunks, payloads, weight)
        received = self._pool.take(self._size * sent.numel(), torch.uint8)
        with self._named_errors("launch", fragment, round_index):
            pending = self._wire.all_gather(received, sent)
        return LaunchedCode(
            fragment,
            round_index,
            layout,
            chunks,
            sizes,
            row.numel(),
            (sent, received),
            pending,
            squares,
            clock,
        )

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
