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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muloco.comm.chunking import (
    Piece,
    RowPlaces,
    chunk_length,
    chunk_pieces,
    payload_ranges,
    payload_sizes,
    ring_bytes,
    two_way_bytes,
)
from megatron_muloco.comm.collectives import BufferPool, Layout, Pending
from megatron_muloco.comm.reducers import (
    ByPhases,
    OuterGroup,
    OuterPeers,
    PhasedReducer,
    Phases,
    Stopwatch,
)
from megatron_muloco.compress.codec import Codec, ErrorFeedback, encode, from_bytes
from megatron_muloco.compress.codecs import codec_lookup
from megatron_muloco.config.outer import LossyCompression
from megatron_muloco.outer.reducer import (
    Measurement,
    Reduced,
    ReductionStats,
    Residuals,
    Sizes,
)
from megatron_muloco.params import ParamKind

__all__ = [
    "CodecOf",
    "CompressedAllGather",
    "CompressedAllReduce",
    "LaunchedCompression",
    "build_compressed_reducer_for",
    "encode_messages",
    "weighted_mean",
]

CodecOf = Callable[[str], Codec]
"""Returns the codec of a parameter; the same one on all replicas."""


def build_compressed_reducer_for(
    group: OuterPeers,
    device: torch.device,
    compression: LossyCompression,
    rows: RowPlaces,
    kinds: Mapping[str, ParamKind | None],
    *,
    through_host: bool = False,
) -> PhasedReducer:
    """Return the reducer for compressed means.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        compression: Section of the config.
        rows: Row width and first index of this rank's shards.
        kinds: Kind of each parameter, by name.
        through_host: Whether tensors are sent through host memory.
    """
    reduction = CompressedAllReduce if compression.mean_is_encoded else CompressedAllGather
    return reduction(
        group,
        device,
        codec_lookup(compression, kinds),
        rows,
        compression.error_decay if compression.error_feedback else None,
        through_host=through_host,
    )


# ------------------------------------------------------------------------------------------
# Steps that both reductions share.


