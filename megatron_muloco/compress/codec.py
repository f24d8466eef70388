"""`Codec`: the interface of all codecs, the raw fallback, and encoding with error feedback.

A codec is a pure function of the values and their coding unit. It has no state and knows no process
group. A payload has no header, because sender and receiver know the unit, and its size is known
before the values are.

Rules for every codec:

- A unit whose payload would not be smaller than its fp32 values is sent raw. This includes empty
  units (no bytes), single values, and units whose tables would be larger than what they save.
- Values that are not finite are an error. A replica that has any sends nothing (weight 0).
- Finite values of any size are allowed, up to the largest of fp32 and down to subnormal.

Error feedback keeps what an encoding lost, and adds it to the next round's values::

    v = x + decay * residual;  q = D(E(v));  residual <- v - q

Each encoder has its own residual: a replica keeps e for its pseudogradients, the owner of a chunk
keeps f for the mean. The decay is below 1 because old losses belong to an anchor that has moved
since (MuLoCo's research code, facebookresearch/MuLoCo).
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_muloco.compress.format import CodingUnit, Grouping, PayloadSize, RawFormat, is_raw
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
    """Writes a coding unit into bytes and reads it back; a pure function."""

    def encode(self, values: Tensor, unit: CodingUnit) -> Tensor:
        """Return the payload of ``values``.

        Args:
            values: fp32, ``[unit.numel]``; not modified.
            unit: The coding unit.

        Returns:
            uint8, ``[payload_bytes(unit)]``.

        Raises:
            SyncError: A value is not finite.
        """

    def decode(self, payload: Tensor, unit: CodingUnit, out: Tensor) -> None:
        """Write the decoded values to ``out``.

        Args:
            payload: uint8, ``[payload_bytes(unit)]``; may begin at any address.
            unit: The coding unit.
            out: fp32, ``[unit.numel]``; overwritten.
        """


class RawFallback:
    """Base of codecs that send a unit raw where encoding would not make it smaller.

    Subclasses implement `_encode` and `_decode`, which are called for all other units only.

    Args:
        size: Payload size rule of the codec.
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
    """Sends fp32 values unchanged; for parameters that are excluded from compression."""

    def __init__(self) -> None:
        super().__init__(RawFormat())


def to_bytes(values: Tensor) -> Tensor:
    """Return a copy of ``values`` as flat uint8."""
    return values.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bytes as values of ``dtype``, copied because a view needs an aligned address."""
    return payload.clone().view(dtype)


def group_matrices(flat: Tensor, grouping: Grouping, unit: CodingUnit) -> list[Tensor]:
    """Return views ``[groups, width]`` of a unit, one for each run of groups of equal width."""
    shapes = grouping.groups(unit).matrices()
    pieces = flat.split([count * width for count, width in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def refuse_non_finite(values: Tensor) -> None:
    """Raise unless all ``values`` are finite.

    A codec may pass scales or sums instead, where any non-finite value makes those non-finite too.
    """
    if not bool(torch.isfinite(values).all()):
        raise SyncError(
            "some values are not finite. The guard already excludes replicas whose pseudogradient "
            "is not finite, so this one overflowed when its residual was added. Lower inner.lr or "
            "outer.compression.error_decay."
        )


# ------------------------------------------------------------------------------------------
# Error feedback.


class ErrorFeedback:
    """Residuals of one encoder, by name; zero at first.

    Args:
        decay: Factor on a residual when it is added again.

    Attributes:
        residuals: The live residuals that were requested so far.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.residuals: dict[str, Tensor] = {}

    def of(self, name: str, numel: int, device: torch.device) -> Tensor:
        """Return the live residual of ``name``, fp32, ``[numel]``."""
        if name not in self.residuals:
            self.residuals[name] = torch.zeros(numel, device=device)
        return self.residuals[name]

    def forget(self) -> None:
        """Set all residuals to zero."""
        for residual in self.residuals.values():
            residual.zero_()

    def load(self, residuals: Mapping[str, Tensor]) -> None:
        """Replace all residuals by copies of ``residuals``."""
        self.residuals = {name: residual.clone() for name, residual in residuals.items()}


def encode(
    codec: Codec,
    unit: CodingUnit,
    values: Tensor,
    payload: Tensor,
    residual: Tensor | None,
    decay: float,
) -> Tensor:
    """Encode a unit into ``payload`` and write what the encoding lost to ``residual``.

    Args:
        codec: Codec of the unit.
        unit: The coding unit.
        values: x, fp32, ``[unit.numel]``; not modified.
        payload: uint8, ``[payload_bytes(unit)]``; overwritten.
        residual: e or f of these values, updated in place; ``None`` without error feedback.
        decay: Factor on the old residual.

    Returns:
        Squared norms of what was encoded and of what the encoding lost, ``[2]``, fp64.
    """
    if residual is not None:
        # Two operations with two roundings, as in the reference. ``add(alpha=decay)`` may be a
        # fused multiply-add with one rounding, which would give other bits.
        values = values + residual * decay
    payload.copy_(codec.encode(values, unit))
    decoded = torch.empty_like(values)
    codec.decode(payload, unit, decoded)
    lost = torch.sub(values, decoded, out=decoded if residual is None else residual)
    return torch.stack([torch.dot(values, values), torch.dot(lost, lost)]).double()
