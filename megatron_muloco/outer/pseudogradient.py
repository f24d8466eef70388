"""The one place where the sign of the pseudogradient is decided."""

from torch import Tensor

__all__ = ["pseudogradient"]


def pseudogradient(anchor: Tensor, local: Tensor, *, out: Tensor) -> Tensor:
    """Return ``anchor - local``, the direction that the outer optimizer subtracts.

    A positive entry means that the replica moved *down* in that coordinate, so the result behaves
    like a gradient summed over the round: an outer step with lr 1 and no momentum moves the anchor
    onto the (mean) local parameters, up to one fp32 rounding.

    Args:
        anchor: Parameters agreed at the last outer step; fp32, on any device.
        local: The replica's current parameters, same shape; may be a view of a model parameter.
        out: Buffer for the result, fp32, on the device that will send it. It may be neither input.

    Returns:
        ``out``.

    Dtypes: the subtraction is done in fp32, whatever ``local`` is.
    Source: DiLoCo (arXiv:2311.08105), algorithm 1.
    """
    out.copy_(anchor)
    return out.sub_(local.to(device=out.device, dtype=out.dtype))
