"""Causal attention inside documents: `CoreAttention` in a layer, and the backends that compute it.

An `AttentionBackend` turns the documents of a microbatch into one tensor, which reaches every layer
as Megatron's attention mask, and computes attention with it. Here are the two that run everywhere:
`DenseAttention`, the reference, with a mask of s x s elements, and `DocumentLoop`, which never
builds one. Backends for accelerators, and the choice between all, are in `attention_backends`.

Shapes: s sequence, b micro-batch, n query heads and g key/value heads of this rank, d head width,
N documents of the microbatch. Documents of all its sequences are counted in one row.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from typing_extensions import override

__all__ = [
    "AttentionBackend",
    "CoreAttention",
    "DenseAttention",
    "DocumentLoop",
    "PackedAttention",
    "SequenceSlice",
    "attention_of",
    "causal_attention",
    "document_boundaries",
    "document_mask",
]


# ---- documents as tensors ------------------------------------------------------------------------


def document_mask(document_ids: Tensor) -> Tensor:
    """Return the attention mask that keeps each position inside its own document.

    Args:
        document_ids: [b, s] integers that change where a new document begins.

    Returns:
        Boolean [b, 1, s, s] in Megatron's convention: True is masked out. A position sees itself
        and earlier positions of its own document.
    """
    same = document_ids.unsqueeze(1) == document_ids.unsqueeze(2)
    length = document_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ~(same & earlier).unsqueeze(1)


def document_boundaries(document_ids: Tensor) -> Tensor:
    """Return where each document begins in the concatenated sequences, and where the last one ends.

    Args:
        document_ids: [b, s] integers that change where a new document begins. A document also ends
            with its sequence.

    Returns:
        int32 [N + 1], from 0 to b*s: the ``cu_seqlens`` of packed attention.
    """
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    places = begins.flatten().nonzero().flatten()
    return nn.functional.pad(places, (0, 1), value=document_ids.numel()).int()


# ---- backends ------------------------------------------------------------------------------------


class AttentionBackend(Protocol):
    """A way to compute causal attention inside documents."""

    def documents(self, document_ids: Tensor, device: torch.device) -> Tensor:
        """Return what `attend` needs to know about the documents of a microbatch.

        It is one tensor, so that Megatron can pass it through recomputation like a mask.

        Args:
            document_ids: [b, s] on the CPU, as of `megatron_muloco.data.batches.document_ids`.
            device: The device that trains.
        """
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, *, scale: float
    ) -> Tensor:
        """Return softmax(scale * q k^T) v over the visible keys.

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d]; n is a multiple of g.
            value: [s, b, g, d].
            documents: As of `documents`; ``None`` for attention over whole sequences.
            scale: Factor of the scores.

        Returns:
            [s, b, n*d], of the dtype of the query.
        """
        ...


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """Return attention by torch's fused kernels, causal where ``hidden`` is ``None``.

    Args:
        query: [s, b, n, d].
        key: [s, b, g, d].
        value: [s, b, g, d].
        scale: Factor of the scores.
        hidden: Boolean [b, 1, s, s], True for pairs that are masked out.

    Returns:
        [s, b, n*d].
    """
    sequence, batch, heads, _ = query.shape
    out = nn.functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=None if hidden is None else ~hidden,
        is_causal=hidden is None,
        scale=scale,
        enable_gqa=key.shape[2] != heads,
    )
    return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


class DenseAttention:
    """Attention with a mask of s x s elements; the reference of the other backends.

    Twice the work of causal attention at least, because the kernels skip nothing under a mask.
    Memory grows with s^2: b*s^2 bytes a microbatch, and what a kernel makes of them in every layer.
    """

    def documents(self, document_ids: Tensor, device: torch.device) -> Tensor:
        """Return the mask, boolean [b, 1, s, s]."""
        if device.type == "cuda":
            document_ids = document_ids.pin_memory()
        return document_mask(document_ids.to(device, non_blocking=True))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, *, scale: float
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        return causal_attention(query, key, value, scale=scale, hidden=documents)


class PackedAttention:
    """Base of the backends that attend inside each document of the concatenated sequences.

    The boundaries stay on the CPU: a length that sizes a kernel's grid is then known without a
    device synchronisation. They are a few hundred bytes, and each layer copies them.
    """

    def documents(self, document_ids: Tensor, device: torch.device) -> Tensor:
        """Return `document_boundaries`, on the CPU, in pinned memory for an accelerator."""
        boundaries = document_boundaries(document_ids)
        return boundaries.pin_memory() if device.type == "cuda" else boundaries

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, *, scale: float
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        if documents is None:
            return causal_attention(query, key, value, scale=scale)
        sequence, batch = query.shape[:2]
        # With one sequence in the microbatch these are views.
        q, k, v = (each.transpose(0, 1).flatten(0, 1) for each in (query, key, value))
        out = self.attend_packed(q, k, v, documents, scale=scale)
        return out.reshape(batch, sequence, -1).transpose(0, 1).contiguous()

    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, scale: float
    ) -> Tensor:
        """Return [b*s, n, d] from query [b*s, n, d], key and value [b*s, g, d]."""
        raise NotImplementedError


class DocumentLoop(PackedAttention):
    """One call of torch's causal attention for each document, for every device and dtype."""

    @override
    def attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, *, scale: float
    ) -> Tensor:
        lengths = boundaries.diff().tolist()
        # Backward of a split is one concatenation; that of slices would fill b*s rows for each.
        pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        attended = [
            causal_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale)
            for q, k, v in pieces
        ]
        return torch.cat(attended).view(query.shape)


