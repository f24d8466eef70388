"""A stand-in for Transformer Engine, computing with torch, under Megatron's real wrappers.

Its constructors take the arguments of Transformer Engine 2's `Linear` and `RMSNorm`, and its
parameters have the same names, shapes and marks. Everything else of the package is a mock.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from typing_extensions import override

_WRAPPERS = "megatron.core.extensions.transformer_engine"


class Linear(nn.Module):
    """A linear layer without communication: enough for one rank, and for shapes on several."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias
        assert parallel_mode in ("column", "row")
        size = tp_size if tp_group is None else tp_group.size()
        rows, columns = out_features, in_features
        if parallel_mode == "column":
            rows //= size
        else:
            columns //= size
        weight: Any = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        weight.tensor_model_parallel = True
        weight.partition_dim = 1 if parallel_mode == "row" else 0
        weight.partition_stride = 1
        self.weight = weight
        init_method(self.weight)

    @override
    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return torch.matmul(x, self.weight.t())


class RMSNorm(nn.Module):
    """The norm, with both names of its size."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        size: Any = normalized_shape or hidden_size
        weight: Any = nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
        weight.sequence_parallel = sequence_parallel
        self.weight, self.eps = weight, eps

    @override
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@contextmanager
def transformer_engine_stub() -> Iterator[None]:
    """Let Megatron's wrappers find the stub inside the block, and nothing after it."""
    package = MagicMock()
    package.__version__ = "2.0.0"
    package.pytorch.Linear, package.pytorch.RMSNorm = Linear, RMSNorm
    fp8: Any = ModuleType("transformer_engine.pytorch.fp8")
    fp8.FP8GlobalStateManager = MagicMock()
    fp8.fp8_autocast, fp8.fp8_model_init = MagicMock(), MagicMock()
    stubs = {
        "transformer_engine": package,
        "transformer_engine.pytorch": package.pytorch,
        fp8.__name__: fp8,
    }
    utils: Any = importlib.import_module("megatron.core.utils")
    extensions: Any = importlib.import_module("megatron.core.extensions")
    real = importlib.import_module(_WRAPPERS)
    del sys.modules[_WRAPPERS]
    sys.modules.update(stubs)
    try:
        importlib.import_module(_WRAPPERS)
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules[_WRAPPERS] = extensions.transformer_engine = real
        utils._te_version = None
