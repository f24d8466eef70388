"""Translates a ``compression`` section into the codec and coding units of the reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.chunking import RowPlaces, chunk_pieces
from megatron_muloco.compress.codecs import codec_lookup
from megatron_muloco.compress.format import CodingUnit
from megatron_muloco.config.outer import LossyCompression, NoCompression
from megatron_muloco.params import ParamKind

__all__ = ["reference_keys"]


def reference_keys(
    compression: LossyCompression | NoCompression,
    rows: RowPlaces,
    kinds: Mapping[str, ParamKind | None],
    fragments: Sequence[Mapping[str, int]],
    num_replicas: int,
) -> dict[str, Any]:
    """Return the keys of `Settings` that describe the compression.

    Args:
        compression: The section of the configuration.
        rows: Row widths and places of the tensors at one position.
        kinds: Kinds of the same tensors.
        fragments: Sizes of these tensors, fragment by fragment.
        num_replicas: K.
    """
    if isinstance(compression, NoCompression):
        return {}
    codec_of = codec_lookup(compression, kinds)

    def round_trip(name: str, start: int, values: Tensor) -> Tensor:
        width, first = rows.get(name, (0, 0))
        unit = CodingUnit(values.numel(), width, (first + start) % width if width else 0)
        out = torch.empty_like(values)
        codec_of(name).decode(codec_of(name).encode(values, unit), unit, out)
        return out

    units: dict[str, list[tuple[int, int]]] = {}
    for sizes in fragments:
        for pieces in chunk_pieces(
            list(sizes.items()), num_replicas if compression.mean_is_encoded else 1, rows
        ):
            for piece in pieces:
                units.setdefault(piece.name, []).append((piece.start, piece.end))
    return {
        "codec": round_trip,
        "coding_units": units,
        "encode_mean": compression.mean_is_encoded,
        "error_feedback": compression.error_feedback,
        "error_decay": compression.error_decay,
    }
