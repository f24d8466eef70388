"""Compressed weighted means over the outer group, with error feedback.

`CompressedAllReduce` sends every value twice, each time in a few bits. It cuts the fragment into K
chunks; rank k of the outer group owns chunk k::

    launch   v = x + decay * e;  send E(v), chunk k to its owner;  e <- v - D(E(v))
             all-to-all   [row | E(chunk 0)] [row | E(chunk 1)] ...     row = [w_k, metadata]
    wait     owner: m = sum w_k D(E(v_k)) / sum w_k;  z = m + decay * f;  f <- z - D(E(z))
             all-to-all   E(z) of the own chunk to every rank
             every rank: mean = D(E(z)), from the same bytes, hence the same bits

`CompressedAllGather` is for codecs that send only the largest values. The union of K selections is
up to K times as long as one of them, so the mean is not encoded again. Every rank decodes the
payloads of all others and adds them in replica order::

    launch   v = x + decay * e;  q = D(E(v));  e <- v - q;  all-gather [row | E(v)]
    wait     mean = sum w_k q_k / sum w_k, from the same bytes on all ranks, hence the same bits

E and D are encoding and decoding, e and f the residuals of error feedback.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from megatron_muloco.comm.chunking import (
    Piece,
    RowPlaces,
    chunk_length,
    chunk_pieces,
    encoded_wire_bytes,
    payload_sizes,
    uncoded_wire_bytes,
)
from megatron_muloco.comm.collectives import Layout, Pending
from megatron_muloco.comm.reducers import OuterGroupReducer, Stopwatch
from megatron_muloco.compress.codec import Codec, ErrorFeedback, encode, from_bytes
from megatron_muloco.outer.reducer import (
    CompressionStats,
    Reduced,
    ReductionStats,
    Residuals,
    Sizes,
)

__all__ = ["CompressedAllGather", "CompressedAllReduce", "CompressedReducer", "LaunchedCompression"]


@dataclass(frozen=True, slots=True)
class LaunchedCompression:
    """A reduction in progress: what `wait` needs, and what an error message names.

    Attributes:
        fragment: Index of the fragment.
        round_index: Round of the launch.
        layout: Names and sizes of the tensors.
        chunks: Pieces of each chunk.
        sizes: Payload bytes of each chunk.
        row_bytes: Bytes of weight and metadata in front of every payload.
        buffers: Buffers that the network reads (sent) and writes (received).
        pending: The collective.
        squares: Sum of what `encode` returned; NaN where nothing was encoded.
        clock: Times of encoding and decoding.
    """

    fragment: int
    round_index: int
    layout: Layout
    chunks: tuple[tuple[Piece, ...], ...]
    sizes: list[int]
    row_bytes: int
    buffers: tuple[Tensor, Tensor]
    pending: Pending
    squares: Tensor
    clock: Stopwatch


class CompressedReducer(OuterGroupReducer):
    """Base of the compressed reducers: encodes this replica's tensors and maintains residual e.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        codec_of: Returns the codec of a parameter; the same on all replicas.
        rows: Row width and first index of this rank's shards.
        error_decay: Factor on residuals; ``None`` means no error feedback.
        through_host: Whether tensors are sent through host memory.

    Attributes:
        residual: e of this replica, by parameter; ``None`` without error feedback.
    """

    returns_views = False

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
        super().__init__(group, device, through_host=through_host)
        self._codec_of, self._rows = codec_of, rows
        self.residual = None if error_decay is None else ErrorFeedback(error_decay)
        self.residual_names = () if error_decay is None else ("residual",)

    @property
    def _chunk_count(self) -> int:
        """Number of chunks of a fragment; each is encoded by itself."""
        raise NotImplementedError

    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        """Start to send ``[row | payload]`` of every chunk; return the receive buffer."""
        raise NotImplementedError

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> LaunchedCompression:
        """See `Reducer.launch`."""
        layout, clock = Layout.of(tensors), Stopwatch()
        chunks = chunk_pieces(layout.sizes, self._chunk_count, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        row = self._row(weight, metadata).view(torch.uint8)
        splits = [row.numel() + size for size in sizes]
        sent = self._pool.acquire(sum(splits), torch.uint8)
        payloads = []
        for slot in sent.split(splits):
            slot[: row.numel()] = row
            # Zeroed, because a replica of weight 0 sends the payload as it is, and pooled memory
            # still holds an earlier launch. Nobody decodes it, but what a rank sends must not
            # depend on history.
            payloads.append(slot[row.numel() :].zero_())
        squares = torch.full((2,), torch.nan, dtype=torch.float64, device=self._device)
        if weight:
            with (
                clock("encode"),
                self._named_values("a pseudogradient and its residual", fragment, round_index),
            ):
                squares = self._encode_chunks(tensors, chunks, payloads)
        with self._named_errors("launch", fragment, round_index):
            received, pending = self._send(sent, splits)
        return LaunchedCompression(
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

    @override
    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""
        if self.residual is not None:
            self.residual.forget()

    @override
    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        if self.residual is None:
            return {}
        own = {
            name: self.residual.of(name, size, self._device)
            for sizes in fragments
            for name, size in sizes.items()
        }
        return {"residual": own}

    @override
    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        if self.residual is not None:
            self.residual.load(self._here(residuals.get("residual", {})))

    # ---- parts of launch and wait -----------------------------------------------------------

    def _encode_chunks(
        self,
        tensors: Mapping[str, Tensor],
        chunks: Sequence[Sequence[Piece]],
        payloads: Sequence[Tensor],
    ) -> Tensor:
        """Fill the payloads; return the squared norms of `encode`.

        Not called for a replica of weight 0. It contributes nothing to the mean, so encoding loses
        nothing, and e stays as it is. Otherwise the excluded pseudogradient, which may be huge,
        would enter the next round's mean through e.
        """
        squares = torch.zeros(2, dtype=torch.float64, device=self._device)
        for pieces, payload in zip(chunks, payloads, strict=True):
            for piece, place in self._places(pieces):
                values, kept = tensors[piece.name][piece.start : piece.end], None
                if self.residual is not None:
                    size = tensors[piece.name].numel()
                    kept = self.residual.of(piece.name, size, self._device)
                    kept = kept[piece.start : piece.end]
                decay = self.residual.decay if self.residual else 0.0
                codec = self._codec_of(piece.name)
                squares += encode(codec, piece.unit, values, payload[place], kept, decay)
        return squares

    def _arrived(self, handle: Any) -> tuple[Tensor, Tensor]:
        """Return the rows (on the host) and the payloads of all replicas, both ``[K, ...]``."""
        assert isinstance(handle, LaunchedCompression)
        with self._named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        table = handle.buffers[1].view(self._size, -1)
        rows = from_bytes(table[:, : handle.row_bytes].flatten(), torch.float32)
        return rows.view(self._size, -1).cpu(), table[:, handle.row_bytes :]

    def _places(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, slice]]:
        """Yield every piece of a chunk with its byte range in the chunk's payload."""
        start = 0
        for piece in pieces:
            end = start + self._codec_of(piece.name).payload_bytes(piece.unit)
            yield piece, slice(start, end)
            start = end

    def _mean_of_units(
        self, piece: Piece, payloads: Sequence[Tensor], weights: Sequence[float], into: Tensor
    ) -> None:
        """Add decoded payloads to ``into``, which is zero, and divide by the sum of weights.

        In replica order, so that the bits do not depend on the order of arrival.
        """
        term = torch.empty_like(into)
        for payload, weight in zip(payloads, weights, strict=True):
            self._codec_of(piece.name).decode(payload, piece.unit, term)
            into += term.mul_(weight)
        into /= sum(weights)

    def _reduced(
        self, handle: LaunchedCompression, mean: Mapping[str, Tensor], rows: Tensor, wire_bytes: int
    ) -> Reduced:
        self._pool.release(*handle.buffers)
        exact, lost = handle.squares.unbind()
        encode_ms, decode_ms = handle.clock["encode"], handle.clock["decode"]
        stats = ReductionStats(
            rows[:, 0].clone(),
            rows[:, 1:].clone(),
            wire_bytes=wire_bytes,
            uncoded_bytes=uncoded_wire_bytes(handle.layout.numel, self._size),
            code=CompressionStats(exact, lost, encode_ms, decode_ms, self.residual is not None),
        )
        return Reduced(mean, stats)

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------