@dataclass(frozen=True, slots=True)
class LaunchedCompression:
    """A compressed reduction in progress.

    Attributes:
        fragment: Index of the fragment.
        round_index: Round of the launch.
        layout: Names and sizes of the tensors.
        chunks: Pieces of each chunk.
        sizes: Payload bytes of each chunk.
        row_bytes: Bytes of weight and metadata in front of every payload.
        buffers: Pooled buffers (sent, received); the network reads and writes them until the end
            of `wait`.
        pending: The collective.
        squares: Squared norms that `encode_messages` returned.
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


def encode_messages(
    messages: Sequence[Tensor],
    row: Tensor,
    tensors: Mapping[str, Tensor],
    weight: float,
    chunks: Sequence[Sequence[Piece]],
    codec_of: CodecOf,
    residual: ErrorFeedback | None,
) -> Tensor:
    """Write ``[row | payload]`` of every chunk; update e with what the encoding loses.

    With weight 0 the payloads are zero bytes and e stays as it is. Such a replica contributes
    nothing to the mean, so encoding loses nothing of it. If e were updated, the excluded
    pseudogradient, which may be huge, would enter the next round's mean through e.

    Args:
        messages: uint8, one for each chunk, of the bytes of row and payload; overwritten.
        row: Weight and metadata as bytes.
        tensors: Flat fp32 tensors of the fragment.
        weight: Weight of this replica.
        chunks: Pieces of each chunk.
        codec_of: Returns the codec of a parameter.
        residual: e; ``None`` without error feedback.

    Returns:
        Squared norms of what was encoded and of what the encoding lost, ``[2]``, fp64; NaN for a
        replica of weight 0.
    """
    payloads = []
    for message in messages:
        message[: row.numel()] = row
        # Zeroed, because pooled memory still holds an earlier launch. No rank decodes a payload of
        # weight 0, but the bytes that a rank sends must not depend on what it sent before.
        payloads.append(message[row.numel() :].zero_())
    if not weight:
        return torch.full((2,), torch.nan, dtype=torch.float64, device=row.device)
    squares = torch.zeros(2, dtype=torch.float64, device=row.device)
    decay = residual.decay if residual else 0.0
    for pieces, payload in zip(chunks, payloads, strict=True):
        for piece, place in payload_ranges(pieces, codec_of):
            whole, kept = tensors[piece.name], None
            if residual is not None:
                kept = residual.of(piece.name, whole.numel(), row.device)[piece.start : piece.end]
            values = whole[piece.start : piece.end]
            squares += encode(codec_of(piece.name), piece.unit, values, payload[place], kept, decay)
    return squares


def split_messages(received: Tensor, row_bytes: int, num_replicas: int) -> tuple[Tensor, Tensor]:
    """Return rows ``[K, 1 + metadata]``, fp32 on the host, and payloads ``[K, bytes]``, uint8."""
    table = received.view(num_replicas, -1)
    rows = from_bytes(table[:, :row_bytes].flatten(), torch.float32)
    return rows.view(num_replicas, -1).cpu(), table[:, row_bytes:]


def weighted_mean(
    codec: Codec, piece: Piece, payloads: Sequence[Tensor], weights: Sequence[float], out: Tensor
) -> None:
    """Add ``sum w_k D(payload_k) / sum w_k`` to ``out``, in fp32.

    The sum runs in replica order, so its bits do not depend on the order of arrival.

    Args:
        codec: Codec of the piece.
        piece: The piece.
        payloads: Its payload from each replica with a weight above 0, in replica order.
        weights: Weights of these replicas.
        out: Zeros, fp32, ``[piece.unit.numel]``.
    """
    term = torch.empty_like(out)
    for payload, weight in zip(payloads, weights, strict=True):
        codec.decode(payload, piece.unit, term)
        out += term.mul_(weight)
    out /= sum(weights)


def _zeros(layout: Layout, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.zeros(size, device=device) for name, size in layout.sizes}


def _stats(
    handle: LaunchedCompression, rows: Tensor, wire_bytes: int, *, error_feedback: bool
) -> ReductionStats:
    exact, lost = handle.squares.unbind()
    measurements = {
        "muloco/compression_error": Measurement.relative_norm(lost, exact),
        "muloco/encode_ms": Measurement.of(handle.clock["encode"]),
        "muloco/decode_ms": Measurement.of(handle.clock["decode"]),
    }
    if error_feedback:
        measurements["muloco/residual_norm"] = Measurement.norm(lost)
    return ReductionStats(
        rows[:, 0].clone(),
        rows[:, 1:].clone(),
        wire_bytes=wire_bytes,
        uncoded_bytes=ring_bytes(handle.layout.numel, len(rows)),
        compressed=True,
        measurements=measurements,
    )


def _replica_residuals(
    residual: ErrorFeedback | None, fragments: Sequence[Sizes], device: torch.device
) -> dict[str, Mapping[str, Tensor]]:
    """Return e of all tensors under its name in a checkpoint; nothing without error feedback."""
    if residual is None:
        return {}
    own = {
        name: residual.of(name, size, device) for sizes in fragments for name, size in sizes.items()
    }
    return {"residual": own}


def _load(
    residual: ErrorFeedback | None, values: Mapping[str, Tensor], device: torch.device
) -> None:
    if residual is not None:
        residual.load({name: tensor.to(device) for name, tensor in values.items()})


# ------------------------------------------------------------------------------------------


class CompressedAllReduce(ByPhases):
    """Mean of encoded tensors, summed in fp32 at the owner of each chunk and encoded again.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        codec_of: Returns the codec of a parameter; the same on all replicas.
        rows: Row width and first index of this rank's shards.
        error_decay: Factor on residuals; ``None`` means no error feedback.
        through_host: Whether tensors are sent through host memory.

    Attributes:
        residual: e of this replica, by parameter; ``None`` without error feedback.
        owner_residual: f, by parameter, for the pieces that this rank owns.

    Collectives: `launch` starts an all-to-all over the outer group; the phases finish it and do a
    second one.
    Wire bytes per rank: `two_way_bytes`.
    """

    crossings = 2
    returns_views = False

    def __init__(
        self,
        group: OuterPeers,
        device: torch.device,
        codec_of: CodecOf,
        rows: RowPlaces,
        error_decay: float | None,
        *,
        through_host: bool = False,
    ) -> None:
        super().__init__(OuterGroup(group, device, through_host=through_host))
        self._pool = BufferPool(device)
        self._codec_of, self._rows = codec_of, rows
        self.residual = None if error_decay is None else ErrorFeedback(error_decay)
        self.owner_residual = None if error_decay is None else ErrorFeedback(error_decay)
        self.residual_names: tuple[str, ...] = ()
        if error_decay is not None:
            self.residual_names = ("residual", "owner_residual")

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
        outer, clock = self._outer, Stopwatch()
        # 1. Cut the fragment into K chunks; rank k owns chunk k.
        layout = Layout.of(tensors)
        chunks = chunk_pieces(layout.sizes, outer.size, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        # 2. Encode v = x + decay * e into one message for each owner; e keeps what is lost.
        row = outer.row(weight, metadata).view(torch.uint8)
        splits = [row.numel() + size for size in sizes]
        sent = self._pool.acquire(sum(splits), torch.uint8)
        what = "a pseudogradient and its residual"
        with clock("encode"), outer.named_values(what, fragment, round_index):
            squares = encode_messages(
                sent.split(splits), row, tensors, weight, chunks, self._codec_of, self.residual
            )
        # 3. Send message k to rank k.
        own = [splits[outer.index]] * outer.size
        received = self._pool.acquire(sum(own), torch.uint8)
        with outer.named_errors("launch", fragment, round_index):
            pending = outer.wire.all_to_all(received, sent, receive_splits=own, send_splits=splits)
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

    def phases(self, handle: LaunchedCompression) -> Phases:
        """See `PhasedReducer.phases`."""
        outer, fragment, round_index = self._outer, handle.fragment, handle.round_index
        with outer.named_errors("apply", fragment, round_index):
            handle.pending.wait()
        rows, payloads = split_messages(handle.buffers[1], handle.row_bytes, outer.size)
        # 4. Owner of a chunk: average in fp32, and encode z = m + decay * f; f keeps what is lost.
        with outer.named_values("the mean and its residual", fragment, round_index):
            own = self._encode_mean(handle, payloads, rows[:, 0].tolist())
        # 5. Send it to all. Every rank decodes the same bytes, the owner too, so the mean is
        # bitwise the same on all of them.
        with outer.named_errors("apply", fragment, round_index):
            encoded, pending = self._start_gather(handle, own)
        del own, payloads
        yield
        with outer.named_errors("apply", fragment, round_index):
            pending.wait()
        mean = _zeros(handle.layout, outer.device)
        if rows[:, 0].any():
            with handle.clock("decode"):
                for pieces, payload in zip(handle.chunks, encoded.split(handle.sizes), strict=True):
                    for piece, place in payload_ranges(pieces, self._codec_of):
                        out = mean[piece.name][piece.start : piece.end]
                        self._codec_of(piece.name).decode(payload[place], piece.unit, out)
        self._pool.release(*handle.buffers)
        wire_bytes = two_way_bytes(handle.sizes, outer.index, handle.row_bytes // 4)
        feedback = self.residual is not None
        return Reduced(mean, _stats(handle, rows, wire_bytes, error_feedback=feedback))

    def _encode_mean(
        self, handle: LaunchedCompression, received: Tensor, weights: Sequence[float]
    ) -> Tensor:
        """Return the encoded mean of this rank's chunk; zero bytes where all weights are 0.

        Without a weight there is no mean, and f stays as it is.
        """
        device, kept = self._outer.device, self.owner_residual
        payload = torch.zeros(received.shape[1], dtype=torch.uint8, device=device)
        used = [k for k, weight in enumerate(weights) if weight]
        if not used:
            return payload
        decay = kept.decay if kept else 0.0
        for piece, place in payload_ranges(handle.chunks[self._outer.index], self._codec_of):
            codec, numel = self._codec_of(piece.name), piece.unit.numel
            mean = torch.zeros(numel, device=device)
            with handle.clock("decode"):
                terms = [received[k, place] for k in used]
                weighted_mean(codec, piece, terms, [weights[k] for k in used], mean)
            residual = kept.of(piece.name, numel, device) if kept else None
            with handle.clock("encode"):
                encode(codec, piece.unit, mean, payload[place], residual, decay)
        return payload

    def _start_gather(self, handle: LaunchedCompression, own: Tensor) -> tuple[Tensor, Pending]:
        """Start to gather the payloads of all chunks; return where they arrive, and the collective.

        It is an all-to-all, because gloo gathers equal sizes only. It uses the buffers of the first
        one, whose contents are no longer needed, so that nothing else is held while it is under
        way.
        """
        (sent, received), count = handle.buffers, self._outer.size
        gathered, copies = sent[: sum(handle.sizes)], received[: count * own.numel()]
        copies.view(count, own.numel()).copy_(own)
        pending = self._outer.wire.all_to_all(
            gathered,
            copies,
            receive_splits=handle.sizes,
            send_splits=[own.numel()] * count,
        )
        return gathered, pending

    # ---- residuals: a checkpoint holds f whole, each owner only its pieces ------------------

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`; f is common to all replicas and stays."""
        if self.residual is not None:
            self.residual.forget()

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        found = _replica_residuals(self.residual, fragments, self._outer.device)
        if self.owner_residual is not None:
            whole: dict[str, Tensor] = {}
            for sizes in fragments:
                whole |= self._from_owners(self.owner_residual, sizes)
            found["owner_residual"] = whole
        return found

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        whole = residuals.get("owner_residual", {})
        owned = {
            piece.name: whole[piece.name][piece.start : piece.end]
            for sizes in fragments
            for piece in self._owned(sizes)
            if piece.name in whole
        }
        _load(self.residual, residuals.get("residual", {}), self._outer.device)
        _load(self.owner_residual, owned, self._outer.device)

    def _from_owners(self, kept: ErrorFeedback, sizes: Sizes) -> dict[str, Tensor]:
        """Return f of a fragment's tensors, each piece from its owner."""
        outer = self._outer
        length = chunk_length(list(sizes.items()), outer.size)
        own, start = torch.zeros(length, device=outer.device), 0
        for piece in self._owned(sizes):
            place = own[start : start + piece.unit.numel]
            place.copy_(kept.of(piece.name, piece.unit.numel, outer.device))
            start += piece.unit.numel
        gathered = torch.empty(outer.size * length, device=outer.device)
        outer.wire.all_gather(gathered, own).wait()
        return Layout(tuple(sizes.items())).unpack(gathered)

    def _owned(self, sizes: Sizes) -> tuple[Piece, ...]:
        return chunk_pieces(list(sizes.items()), self._outer.size, self._rows)[self._outer.index]


