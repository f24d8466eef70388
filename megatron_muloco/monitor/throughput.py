"""Throughput, MFU and time left of a run, the slowest replica, and the table of accelerators.

Imports no torch.

Peaks are not guessed: an accelerator whose exact name is not in the table has none, and its MFU is
``None``.
"""

import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_muloco.errors import ConfigError

__all__ = [
    "PEAKS",
    "Peak",
    "ReplicaTimes",
    "Speed",
    "TimeLeft",
    "gpu_by_name",
    "measure_speed",
    "peak_tflops",
]


@dataclass(frozen=True, slots=True)
class Peak:
    """Dense bf16 matrix throughput of one accelerator, without structured sparsity, and its memory.

    Attributes:
        device: Exact name reported by the driver.
        tflops: Peak in TFLOP/s; half the number of data sheets that print only the sparse one.
        memory_gb: Memory in 1e9 bytes, as the data sheet prints it. What a driver reports differs
            by a few per cent.
        source: Source of the numbers.
    """

    device: str
    tflops: float
    memory_gb: int
    source: str


_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 data sheet; half of the sparse number"
_H200 = "NVIDIA H200 data sheet; half of the sparse number"
_B200 = "NVIDIA HGX B200 data sheet; half of the sparse number, an eighth of a board"
_L40S = "NVIDIA L40S data sheet"

PEAKS: tuple[Peak, ...] = (
    Peak("NVIDIA A100-SXM4-40GB", 312.0, 40, _A100),
    Peak("NVIDIA A100-SXM4-80GB", 312.0, 80, _A100),
    Peak("NVIDIA A100-PCIE-40GB", 312.0, 40, _A100),
    Peak("NVIDIA A100 80GB PCIe", 312.0, 80, _A100),
    Peak("NVIDIA L40S", 362.05, 48, _L40S),
    Peak("NVIDIA H100 80GB HBM3", 989.5, 80, _H100),
    Peak("NVIDIA H100 PCIe", 756.5, 80, _H100),
    Peak("NVIDIA H100 NVL", 835.5, 94, _H100),
    Peak("NVIDIA H200", 989.5, 141, _H200),
    Peak("NVIDIA H200 NVL", 835.5, 141, _H200),
    Peak("NVIDIA B200", 2250.0, 180, _B200),
)


def gpu_by_name(name: str) -> Peak:
    """Return the accelerator of that name, or the first whose name contains all its words.

    Raises:
        ConfigError: The table has none.
    """
    words = name.lower().replace("-", " ").split()
    for peak in PEAKS:
        if peak.device == name:
            return peak
    for peak in PEAKS:
        if words and all(word in peak.device.lower() for word in words):
            return peak
    known = ", ".join(peak.device for peak in PEAKS)
    raise ConfigError(f"--gpu: {name!r} is not in the table of accelerators: {known}.")


