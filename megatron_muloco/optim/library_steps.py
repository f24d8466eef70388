"""Newton-Schulz steps by Emerging-Optimizers' Triton kernels for CUDA. Not run here: no GPU.

The kernels compute half of each symmetric product in bf16, one matrix at a time.
Source: Emerging-Optimizers 0.3.0, ``newton_schulz_step_tsyrk`` (Python 3.12 and later).
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_muloco.optim.gram import Triple

__all__ = ["iterate"]

_MODULE = "emerging_optimizers.orthogonalized_optimizers.muon_utils"


def iterate(X: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Apply every step to ``[batch, m, n]`` with m at most n, on CUDA in bf16.

    Raises:
        ValueError: Another device or dtype, or the library is not installed.
    """
    if X.device.type != "cuda" or X.dtype != torch.bfloat16:
        raise ValueError(
            f"impl 'library' iterates in bf16 on CUDA, not in {X.dtype} on {X.device.type}; use "
            "impl 'auto'"
        )
    try:
        step = importlib.import_module(_MODULE).newton_schulz_step_tsyrk
    except ImportError as error:
        raise ValueError(
            f"impl 'library' needs emerging-optimizers, which cannot be imported: {error}; install "
            "it or use impl 'auto'"
        ) from error
    results = []
    for matrix in X.unbind():
        for a, b, c in triples:
            matrix = step(matrix, a, b, c)
        results.append(matrix)
    return torch.stack(results)
