"""The small numbers that every replica shows to the others with a launch.

::

    [ norm | the caller's riders | sketch ]      fp32; the same sizes on every replica
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Shown", "pack_riders"]


def pack_riders(norm: float, riders: Tensor | None, sketch: Tensor | None = None) -> Tensor:
    """Return one replica's numbers, 1-D.

    Args:
        norm: Of the pseudogradient; NaN where it is not finite.
        riders: The caller's.
        sketch: Of this rank's share of the pseudogradient, in rounds that compare replicas.
    """
    parts = [part.float() for part in (riders, sketch) if part is not None]
    device = parts[0].device if parts else torch.device("cpu")
    own = torch.tensor([norm], dtype=torch.float32, device=device)
    return torch.cat([own, *(part.to(device) for part in parts)])


@dataclass(frozen=True, slots=True)
class Shown:
    """What all replicas showed.

    Attributes:
        norms: ``[K]``.
        riders: ``[K, n]``.
        sketches: ``[K, sketch size]``.
    """

    norms: Tensor
    riders: Tensor
    sketches: Tensor

    @classmethod
    def unpack(cls, table: Tensor, sketch_size: int) -> "Shown":
        """Return the parts of ``[K, numbers of a replica]``."""
        end = table.size(1) - sketch_size
        return cls(table[:, 0], table[:, 1:end], table[:, end:])
