"""The CPU seam, which runs an unmodified Megatron-core on a machine without an accelerator.

Megatron-core names the device "cuda" in about a hundred places. On a machine without CUDA,
`enable_cpu_backend` replaces that device in one place: a `TorchFunctionMode` puts tensors meant for
"cuda" on the CPU, and a dozen functions of ``torch.cuda`` get CPU equivalents. It is installed
explicitly, once per process, and never where CUDA is available. The mode is thread-local: a helper
thread that runs Megatron code must enter a mode of its own (`CpuDeviceMode`).
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from megatron_muloco.errors import RuntimeMismatch

__all__ = ["CpuDeviceMode", "enable_cpu_backend", "training_device"]

_CPU = torch.device("cpu")


def training_device() -> torch.device:
    """Return the device that this rank trains on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def _on_cpu(target: object) -> object:
    """Return the CPU if ``target`` names a CUDA device, else ``target`` itself."""
    if isinstance(target, str) and target.split(":")[0] == "cuda":
        return _CPU
    if isinstance(target, torch.device) and target.type == "cuda":
        return _CPU
    return target


class CpuDeviceMode(TorchFunctionMode):
    """Puts CUDA tensors on the CPU and reports CUDA type names for CPU tensors.

    The type names are needed because Megatron's optimizers test
    ``param.type() == "torch.cuda.FloatTensor"`` and would refuse every CPU parameter.
    """

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *map(_on_cpu, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return func(*args, **kwargs)


class _HostStream:
    """Replacement for a CUDA stream; on the CPU, work runs in program order."""

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _ignore(*_args: object, **_kwargs: object) -> None:
    """Replace a CUDA call that has no meaning on the CPU."""


def _get_cpu_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(state)


def enable_cpu_backend() -> None:
    """Make Megatron-core run on the CPU in this process; a second call does nothing.

    Call it before Megatron modules are built, in the thread that trains. Backward is covered too,
    because CPU autograd runs it in the calling thread.

    Raises:
        RuntimeMismatch: CUDA is available; redirecting it would silently train on the CPU.
    """
    if torch.cuda.is_available():
        raise RuntimeMismatch(
            "the CPU backend was requested on a machine with a CUDA accelerator; it would put "
            "every tensor on the CPU. Hide the accelerator (CUDA_VISIBLE_DEVICES='') or do not "
            "enable it."
        )
    if getattr(torch.cuda.synchronize, "__name__", "") == _ignore.__name__:
        return
    stream = _HostStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "synchronize": _ignore,
        "set_device": _ignore,
        "empty_cache": _ignore,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "get_rng_state": _get_cpu_rng_state,
        "set_rng_state": _set_cpu_rng_state,
        "manual_seed": torch.manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    CpuDeviceMode().__enter__()  # type: ignore[no-untyped-call]

    from megatron.core.tensor_parallel import random as tensor_parallel_random

    tensor_parallel_random._get_cuda_rng_state = _get_cpu_rng_state
    tensor_parallel_random._set_cuda_rng_state = _set_cpu_rng_state
    # Megatron checks that the CPU generator is unchanged inside a fork of the CUDA generator; here
    # both are the same generator.
    warnings.filterwarnings("ignore", message="CPU RNG state changed within GPU RNG context")
