"""How well this rank orthogonalises: a probe around Muon's orthogonaliser."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OrthogonalisationProbe", "orthogonality_error"]


class OrthogonalisationProbe:
    """An orthogonaliser that looks at one matrix of those it returns, each time another one.

    Args:
        orthogonalise: Maps a batch of matrices ``[b, rows, columns]`` to their directions.
        matrices_per_step: Matrices that pass in every inner step, always in the same order.
    """

    def __init__(
        self, orthogonalise: Callable[[Tensor], Tensor], *, matrices_per_step: int
    ) -> None:
        self._orthogonalise = orthogonalise
        self._period = max(matrices_per_step, 1)
        self._sample, self._passed = 0, 0
        self._error: Tensor | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """Orthogonalise a batch; note the error of the sample if it is in it."""
        directions = self._orthogonalise(batch)
        place = self._sample - self._passed
        if self._error is None and 0 <= place < len(directions):
            self._error = orthogonality_error(directions[place])
        self._passed = (self._passed + len(directions)) % self._period
        return directions

    def take(self) -> dict[str, float | Tensor]:
        """Return the metrics since the last call, and go on to the next matrix.

        A rank that owned no matrix returns nothing.
        """
        error, self._error = self._error, None
        if error is None:
            return {}
        self._sample = (self._sample + 1) % self._period
        return {"muon/orthogonality_error": error}


def orthogonality_error(X: Tensor) -> Tensor:
    """Return ``|X X^T - I|_F / sqrt(n)`` over the shorter side ``n`` of a matrix, 0-dim."""
    X = X.float() if X.size(0) <= X.size(1) else X.float().T
    n = X.size(0)
    norm: Tensor = torch.linalg.matrix_norm(X @ X.T - torch.eye(n, device=X.device))
    return norm / math.sqrt(n)