# ---- context parallelism -------------------------------------------------------------------------


class SequenceSlice:
    """The positions of every sequence that one context-parallel rank holds.

    c ranks cut a sequence into 2c chunks, and rank r holds chunks r and 2c-1-r, as in Megatron: an
    early chunk sees few keys and a late one many, so that two of them are alike for all ranks::

        chunk   0 1 2 3 4 5          an all-gather yields the chunks 0 5 1 4 2 3
        rank    0 1 2 2 1 0

    Args:
        length: Tokens of a sequence, a multiple of twice the number of ranks.
        rank: This rank's place in the context-parallel group.
        size: Number of context-parallel ranks.

    Attributes, on the CPU:
        positions: int64 [s/c], the positions of this rank, ascending.
        gathered: int64 [s], all positions in the order of an all-gather over the ranks.
    """

    def __init__(self, length: int, *, rank: int, size: int) -> None:
        chunks = torch.arange(length).chunk(2 * size)
        of_ranks = [torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)]
        self.positions = of_ranks[rank]
        self.gathered = torch.cat(of_ranks)

    def take(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's positions of tensors [b, s]."""
        return {name: value[:, self.positions] for name, value in batch.items()}

    def mask(self, document_ids: Tensor | None) -> Tensor:
        """Return the attention mask of this rank's queries; see `document_mask`.

        Args:
            document_ids: [b, s]; ``None`` for attention over whole sequences.

        Returns:
            Boolean [b, 1, s/c, s], [1, 1, s/c, s] without documents: True is masked out. The keys
            are in the order of `gathered`.
        """
        visible = (self.gathered <= self.positions.unsqueeze(1)).unsqueeze(0)
        if document_ids is not None:
            own = document_ids[:, self.positions].unsqueeze(2)
            visible = visible & (own == document_ids[:, self.gathered].unsqueeze(1))
        return ~visible.unsqueeze(1)


# ---- the module of a layer -----------------------------------------------------------------------


class CoreAttention(MegatronModule):
    """Causal attention of this rank's heads, by a backend that all layers share.

    Replaces Megatron's ``DotProductAttention``, which materialises the score matrix; Megatron's
    fused alternatives need Transformer Engine. With c context-parallel ranks, s/c in place of s:
    the positions of a `SequenceSlice`.

    Collectives: with context parallelism an all-gather of keys and values over the cp group,
    forward, and a reduce-scatter of their gradients, backward; 2*s*b*g*d values over all ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        backend: AttentionBackend,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout or attention_dropout:
            raise ValueError("attention dropout is not implemented in CoreAttention")
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.backend = backend
        self._context_group = None
        if config.context_parallel_size > 1 and pg_collection is not None:
            self._context_group = pg_collection.cp

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Return the attention output, ``[s, b, n*d]``.

        Args:
            query: ``[s, b, n, d]``.
            key: ``[s, b, g, d]``.
            value: ``[s, b, g, d]``.
            attention_mask: The documents as the backend's `AttentionBackend.documents` gives them;
                ``None`` for attention over whole sequences. With context parallelism that of
                `SequenceSlice.mask`, never ``None``.
            attn_mask_type: Ignored, as are the following; Megatron passes them.
            attention_bias: Ignored.
            packed_seq_params: Ignored.
        """
        if self._context_group is not None:
            both = gather_from_sequence_parallel_region(
                torch.cat([key, value], dim=2), group=self._context_group
            )
            key, value = both.chunk(2, dim=2)
        return self.backend.attend(query, key, value, attention_mask, scale=self.softmax_scale)


def attention_of(model: nn.Module) -> AttentionBackend:
    """Return the backend that the layers of ``model`` share."""
    return next(each.backend for each in model.modules() if isinstance(each, CoreAttention))
