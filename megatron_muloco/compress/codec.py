"""The seam between what a reducer sends and how it is written.

A codec is a pure function of the values and their unit: no state, no process group. Its payload has
no header, because sender and receiver know the unit; its size is known before the values are.

Rules, the same for every codec:

- A unit whose payload would not be smaller than its fp32 values is sent as those. That takes in
  empty units (no byte), single values, and tables too large for their groups.
- Values that are not finite are refused. A replica that has any sends nothing (weight 0).
- Finite values of any size are allowed, up to the largest of fp32 and down to subnormal.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.compress.format import CodingUnit, Grouping, PayloadSize, RawSize, is_raw
from megatron_muloco.errors import SyncError

__all__ = [
    "Codec",
    "ErrorFeedback",
    "RawFallback",
    "Uncoded",
    "encode",
    "from_bytes",
    "group_matrices",
    "refuse_non_finite",
    "to_bytes",
]


class Codec(PayloadSize, Protocol):
    """Writes a coding unit into bytes and reads it back."""

    def encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        """Return the payload of flat fp32 ``values`` as uint8.

        Raises:
            SyncError: A value is not finite.
        """

    def decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        """Write the values of a payload to ``out``, flat fp32; ``payload`` may start anywhere."""


class RawFallback:
    """Sends a unit raw where coding it would not make it smaller.

    Subclasses give `_encode` and `_decode`, which see no other units.

    Args:
        size: Knows the bytes of a unit.
    """

    def __init__(self, size: PayloadSize) -> None:
        self._size = size

    def payload_bytes(self, unit: CodingUnit) -> int:
        """See `PayloadSize.payload_bytes`."""
        return self._size.payload_bytes(unit)

    def encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        """See `Codec.encode`."""
        assert values.shape == (unit.numel,), (values.shape, unit)
        if is_raw(self._size, unit):
            refuse_non_finite(values)
            return to_bytes(values)
        payload = self._encode(values, unit)
        assert payload.numel() == self.payload_bytes(unit), (payload.numel(), unit)
        return payload

    def decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        """See `Codec.decode`."""
        assert payload.numel() == self.payload_bytes(unit), (payload.numel(), unit)
        if is_raw(self._size, unit):
            out.copy_(from_bytes(payload, torch.float32))
        else:
            self._decode(payload, unit, out)

    def _encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        raise NotImplementedError

    def _decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        raise NotImplementedError


class Uncoded(RawFallback):
    """fp32 as it is; for parameters that are excluded from compression."""

    def __init__(self) -> None:
        super().__init__(RawSize())


def to_bytes(values: Tensor) -> Tensor:
    """Return a copy of ``values`` as flat uint8."""
    return values.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as values, copied, because a view needs an aligned start."""
    return payload.clone().view(dtype)


def group_matrices(flat: Tensor, grouping: Grouping, unit: CodingUnit) -> list[Tensor]:
    """Return a unit's values as views [groups, width], one for each run of groups of one width."""
    shapes = grouping.groups(unit).matrices()
    pieces = flat.split([count * width for count, width in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def refuse_non_finite(values: Tensor) -> None:
    """Raise if a value, or a scale or sum that one would spoil, is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise SyncError(
            "some values are not finite. The guard takes out of the mean a replica that has any; "
            "here come those that overflow together with their residual. Lower inner.lr or "
            "outer.compression.error_decay."
        )


# ------------------------------------------------------------------------------------------
# Error feedback: what a code loses is kept, and added to the next round's values.
#
#     v = x + decay * residual;  q = D(E(v));  residual <- v - q
#
# The owner of a residual is whoever encodes: a replica keeps one for its pseudogradients (e), a
# chunk owner one for the mean (f). Why not ``x + residual``: old losses belong to an anchor that
# has moved (the decay of MuLoCo, facebookresearch/MuLoCo).


class ErrorFeedback:
    """Residuals by name, zeros at first.

    Args:
        decay: Factor on a residual when it is added again.

    Attributes:
        residuals: Those that were asked for so far; the live tensors.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.residuals: dict[str, Tensor] = {}

    def of(self, name: str, numel: int, device: torch.device) -> Tensor:
        """Return the live residual of ``name``: ``numel`` flat fp32 values."""
        if name not in self.residuals:
            self.residuals[name] = torch.zeros(numel, device=device)
        return self.residuals[name]

    def forget(self) -> None:
        """Set all residuals to zero."""
        for residual in self.residuals.values():
            residual.zero_()

    def load(self, residuals: Mapping[str, Tensor]) -> None:
        """Take copies of ``residuals``, and keep nothing else."""
        self.residuals = {name: residual.clone() for name, residual in residuals.items()}


def encode(
    codec: Codec,
    unit: CodingUnit,
    values: Tensor,
    payload: Tensor,
    residual: Tensor | None,
    decay: float,
) -> Tensor:
    """Encode a unit into ``payload``, and leave in ``residual`` what the code lost.

    Args:
        codec: Of the unit.
        unit: What ``values`` are.
        values: x, flat fp32.
        payload: uint8, of the unit's payload bytes; overwritten.
        residual: e or f of these values, updated in place; ``None`` without error feedback.
        decay: Of the residual.

    Returns:
        Squared norms of what was encoded and of what was lost of it, ``[2]``, fp64.
    """
    if residual is not None:
        # Two roundings, like the reference; a fused multiply-add would have one.
        values = values + residual * decay
    payload.copy_(codec.encode(values, unit))
    decoded = torch.empty_like(values)
    codec.decode(payload, unit, decoded)
    lost = torch.sub(values, decoded, out=decoded if residual is None else residual)
    return torch.stack([torch.dot(values, values), torch.dot(lost, lost)]).double()
