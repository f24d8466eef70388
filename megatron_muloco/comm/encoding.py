"""What the reducers that send codes have in common: the first encoding, and its residual e."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from megatron_muloco.comm.buffers import Layout
from megatron_muloco.comm.chunks import (
    Piece,
    RowPlaces,
    chunk_pieces,
    payload_sizes,
    uncoded_wire_bytes,
)
from megatron_muloco.comm.outer_group import OuterGroupReducer, Stopwatch
from megatron_muloco.comm.wire import Pending
from megatron_muloco.compress.codec import Codec, from_bytes
from megatron_muloco.compress.feedback import ErrorFeedback, encode
from megatron_muloco.outer.reducer import CodeStats, Reduced, ReductionStats, Residuals, Sizes

__all__ = ["EncodingReducer", "LaunchedCode"]


@dataclass(frozen=True, slots=True)
class LaunchedCode:
    """A reduction under way: what `wait` needs, and what a message names.

    Attributes:
        fragment: See `Reducer.launch`.
        round_index: See `Reducer.launch`.
        layout: Of the tensors.
        chunks: Coding units by chunk.
        sizes: Payload bytes by chunk.
        row_bytes: Of weight and riders, before every payload.
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


class EncodingReducer(OuterGroupReducer):
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

    lends = False

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
        self.residual_kinds = () if error_decay is None else ("residual",)

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
        riders: Tensor,
        *,
        round_index: int,
    ) -> LaunchedCode:
        """See `Reducer.launch`."""
        layout, clock = Layout.of(tensors), Stopwatch()
        chunks = chunk_pieces(layout.sizes, self._chunk_count, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        row = self._row(weight, riders).view(torch.uint8)
        splits = [row.numel() + size for size in sizes]
        sent = self._pool.take(sum(splits), torch.uint8)
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
        assert isinstance(handle, LaunchedCode)
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
        self, handle: LaunchedCode, mean: Mapping[str, Tensor], rows: Tensor, wire_bytes: int
    ) -> Reduced:
        self._pool.give(*handle.buffers)
        exact, lost = handle.squares.unbind()
        encode_ms, decode_ms = handle.clock["encode"], handle.clock["decode"]
        stats = ReductionStats(
            rows[:, 0].clone(),
            rows[:, 1:].clone(),
            wire_bytes=wire_bytes,
            uncoded_bytes=uncoded_wire_bytes(handle.layout.numel, self._size),
            code=CodeStats(exact, lost, encode_ms, decode_ms, self.residual is not None),
        )
        return Reduced(mean, stats)

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}
