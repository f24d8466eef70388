"""Error feedback: what a code loses is kept, and added to the next round's values.

    v = x + decay * residual;  q = D(E(v));  residual <- v - q

The owner of a residual is whoever encodes: a replica keeps one for its pseudogradients (e), a chunk
owner one for the mean (f). Why not ``x + residual``: old losses belong to an anchor that has moved
(the decay of MuLoCo, facebookresearch/MuLoCo).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_muloco.compress.codec import Codec
from megatron_muloco.compress.units import CodingUnit

__all__ = ["ErrorFeedback", "encode"]


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