# ------------------------------------------------------------------------------------------


class CompressedAllGather(ByPhases):
    """Mean of encoded tensors, with the payloads of all replicas decoded on every rank.

    A rank's whole shard of a tensor is one coding unit.

    Args:
        group: The outer group, in replica order; ``None`` for a single replica.
        device: Device of the tensors.
        codec_of: Returns the codec of a parameter; the same on all replicas.
        rows: Row width and first index of this rank's shards.
        error_decay: Factor on residuals; ``None`` means no error feedback.
        through_host: Whether tensors are sent through host memory.

    Attributes:
        residual: e of this replica, by parameter; ``None`` without error feedback.

    Collectives: `launch` starts an all-gather over the outer group, `wait` finishes it.
    Wire bytes per rank: ``K - 1`` times row and payload.
    """

    returns_views = False

    def __init__(
        self,
        group: OuterPeers,
        device: torch.device,
        codec_of: CodecOf,
        rows: RowPlaces,
        error_decay: float | None,
        *,
        through_host: bool = False,
    ) -> None:
        super().__init__(OuterGroup(group, device, through_host=through_host))
        self._pool = BufferPool(device)
        self._codec_of, self._rows = codec_of, rows
        self.residual = None if error_decay is None else ErrorFeedback(error_decay)
        self.residual_names: tuple[str, ...] = () if error_decay is None else ("residual",)

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
        outer, clock = self._outer, Stopwatch()
        # 1. The fragment is one chunk: every rank gets all of it.
        layout = Layout.of(tensors)
        chunks = chunk_pieces(layout.sizes, 1, self._rows)
        sizes = payload_sizes(chunks, self._codec_of)
        # 2. Encode v = x + decay * e into one message for all; e keeps what is lost.
        row = outer.row(weight, metadata).view(torch.uint8)
        sent = self._pool.acquire(row.numel() + sum(sizes), torch.uint8)
        what = "a pseudogradient and its residual"
        with clock("encode"), outer.named_values(what, fragment, round_index):
            squares = encode_messages(
                [sent], row, tensors, weight, chunks, self._codec_of, self.residual
            )
        # 3. Send it to all ranks.
        received = self._pool.acquire(outer.size * sent.numel(), torch.uint8)
        with outer.named_errors("launch", fragment, round_index):
            pending = outer.wire.all_gather(received, sent)
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

    def phases(self, handle: LaunchedCompression) -> Phases:
        """See `PhasedReducer.phases`."""
        yield from ()  # a generator, though `launch` has started the only collective
        outer, (sent, received) = self._outer, handle.buffers
        with outer.named_errors("apply", handle.fragment, handle.round_index):
            handle.pending.wait()
        rows, payloads = split_messages(received, handle.row_bytes, outer.size)
        # 4. Every rank decodes all replicas and averages in fp32: the same bytes in the same order,
        # so the mean is bitwise the same on all of them.
        mean = _zeros(handle.layout, outer.device)
        weights: list[float] = rows[:, 0].tolist()
        used = [k for k, weight in enumerate(weights) if weight]
        if used:
            with handle.clock("decode"):
                for piece, place in payload_ranges(handle.chunks[0], self._codec_of):
                    terms = [payloads[k, place] for k in used]
                    codec, out = self._codec_of(piece.name), mean[piece.name]
                    weighted_mean(codec, piece, terms, [weights[k] for k in used], out)
        self._pool.release(sent, received)
        wire_bytes = (outer.size - 1) * sent.numel()
        feedback = self.residual is not None
        return Reduced(mean, _stats(handle, rows, wire_bytes, error_feedback=feedback))

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""
        if self.residual is not None:
            self.residual.forget()

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        return _replica_residuals(self.residual, fragments, self._outer.device)

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""
        _load(self.residual, residuals.get("residual", {}), self._outer.device)