def peak_tflops(device: str, precision: str) -> float | None:
    """Return the peak of an accelerator in TFLOP/s, ``None`` if unknown.

    Args:
        device: Name reported by the driver; any other text on a CPU.
        precision: ``training.precision``; the table has peaks for ``bf16`` only.
    """
    if precision != "bf16":
        return None
    return next((peak.tflops for peak in PEAKS if peak.device == device), None)


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed over a number of inner steps.

    Attributes:
        seconds_per_step: Wall-clock seconds of an inner step.
        tokens_per_s: Tokens per second of all replicas together.
        tflops: Model TFLOP/s per rank.
        mfu: ``tflops`` divided by the peak; ``None`` without a known peak.
    """

    seconds_per_step: float
    tokens_per_s: float
    tflops: float
    mfu: float | None


def measure_speed(
    *,
    seconds: float,
    steps: int,
    tokens: int,
    flops_per_token: float,
    world_size: int,
    peak: float | None,
) -> Speed:
    """Return the speed of ``steps`` inner steps that took ``seconds``.

    Args:
        seconds: Wall-clock seconds of all steps together, more than 0.
        steps: Number of inner steps.
        tokens: Tokens of all steps together, over all replicas.
        flops_per_token: Model FLOPs of one token, forward and backward.
        world_size: Number of ranks.
        peak: Peak of one rank's accelerator in TFLOP/s; ``None`` if unknown.
    """
    tokens_per_s = tokens / seconds
    tflops = tokens_per_s * flops_per_token / world_size / 1e12
    return Speed(seconds / steps, tokens_per_s, tflops, None if peak is None else tflops / peak)


@dataclass(frozen=True, slots=True)
class ReplicaTimes:
    """Times of an inner step of all replicas. In a round all of them wait for the slowest one.

    Attributes:
        shortest_ms: Milliseconds of a step of the fastest replica.
        longest_ms: Milliseconds of a step of the slowest replica.
        slowest: The slowest replica; the first of several.
    """

    shortest_ms: float
    longest_ms: float
    slowest: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "ReplicaTimes | None":
        """Return the times of replicas 0, 1, ...; ``None`` unless all of them are known."""
        if len(times_ms) < 2 or not all(math.isfinite(each) and each > 0 for each in times_ms):
            return None
        longest = max(times_ms)
        return cls(min(times_ms), longest, times_ms.index(longest))

    @property
    def ratio(self) -> float:
        """Time of the slowest replica over that of the fastest one."""
        return self.longest_ms / self.shortest_ms

    def metrics(self) -> dict[str, float]:
        """Return the metrics by tag."""
        return {
            "perf/replica_step_ms_min": self.shortest_ms,
            "perf/replica_step_ms_max": self.longest_ms,
            "perf/slowest_replica": float(self.slowest),
        }


_RECENT = 200  # steps of a kind that are averaged; chosen: a speed that changes shows within them


class TimeLeft:
    """Estimates the seconds that a run still takes, from what its parts have taken so far.

    A mean over all steps would be wrong early in a run: outer steps, evaluations and saves are
    rare, and each takes as long as many inner steps. So each kind has a mean of its own, and what
    is left of each kind is counted. The first step of a start, which loads and compiles kernels,
    is not measured. A kind that has not been seen yet counts nothing.

    Args:
        train_iters: Inner steps of the run.
        consumed: Samples of all steps up to one; an inner step takes time in proportion to its own.
        outer_steps: Inner steps that are followed by a launch or an apply, ascending.
        intervals: Kind of pause -> inner steps between two of them; the run ends with one more.
    """

    def __init__(
        self,
        train_iters: int,
        consumed: Callable[[int], int],
        *,
        outer_steps: Sequence[int] = (),
        intervals: dict[str, int] | None = None,
    ) -> None:
        self._last, self._consumed, self._outer_steps = train_iters, consumed, outer_steps
        self._intervals = intervals or {}
        self._previous: tuple[int, float] | None = None
        # (samples, seconds) of the latest inner steps, without and with outer events before them.
        self._inner: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._both: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._pauses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))

    def pause(self, kind: str, seconds: float) -> None:
        """Note a pause of the training, such as an evaluation."""
        self._pauses[kind].append(seconds)

    def step(self, step: int, seconds: float) -> float | None:
        """Note that inner step ``step`` was made, and return the seconds left.

        Args:
            step: Inner step; its outer step is still to come.
            seconds: Training time since the start, without pauses.

        Returns:
            Seconds until the run ends, pauses included; ``None`` after the first step of a start.
        """
        previous, self._previous = self._previous, (step, seconds)
        if previous is not None:
            after, began = previous
            work = self._consumed(step) - self._consumed(after)
            (self._both if self._has_outer(after) else self._inner).append((work, seconds - began))
        if not self._inner and not self._both:
            return None
        left = self._training(step)
        for kind, interval in self._intervals.items():
            if interval and self._pauses[kind]:
                due = (self._last - 1) // interval - (step - 1) // interval + 1
                left += due * fmean(self._pauses[kind])
        return left

    def _training(self, step: int) -> float:
        """Return the seconds of the inner and outer steps after inner step ``step``."""
        alone = self._inner or self._both
        per_sample = sum(took for _, took in alone) / max(1, sum(work for work, _ in alone))
        outer = 0.0
        if self._inner and self._both:
            outer = fmean(took - per_sample * work for work, took in self._both)
        count = len(self._outer_steps) - bisect_left(self._outer_steps, step)
        work = self._consumed(self._last) - self._consumed(step)
        return per_sample * work + max(0.0, outer) * count

    def _has_outer(self, step: int) -> bool:
        place = bisect_left(self._outer_steps, step)
        return place < len(self._outer_steps) and self._outer_steps[place] == step
