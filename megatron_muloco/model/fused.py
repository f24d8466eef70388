"""Fused paths of the model that need no Transformer Engine.

`choose_fusions` decides once per rank which parts run fused, and `install` gives Megatron the
kernels that it would otherwise expect from apex. On a CPU nothing is fused, so results there do not
depend on this module.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_muloco.config.schema import TrainingConfig

__all__ = [
    "UNFUSED",
    "Fusions",
    "RotaryKernel",
    "accumulate_product",
    "can_accumulate",
    "can_compile",
    "choose_fusions",
    "install",
]

_APEX = "fused_weight_gradient_mlp_cuda"  # module that apex builds with --wgrad_accumulation


@dataclass(frozen=True)
class Fusions:
    """Which parts of the model run fused.

    Attributes:
        weight_gradients: Linear layers add their weight gradient to the main gradient themselves.
        swiglu: The activation is one kernel, and its derivative another; Megatron compiles both.
        cross_entropy: The loss is a few compiled kernels and one collective fewer over tensor
            ranks. Its gradient is bf16.
        rotary: Cosines and sines of the rotary embedding are computed once (`cached`), and the
            rotation is one kernel as well (`compiled`); or the kernel is Transformer Engine's.
        notes: Why parts are not fused that could be on this device.
    """

    weight_gradients: bool = False
    swiglu: bool = False
    cross_entropy: bool = False
    rotary: Literal["", "cached", "compiled", "Transformer Engine"] = ""
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """Return what is fused, for the first lines of a run."""
        parts = {
            "weight gradients": self.weight_gradients,
            "SwiGLU": self.swiglu,
            "cross entropy": self.cross_entropy,
            f"RoPE ({self.rotary})": bool(self.rotary),
        }
        names = [name for name, fused in parts.items() if fused]
        return "; ".join([f"fused: {', '.join(names) or 'nothing'}", *self.notes])


UNFUSED = Fusions()


def choose_fusions(training: TrainingConfig, device: torch.device) -> Fusions:
    """Return what runs fused on ``device``; nothing on a CPU, or with ``fusions: none``.

    Megatron's flag says whether apex's kernel could be loaded. Without it, `accumulate_product`
    takes its place if this torch has the operation.

    Args:
        training: Precision, and whether to fuse at all.
        device: The training device.
    """
    if device.type != "cuda" or training.fusions == "none":
        return UNFUSED
    notes = []
    product = bool(layers._grad_accum_fusion_available) or can_accumulate(device)
    if not product:
        notes.append(
            "weight gradients are not: this torch cannot add a bf16 product to an fp32 tensor, and "
            "apex is not usable"
        )
    compiles = can_compile()
    if not compiles:
        notes.append("nothing is compiled: triton or a C compiler is missing")
    rotary: Literal["cached", "compiled", "Transformer Engine"]
    rotary = "compiled" if compiles else "cached"
    if not isinstance(rope_utils.fused_apply_rotary_pos_emb, RotaryKernel | None):
        rotary = "Transformer Engine"
    return Fusions(
        weight_gradients=product,
        swiglu=compiles,
        # Compiled sums depend on block sizes, which some versions of torch choose by timing.
        cross_entropy=compiles and training.precision == "bf16" and not training.deterministic,
        rotary=rotary,
        notes=tuple(notes),
    )


def install(fusions: Fusions) -> None:
    """Give Megatron the kernels of ``fusions`` that it lacks; call it before the model is built."""
    if fusions.weight_gradients and not layers._grad_accum_fusion_available:
        stand_in = ModuleType(_APEX, "Stand-in for apex's module; see megatron_muloco.model.fused.")
        stand_in.__spec__ = ModuleSpec(_APEX, None)
        # Megatron calls the second one for gradients in 16 bits, in either format.
        stand_in.wgrad_gemm_accum_fp32 = accumulate_product  # type: ignore[attr-defined]
        stand_in.wgrad_gemm_accum_fp16 = accumulate_product  # type: ignore[attr-defined]
        sys.modules[_APEX] = stand_in  # for imports inside Megatron's functions
        layers.fused_weight_gradient_mlp_cuda = stand_in
        layers._grad_accum_fusion_available = True
    if fusions.rotary and rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = RotaryKernel(compiled=fusions.rotary == "compiled")


def accumulate_product(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add the weight gradient ``grad_output^T inputs`` to ``main_grad``, in place.

    Without it, the product is rounded to the dtype of the weight, written, read, and added by
    Megatron's hook: 12 bytes of memory traffic a parameter and microbatch more with bf16 weights
    and fp32 gradients. On a GPU the product is added before it is rounded. On a CPU the same
    operations run as without it, so the result has the same bits.

    Args:
        inputs: Inputs of the linear layer, ``[tokens, in]``.
        grad_output: Gradient of its outputs, ``[tokens, out]``, in the dtype of ``inputs``.
        main_grad: ``[out, in]``, in the dtype of ``inputs`` or in fp32.
    """
    if not inputs.is_cuda:
        main_grad.add_(grad_output.t().matmul(inputs))
    elif main_grad.dtype is inputs.dtype:
        main_grad.addmm_(grad_output.t(), inputs)
    else:
        torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=main_grad.dtype, out=main_grad)


def can_accumulate(device: torch.device) -> bool:
    """Return whether `accumulate_product` adds a bf16 product to an fp32 tensor exactly.

    Torch versions differ in whether they have the operation, so it is tried.
    """
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.full((16, 16), 257.0, device=device)
    try:
        accumulate_product(ones, ones, total)
    except (RuntimeError, TypeError):
        return False
    # 257 and 273 have nine significant bits, bf16 has eight: a sum that passed through it is wrong.
    return bool((total == 273.0).all())


def can_compile() -> bool:
    """Return whether ``torch.compile`` can build kernels for a GPU on this machine."""
    compilers = [os.environ.get("CC"), "clang", "gcc"]  # where triton looks
    return find_spec("triton") is not None and any(
        name and shutil.which(name) for name in compilers
    )


class RotaryKernel:
    """Rotary embedding in place of Transformer Engine's kernel, at the place Megatron calls it.

    Megatron computes cosines and sines for the queries and for the keys of every layer. Here they
    are computed once for a table of angles and a dtype. The arithmetic is Megatron's: not compiled,
    results have the same bits.

    Args:
        compiled: Make the rotation one kernel with ``torch.compile``.
    """

    def __init__(self, *, compiled: bool) -> None:
        self._rotate = torch.compile(_rotate) if compiled else _rotate
        self._angles: Tensor | None = None
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
        """Return ``x`` [s, b, heads, d] rotated by ``angles`` [s, 1, 1, d], fp32."""
        if interleaved:
            raise ValueError("only rotary embeddings that are not interleaved are implemented")
        return self._rotate(x, *self._table(angles, x.dtype))

    def _table(self, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of ``angles`` in ``dtype``."""
        known = self._angles
        # Recomputation passes new tensor objects with the same memory. That memory belongs to no
        # other angles while a reference to them is kept here.
        if (
            known is None
            or angles.data_ptr() != known.data_ptr()
            or (angles.shape, angles.device) != (known.shape, known.device)
        ):
            self._angles, self._tables = angles, {}
        if dtype not in self._tables:
            self._tables[dtype] = (torch.cos(angles).to(dtype), torch.sin(angles).to(dtype))
        return self._tables[dtype]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
