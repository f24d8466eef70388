"""The mean of encoded tensors: every value crosses the network twice, as a few bits.

`EncodedMean` cuts the fragment into K chunks, one for each rank of the outer group to own::

    launch   v = x + decay * e;  send E(v), chunk k to its owner;  e <- v - D(E(v))
             all-to-all   [row | E(chunk 0)] [row | E(chunk 1)] ...     row = [w_k, riders]
    wait     owner: m = sum w_k D(E(v_k)) / sum w_k;  z = m + decay * f;  f <- z - D(E(z))
             all-to-all   E(z) of the own chunk to everyone
             everyone: mean = D(E(z)), from the same bytes, hence the same bits

The second all-to-all is an all-gather of parts of different lengths, which gloo does not have.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from megatron_muloco.comm.buffers import Layout
from megatron_muloco.comm.chunks import (
    Piece,
    RowPlaces,
    chunk_length,
    chunk_pieces,
    encoded_wire_bytes,
)
from megatron_muloco.comm.encoding import EncodingReducer
from megatron_muloco.comm.outer_group import Stopwatch
from megatron_muloco.comm.wire import Pending
from megatron_muloco.compress.codec import Codec
from megatron_muloco.compress.feedback import ErrorFeedback, encode
from megatron_muloco.outer.reducer import Reduced, Residuals, Sizes

__all__ = ["EncodedMean"]


class EncodedMean(EncodingReducer):
    """Mean of encoded tensors, encoded again, with the sum in fp32 at each chunk's owner.

    The sum runs in replica order: the same bits for any arrival order.

    Args:
        group: See `EncodingReducer`, also for the others.
        device: Where the tensors are.
        codec_of: The codec of a parameter.
        rows: Where the rows of the parameters begin.
        error_decay: Factor on residuals; ``None`` keeps none.
        through_host: Whether tensors travel through host memory.

    Attributes:
        owner_residual: f, by parameter: the pieces that this rank owns.

    Collectives: `launch` starts an all-to-all over the outer group; `wait` finishes it and does a
    second one.
    Wire bytes a rank: `encoded_wire_bytes`.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        device: torch.device,
        codec_of: Callable[[str], Codec],
        rows: RowPlaces,
        error_decay: float | None,
        *,
        through_host: bool = False,
    ) -> None:
        super().__init__(group, device, codec_of, rows, error_decay, through_host=through_host)
        self.owner_residual = None if error_decay is None else ErrorFeedback(error_decay)
        self.residual_kinds = () if error_decay is None else ("residual", "owner_residual")

    @property
    @override
    def _chunk_count(self) -> int:
        """One for each rank to own."""
        return self._size

    @override
    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        own = [splits[self._index]] * self._size
        received = self._pool.take(sum(own), torch.uint8)
        return received, self._wire.all_to_all(
            received, sent, receive_splits=own, send_splits=splits
        )

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        rows, payloads = self._arrived(handle)
        weights: list[float] = rows[:, 0].tolist()
        pieces = handle.chunks[self._index]
        with self._named_values("the mean and its residual", handle.fragment, handle.round_index):
            own = self._encode_mean(pieces, payloads, weights, handle.clock)
        with self._named_errors("apply", handle.fragment, handle.round_index):
            encoded = self._gather(own, handle.sizes)
        mean = {name: torch.zeros(size, device=self._device) for name, size in handle.layout.sizes}
        if any(weights):
            with handle.clock("decode"):
                for pieces, payload in zip(handle.chunks, encoded.split(handle.sizes), strict=True):
                    self._decode(pieces, payload, mean)
        sent = encoded_wire_bytes(handle.sizes, self._index, handle.row_bytes // 4 - 1)
        return self._reduced(handle, mean, rows, sent)

    def _encode_mean(
        self,
        pieces: Sequence[Piece],
        received: Tensor,
        weights: Sequence[float],
        clock: Stopwatch,
    ) -> Tensor:
        """Return the payload of the mean of this rank's chunk; zeros where nobody has a weight."""
        payload = torch.zeros(received.shape[1], dtype=torch.uint8, device=self._device)
        usable = [index for index, weight in enumerate(weights) if weight]
        if not usable:
            return payload
        for piece, place in self._places(pieces):
            mean, kept = torch.zeros(piece.unit.numel, device=self._device), None
            with clock("decode"):
                units = [received[index, place] for index in usable]
                self._mean_of_units(piece, units, [weights[index] for index in usable], mean)
            if self.owner_residual is not None:
                kept = self.owner_residual.of(piece.name, piece.unit.numel, self._device)
            decay = self.owner_residual.decay if self.owner_residual else 0.0
            with clock("encode"):
                encode(self._codec_of(piece.name), piece.unit, mean, payload[place], kept, decay)
        return payload

    def _decode(self, pieces: Sequence[Piece], payload: Tensor, into: Mapping[str, Tensor]) -> None:
        for piece, place in self._places(pieces):
            out = into[piece.name][piece.start : piece.end]
            self._codec_of(piece.name).decode(payload[place], piece.unit, out)

    def _gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return everybody's payload; all-to-all, because gloo gathers equal sizes only."""
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        self._wire.all_to_all(
            gathered,
            own.repeat(self._size),
            receive_splits=sizes,
            send_splits=[own.numel()] * self._size,
        ).wait()
        return gathered

    # ---- f, which its owners share when it is saved -----------------------------------------

    @override
    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        if self.owner_residual is None:
            return {}
        owners: dict[str, Tensor] = {}
        for sizes in fragments:
            owners |= self._from_owners(sizes)
        return {**super().residuals(fragments), "owner_residual": owners}

    @override
    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        super().load_residuals(residuals, fragments)
        if self.owner_residual is not None:
            owners = residuals.get("owner_residual", {})
            owned = {
                piece.name: owners[piece.name][piece.start : piece.end]
                for sizes in fragments
                for piece in self._owned(sizes)
                if piece.name in owners
            }
            self.owner_residual.load(self._here(owned))

    def _from_owners(self, sizes: Sizes) -> dict[str, Tensor]:
        """Return f of a fragment's tensors, each piece from its owner."""
        assert self.owner_residual is not None
        length = chunk_length(list(sizes.items()), self._size)
        own, start = torch.zeros(length, device=self._device), 0
        for piece in self._owned(sizes):
            place = own[start : start + piece.unit.numel]
            place.copy_(self.owner_residual.of(piece.name, piece.unit.numel, self._device))
            start += piece.unit.numel
        gathered = torch.empty(self._size * length, device=self._device)
        self._wire.all_gather(gathered, own).wait()
        return Layout(tuple(sizes.items())).unpack(gathered)

    def _owned(self, sizes: Sizes) -> tuple[Piece, ...]:
        return chunk_pieces(list(sizes.items()), self._size, self._rows)[self._index]
