"""Error feedback: what a code loses is kept, and added to the next round's values.

    v = x + decay * residual;  q = D(E(v));  residual <- v - q

The owner of a residual is whoever encodes: a replica keeps one for its pseudogradients (e), a chunk
owner one for the mean (f). Why not ``x + residual``: old losses belong to an anchor that has moved
(the decay of MuLoCo, facebookresearch/MuLoCo).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """Residuals by name; those never kept are zero.

    Args:
        decay: Factor on a residual when it is added again.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._residuals: dict[str, Tensor] = {}

    def add_to(self, name: str, values: Tensor) -> None:
        """Add the decayed residual to ``values``, in place."""
        if name in self._residuals:
            # Two roundings, like the reference; a fused multiply-add would have one.
            values.add_(self._residuals[name] * self._decay)

    def keep(self, name: str, values: Tensor, decoded: Tensor) -> None:
        """Remember what ``decoded`` lacks of ``values``."""
        if name not in self._residuals:
            self._residuals[name] = torch.empty_like(values)
        torch.sub(values, decoded, out=self._residuals[name])

    def forget(self) -> None:
        """Set all residuals to zero."""
        for residual in self._residuals.values():
            residual.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the residuals; the live tensors."""
        return dict(self._residuals)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take copies of ``state``, and nothing else."""
        self._residuals = {name: residual.clone() for name, residual in state.items()}
