"""The mean of encoded tensors: every value crosses the network twice, as a few bits.

`EncodedMean` cuts the fragment into K chunks, one for each rank of the outer group to own::

    launch   v = x + decay * e;  send E(v), chunk k to its owner;  e <- v - D(E(v))
             all-to-all   [row | E(chunk 0)] [row | E(chunk 1)] ...     row = [w_k, riders]
    wait     owner: m = sum w_k D(E(v_k)) / sum w_k;  z = m + decay * f;  f <- z - D(E(z))
             all-to-all   E(z) of the own chunk to everyone
             everyone: mean = D(E(z)), from the same bytes, hence the same bits

The second all-to-all is an all-gather of parts of different lengths, which gloo does not have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron_muloco.comm.buffers import Layout
from megatron_muloco.comm.chunks import (
    Piece,
    RowPlaces,
    chunk_pieces,
    encoded_wire_bytes,
    payload_sizes,
)
from megatron_muloco.comm.outer_group import OuterGroupReducer, finish
from megatron_muloco.compress.codec import Codec, from_bytes
from megatron_muloco.compress.feedback import ErrorFeedback
from megatron_muloco.outer.reducer import Reduced, ReductionStats

__all__ = ["EncodedMean"]


@dataclass(frozen=True, slots=True)
class _Launched:
    """A reduction under way: what `wait` needs, and what a message names."""

    fragment: int
    round_index: int
    layout: Layout
    chunks: tuple[tuple[Piece, ...], ...]
    sizes: list[int]
    rider_count: int
    buffers: tuple[Tensor, Tensor]  # sent and received; the network reads and writes them
    work: Work | None


class EncodedMean(OuterGroupReducer):
    """Mean of encoded tensors, encoded again, with the sum in fp32 at each chunk's owner.

    The sum runs in replica order: the same bits for any arrival order.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Where the tensors are and what the group's backend sends from.
        codec_of: The codec of a parameter; the same on all replicas.
        rows: Where the rows of the parameters begin in the shards of this rank.
        error_decay: Factor on residuals; ``None`` keeps none.

    Attributes:
        residual: e, by parameter; this replica's own.
        owner_residual: f, by parameter: the pieces that this rank owns.

    Collectives: `launch` starts an all-to-all over the outer group; `wait` finishes it and does a
    blocking one.
    Wire bytes a rank: `encoded_wire_bytes`.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        device: torch.device,
        codec_of: Callable[[str], Codec],
        rows: RowPlaces,
        error_decay: float | None,
    ) -> None:
        super().__init__(group, device)
        self._codec_of, self._rows = codec_of, rows
        has_feedback = error_decay is not None
        self.residual = ErrorFeedback(error_decay or 0.0) if has_feedback else None
        self.owner_residual = ErrorFeedback(error_decay or 0.0) if has_feedback else None

    def forget_residual(self) -> None:
        """Drop what this replica's codes lost: it restarts from the anchor. f stays."""
        if self.residual is not None:
            self.residual.forget()

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        riders: Tensor,
        *,
        round_index: int,
    ) -> _Launched:
        """See `Reducer.launch`."""
        layout = Layout.of(tensors)
        chunks = chunk_pieces(layout.sizes, self._size, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        row = self._row(weight, riders).view(torch.uint8)
        splits = [row.numel() + size for size in sizes]
        sent = self._pool.take(sum(splits), torch.uint8)
        payloads = []
        for slot in sent.split(splits):
            slot[: row.numel()] = row
            payloads.append(slot[row.numel() :].zero_())
        # A replica left out for its norm still keeps what its code lost; one that is not finite
        # has no code, and its residuals are about to be forgotten.
        if weight or all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            scratch = payloads if weight else [torch.empty_like(each) for each in payloads]
            self._encode_own(tensors, chunks, scratch)
        received, work = sent, None
        if self._size > 1:
            own = [splits[self._index]] * self._size
            received = self._pool.take(sum(own), torch.uint8)
            with self._named_errors("launch", fragment, round_index):
                work = dist.all_to_all_single(
                    received, sent, own, splits, group=self._group, async_op=True
                )
        return _Launched(
            fragment, round_index, layout, chunks, sizes, riders.numel(), (sent, received), work
        )

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        assert isinstance(handle, _Launched)
        _, received = handle.buffers
        with self._named_errors("apply", handle.fragment, handle.round_index):
            finish(handle.work)
        table = received.view(self._size, -1)
        row_bytes = 4 * (1 + handle.rider_count)
        rows = from_bytes(table[:, :row_bytes].flatten(), torch.float32).view(self._size, -1).cpu()
        weights = rows[:, 0].clone()
        own = self._encode_mean(handle.chunks[self._index], table[:, row_bytes:], weights.tolist())
        with self._named_errors("apply", handle.fragment, handle.round_index):
            encoded = self._gather(own, handle.sizes)
        for buffer in {id(b): b for b in handle.buffers}.values():
            self._pool.give(buffer)
        mean = {name: torch.zeros(size, device=self._device) for name, size in handle.layout.sizes}
        if weights.any():
            for pieces, payload in zip(handle.chunks, encoded.split(handle.sizes), strict=True):
                self._decode(pieces, payload, mean)
        wire_bytes = encoded_wire_bytes(handle.sizes, self._index, handle.rider_count)
        return Reduced(mean, ReductionStats(weights, rows[:, 1:].clone(), wire_bytes))

    # ---- the two encodings ------------------------------------------------------------------

    def _encode_own(
        self,
        tensors: Mapping[str, Tensor],
        chunks: Sequence[Sequence[Piece]],
        payloads: Sequence[Tensor],
    ) -> None:
        values = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.residual is not None:
            for name, tensor in values.items():
                self.residual.add_to(name, tensor)
        for pieces, payload in zip(chunks, payloads, strict=True):
            self._encode(pieces, values, payload)
        if self.residual is not None:
            decoded = {name: torch.empty_like(tensor) for name, tensor in values.items()}
            for pieces, payload in zip(chunks, payloads, strict=True):
                self._decode(pieces, payload, decoded)
            for name, tensor in values.items():
                self.residual.keep(name, tensor, decoded[name])

    def _encode_mean(
        self, pieces: Sequence[Piece], received: Tensor, weights: Sequence[float]
    ) -> Tensor:
        """Return the payload of the mean of this rank's chunk; zeros where nobody has a weight."""
        payload = torch.zeros(received.shape[1], dtype=torch.uint8, device=self._device)
        usable = [row for row, weight in zip(received, weights, strict=True) if weight]
        if not usable:
            return payload
        start = 0
        for piece in pieces:
            codec, unit = self._codec_of(piece.name), piece.unit
            end = start + codec.payload_bytes(unit)
            mean, term = torch.empty(2, unit.numel, device=self._device)
            codec.decode(usable[0][start:end], unit, mean)
            for row in usable[1:]:
                codec.decode(row[start:end], unit, term)
                mean += term
            mean /= len(usable)
            if self.owner_residual is not None:
                self.owner_residual.add_to(piece.name, mean)
            payload[start:end] = codec.encode(mean, unit)
            if self.owner_residual is not None:
                decoded = torch.empty_like(mean)
                codec.decode(payload[start:end], unit, decoded)
                self.owner_residual.keep(piece.name, mean, decoded)
            start = end
        return payload

    def _encode(
        self, pieces: Sequence[Piece], values: Mapping[str, Tensor], payload: Tensor
    ) -> None:
        for piece, slot in self._slots(pieces, payload):
            flat = values[piece.name][piece.start : piece.end]
            slot.copy_(self._codec_of(piece.name).encode(flat, piece.unit))

    def _decode(self, pieces: Sequence[Piece], payload: Tensor, into: Mapping[str, Tensor]) -> None:
        for piece, slot in self._slots(pieces, payload):
            out = into[piece.name][piece.start : piece.end]
            self._codec_of(piece.name).decode(slot, piece.unit, out)

    def _slots(self, pieces: Sequence[Piece], payload: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        sizes = [self._codec_of(piece.name).payload_bytes(piece.unit) for piece in pieces]
        return zip(pieces, payload.split(sizes) if sizes else (), strict=True)

    def _gather(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        if self._size == 1:
            return own
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        copies = own.repeat(self._size)
        dist.all_to_all_single(
            gathered, copies, list(sizes), [own.numel()] * self._size, group=self._group
        )
        return gathered
