"""Speed of a run relative to its model and its accelerator: pure arithmetic, no torch.

Nothing is guessed: an accelerator that is not in the table by its exact name has no peak, and what
would need one is ``None`` and prints as ``n/a``.
"""

from dataclasses import dataclass

__all__ = ["PEAKS", "Peak", "Speed", "measure_speed", "peak_tflops"]


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense bf16 matrix throughput of one accelerator, without structured sparsity.

    Attributes:
        device: Exact name that the driver reports.
        tflops: TFLOP/s. Data sheets that print only the sparse number are halved.
        source: Where the number is from.
    """

    device: str
    tflops: float
    source: str


_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 data sheet; half of the sparse number"
_H200 = "NVIDIA H200 data sheet; half of the sparse number"

PEAKS: tuple[Peak, ...] = (
    Peak("NVIDIA A100-SXM4-40GB", 312.0, _A100),
    Peak("NVIDIA A100-SXM4-80GB", 312.0, _A100),
    Peak("NVIDIA A100-PCIE-40GB", 312.0, _A100),
    Peak("NVIDIA A100 80GB PCIe", 312.0, _A100),
    Peak("NVIDIA H100 80GB HBM3", 989.5, _H100),
    Peak("NVIDIA H100 PCIe", 756.5, _H100),
    Peak("NVIDIA H100 NVL", 835.5, _H100),
    Peak("NVIDIA H200", 989.5, _H200),
    Peak("NVIDIA H200 NVL", 835.5, _H200),
)


def peak_tflops(device: str, precision: str) -> float | None:
    """Return the peak of an accelerator, ``None`` where unknown.

    Args:
        device: Name that the driver reports, or anything else on a CPU.
        precision: As in the config; only ``bf16`` has a peak in the table.
    """
    if precision != "bf16":
        return None
    return next((peak.tflops for peak in PEAKS if peak.device == device), None)


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of some inner steps.

    Attributes:
        seconds_per_step: Wall-clock.
        tokens_per_s: Of all replicas.
        tflops: Model TFLOP/s per rank.
        mfu: ``tflops`` over the peak; ``None`` without a known peak.
    """

    seconds_per_step: float
    tokens_per_s: float
    tflops: float
    mfu: float | None


def measure_speed(
    *,
    seconds: float,
    steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    world_size: int,
    peak: float | None,
) -> Speed:
    """Return the speed of ``steps`` inner steps that took ``seconds``.

    Args:
        seconds: Wall-clock of all the steps, more than 0.
        steps: How many.
        tokens_per_step: Tokens of one step over all replicas.
        flops_per_token: Forward and backward.
        world_size: Ranks.
        peak: TFLOP/s of one rank's accelerator.
    """
    tokens_per_s = steps * tokens_per_step / seconds
    tflops = tokens_per_s * flops_per_token / world_size / 1e12
    return Speed(seconds / steps, tokens_per_s, tflops, None if peak is None else tflops / peak)
