"""How long and how well this rank orthogonalises: a probe around Muon's orthogonaliser.

On an accelerator the time is taken by events in the stream, so that nothing waits while training;
they are read when the numbers are asked for. (That branch has not been run yet.)
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["OrthogonalisationProbe", "orthogonality_error"]


class OrthogonalisationProbe:
    """An orthogonaliser that measures the one it wraps.

    Args:
        orthogonalise: Maps a batch of matrices ``[b, rows, columns]`` to their directions.
    """

    def __init__(self, orthogonalise: Callable[[Tensor], Tensor]) -> None:
        self._orthogonalise = orthogonalise
        self._host_ms = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._error: Tensor | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """Orthogonalise a batch, and note the time."""
        if batch.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            directions = self._orthogonalise(batch)
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            directions = self._orthogonalise(batch)
            self._host_ms += (time.perf_counter() - started) * 1e3
        if self._error is None:
            self._error = orthogonality_error(directions[0])
        return directions

    def take(self, steps: int) -> dict[str, float | Tensor]:
        """Return the metrics since the last call and start over; waits for the accelerator.

        Args:
            steps: Inner steps since the last call. A rank that owned no matrix returns no error.
        """
        milliseconds = self._host_ms
        if self._events:
            self._events[-1][1].synchronize()
            milliseconds += sum(begin.elapsed_time(end) for begin, end in self._events)
        metrics: dict[str, float | Tensor] = {"perf/newton_schulz_ms": milliseconds / steps}
        if self._error is not None:
            metrics["muon/orthogonality_error"] = self._error
        self._host_ms, self._events, self._error = 0.0, [], None
        return metrics


def orthogonality_error(X: Tensor) -> Tensor:
    """Return ``|X X^T - I|_F / sqrt(n)`` over the shorter side ``n`` of a matrix, 0-dim."""
    X = X.float() if X.size(0) <= X.size(1) else X.float().T
    n = X.size(0)
    norm: Tensor = torch.linalg.matrix_norm(X @ X.T - torch.eye(n, device=X.device))
    return norm / math.sqrt(n)