class CompressedAllReduce(CompressedReducer):
    """Mean of encoded tensors, summed in fp32 at the owner of each chunk and encoded again.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        codec_of: Returns the codec of a parameter; the same on all replicas.
        rows: Row width and first index of this rank's shards.
        error_decay: Factor on residuals; ``None`` means no error feedback.
        through_host: Whether tensors are sent through host memory.

    Attributes:
        owner_residual: f, by parameter, for the pieces that this rank owns.

    Collectives: `launch` starts an all-to-all over the outer group; `wait` finishes it and does a
    second, blocking one.
    Wire bytes per rank: `encoded_wire_bytes`.
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
        self.residual_names = () if error_decay is None else ("residual", "owner_residual")

    @property
    @override
    def _chunk_count(self) -> int:
        """One chunk for each rank."""
        return self._size

    @override
    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        own = [splits[self._index]] * self._size
        received = self._pool.acquire(sum(own), torch.uint8)
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
        """Return the encoded mean of this rank's chunk; zero bytes where all weights are 0.

        Without a weight there is no mean, and f stays as it is.
        """
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
        """Return the payloads of all chunks; sizes differ, and gloo gathers equal sizes only."""
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        self._wire.all_to_all(
            gathered,
            own.repeat(self._size),
            receive_splits=sizes,
            send_splits=[own.numel()] * self._size,
        ).wait()
        return gathered

    # ---- f: each owner holds a part, and a checkpoint holds the whole ------------------------

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


# ------------------------------------------------------------------------------------------


class CompressedAllGather(CompressedReducer):
    """Mean of encoded tensors, with the payloads of all replicas decoded on every rank.

    A rank's whole shard of a tensor is one coding unit.

    Collectives: `launch` starts an all-gather over the outer group, `wait` finishes it.
    Wire bytes per rank: ``K - 1`` times row and payload.
    """

    @property
    @override
    def _chunk_count(self) -> int:
        """The whole fragment is one chunk."""
        return 1

    @override
    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        received = self._pool.acquire(self._size * sent.numel(), torch.uint8)
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
