"""Measurements on this rank: peak memory, and the orthogonality error of Muon's directions."""

import math
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OrthogonalisationProbe", "orthogonality_error", "peak_memory_gib"]


def peak_memory_gib(device: torch.device) -> float:
    """Return this rank's peak memory so far in GiB; does not wait for the device.

    On an accelerator it is the peak of allocated tensors (``torch.cuda.max_memory_allocated``), on
    a CPU the peak resident memory of the process, which includes the Python libraries.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # KiB, but bytes on macOS


class OrthogonalisationProbe:
    """Wraps an orthogonaliser and measures one of its results per line, a different one each time.

    Args:
        orthogonalise: Maps a batch of matrices ``[b, rows, columns]`` to their update directions.
        matrices_per_step: Matrices that this rank orthogonalises in every inner step, always in the
            same order.
    """

    def __init__(
        self, orthogonalise: Callable[[Tensor], Tensor], *, matrices_per_step: int
    ) -> None:
        self._orthogonalise = orthogonalise
        self._period = max(matrices_per_step, 1)
        self._sample, self._passed = 0, 0
        self._error: Tensor | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """Orthogonalise a batch; keep the error of the sampled matrix if it is in the batch."""
        directions = self._orthogonalise(batch)
        place = self._sample - self._passed
        if self._error is None and 0 <= place < len(directions):
            self._error = orthogonality_error(directions[place])
        self._passed = (self._passed + len(directions)) % self._period
        return directions

    def take(self) -> dict[str, float | Tensor]:
        """Return the metric since the last call, and select the next matrix.

        The result is empty on a rank that owns no matrix.
        """
        error, self._error = self._error, None
        if error is None:
            return {}
        self._sample = (self._sample + 1) % self._period
        return {"muon/orthogonality_error": error}


def orthogonality_error(X: Tensor) -> Tensor:
    """Return ``|X X^T - I|_F / sqrt(n)`` of a matrix with the shorter side ``n``, 0-dim fp32."""
    X = X.float() if X.size(0) <= X.size(1) else X.float().T
    n = X.size(0)
    norm: Tensor = torch.linalg.matrix_norm(X @ X.T - torch.eye(n, device=X.device))
    return norm / math.sqrt(n)
