"""Inputs and comparisons of tensors for tests: exact, or within bounds that are explained."""

import torch
from torch import Tensor

__all__ = ["assert_close", "assert_equal", "integer_tensor"]


def integer_tensor(
    *shape: int, seed: int, low: int = -8, high: int = 8, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return random integers in ``[low, high]`` stored as floats, so that sums of them are exact.

    Sums are order-independent, hence equal bit for bit over any number of ranks, as long as they
    stay below 2**24 in fp32 (2**8 in bf16).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def assert_equal(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Fail unless the tensors agree in shape, dtype and every bit; show the first difference.

    Bits, not values: -0.0 differs from 0.0, and a NaN equals the same NaN.
    """
    where = f"{message}: " if message else ""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise AssertionError(
            f"{where}{tuple(actual.shape)} {actual.dtype} is not "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
    differs = _bytes(actual).ne(_bytes(expected)).any(dim=-1)
    if not differs.any():
        return
    first = differs.flatten().nonzero()[0].item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), actual.shape))
    raise AssertionError(
        f"{where}{int(differs.sum())} of {differs.numel()} elements differ; the first at {index}: "
        f"{actual[index].item()!r} is not {expected[index].item()!r}"
    )


def assert_close(
    actual: Tensor, expected: Tensor, *, rtol: float, atol: float, message: str = ""
) -> None:
    """Compare as torch does, with ``message`` (where the bounds come from) after torch's own."""
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{text}\n{message}"
    )


def _bytes(tensor: Tensor) -> Tensor:
    """View as uint8 with one row per element."""
    flat = tensor.detach().cpu().contiguous()
    return flat.reshape(-1, 1).view(torch.uint8).reshape(*flat.shape, tensor.element_size())
