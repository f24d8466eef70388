"""NVIDIA apex, where it is installed: detected, never required.

apex is built from source on GPU machines; the package of that name on PyPI is something else.
Megatron finds its fused norms and optimizers by itself. What has to be asked for is the fused
accumulation of weight gradients into the main gradient. (Written for CUDA; not run yet.)
"""

import importlib.util

import torch

__all__ = ["fused_weight_gradients"]

_EXTENSION = "fused_weight_gradient_mlp_cuda"  # module that apex builds with --wgrad_accumulation


def fused_weight_gradients() -> bool:
    """Whether apex's fused weight-gradient accumulation can be used by this process."""
    return torch.cuda.is_available() and importlib.util.find_spec(_EXTENSION) is not None
