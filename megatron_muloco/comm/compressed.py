"""What the reducers that send codes have in common: the first encoding, and its residual e."""

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
    """A reduction under way: what `wait` needs, and what a message names.

    Attributes:
        fragment: See `Reducer.launch`.
        round_index: See `Reducer.launch`.
        layout: Of the tensors.
        chunks: Coding units by chunk.
        sizes: Payload bytes by chunk.
        row_bytes: Of weight and metadata, before every payload.
        buffers: Sent and received; the network reads and writes them.
        pending: The collective.
        squares: What `encode` returned, summed; NaN where nothing was encoded.
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
    """Encodes this replica's tensors, and keeps what that loses.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Where the tensors are.
        codec_of: The codec of a parameter; the same on all replicas.
        rows: Where the rows of the parameters begin in the shards of this rank.
        error_decay: Factor on residuals; ``None`` keeps none.
        through_host: See `OuterGroupReducer`.

    Attributes:
        residual: e, by parameter; this replica's own. ``None`` without error feedback.
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
        """Chunks that a fragment is cut into, each encoded by itself."""
        raise NotImplementedError

    def _send(self, sent: Tensor, splits: Sequence[int]) -> tuple[Tensor, Pending]:
        """Start sending ``[row | payload]`` of every chunk; return where everybody's arrive."""
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

        Not called for a replica without a weight: it sends nothing, so it lost nothing, and e stays
        as it is. What its pseudogradient was must not come back in the next round through e.
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
        """Return everybody's row, on the host, and everybody's payload, both ``[K, ...]``."""
        assert isinstance(handle, LaunchedCompression)
        with self._named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        table = handle.buffers[1].view(self._size, -1)
        rows = from_bytes(table[:, : handle.row_bytes].flatten(), torch.float32)
        return rows.view(self._size, -1).cpu(), table[:, handle.row_bytes :]

    def _places(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, slice]]:
        """Yield every piece of a chunk with its place in the chunk's payload."""
        start = 0
        for piece in pieces:
            end = start + self._codec_of(piece.name).payload_bytes(piece.unit)
            yield piece, slice(start, end)
            start = end

    def _mean_of_units(
        self, piece: Piece, payloads: Sequence[Tensor], weights: Sequence[float], into: Tensor
    ) -> None:
        """Add decoded units to ``into``, which is zero, in replica order, and divide."""
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
# The mean of encoded tensors: every value crosses the network twice, as a few bits.
#
# `CompressedAllReduce` cuts the fragment into K chunks, one for each rank of the outer group to
# own::
#
#     launch   v = x + decay * e;  send E(v), chunk k to its owner;  e <- v - D(E(v))
#              all-to-all   [row | E(chunk 0)] [row | E(chunk 1)] ...     row = [w_k, metadata]
#     wait     owner: m = sum w_k D(E(v_k)) / sum w_k;  z = m + decay * f;  f <- z - D(E(z))
#              all-to-all   E(z) of the own chunk to everyone
#              everyone: mean = D(E(z)), from the same bytes, hence the same bits
#
# The second all-to-all is an all-gather of parts of different lengths, which gloo does not have.


class CompressedAllReduce(CompressedReducer):
    """Mean of encoded tensors, encoded again, with the sum in fp32 at each chunk's owner.

    The sum runs in replica order: the same bits for any arrival order.

    Args:
        group: See `CompressedReducer`, also for the others.
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
        self.residual_names = () if error_decay is None else ("residual", "owner_residual")

    @property
    @override
    def _chunk_count(self) -> int:
        """One for each rank to own."""
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


# ------------------------------------------------------------------------------------------
# The mean of tensors of which every replica sends only the largest values, once, to all others.
#
# The union of K selections is K times as long as one of them, so the mean is not encoded again:
# every rank decodes what all the others sent, and adds it up in replica order::
#
#     launch   v = x + decay * e;  q = D(E(v));  e <- v - q;  all-gather [row | E(v)]
#     wait     mean = sum w_k q_k / sum w_k, from the same bytes on all ranks, hence the same bits


class CompressedAllGather(CompressedReducer):
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
