"""`StepProfiler` records a window of inner steps: a Chrome trace, or NVTX ranges for Nsight.

The program marks its phases with `torch.profiler.record_function`, under these names::

    muloco/forward_backward   muloco/inner_step   muloco/adamw     muloco/collect
    muloco/newton_schulz      muloco/return       muloco/launch    muloco/encode
    muloco/wait               muloco/decode       muloco/apply     muloco/publish
    muloco/evaluate           muloco/save

Any other profiler sees the same spans. Open the trace in Perfetto or ``chrome://tracing``.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from megatron_muloco.config.schema import MonitorConfig, ProfileConfig
from megatron_muloco.monitor.monitor import Monitor

__all__ = ["StepProfiler", "build_profiler", "profiled", "trace_path"]


def trace_path(directory: Path, rank: int, first: int, last: int) -> Path:
    """Return the file that the trace of a rank and a window of inner steps goes to."""
    return directory / f"rank{rank:05d}_steps{first}-{last}.json.gz"


class StepProfiler:
    """Profiles inner steps ``first`` to ``last``, both included, on one rank.

    Args:
        config: What is recorded.
        directory: Directory for the trace; made when the trace is written.
        rank: This rank, part of the file's name.
        device: The device that the rank trains on; on CUDA its kernels are recorded too, or, where
            ``config.nvtx`` asks for them, NVTX ranges are emitted and no trace is written.
        monitor: Says where the trace is; its clock stands still while the trace is written.
    """

    def __init__(
        self,
        config: ProfileConfig,
        directory: Path,
        *,
        rank: int,
        device: torch.device,
        monitor: Monitor,
    ) -> None:
        assert config.steps is not None, "a profiler needs a window"
        self._first, self._last = config.steps
        self._config, self._directory, self._rank = config, directory, rank
        self._cuda = device.type == "cuda"
        self._monitor = monitor
        self._running: profile | None = None
        self._ranges: AbstractContextManager[object] | None = None
        self._begun = self._ended = self._first

    def before(self, step: int) -> None:
        """Start recording where ``step`` is in the window.

        A run that resumes inside the window records the rest of it.
        """
        if self._is_running:
            self._ended = step
        if self._is_running or not self._first <= step <= self._last:
            return
        self._begun = self._ended = step
        if self._config.nvtx and self._cuda:
            # In place of the trace: torch refuses a second profiler on a thread, and only one of
            # Nsight and torch's profiler can record the kernels of a process.
            self._ranges = torch.autograd.profiler.emit_nvtx(
                record_shapes=self._config.record_shapes
            )
            self._ranges.__enter__()
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._running = profile(
            activities=activities,
            profile_memory=self._config.with_memory,
            with_stack=self._config.with_stack,
            record_shapes=self._config.record_shapes,
            # Without it the spans of the communication thread would be missing.
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self._running.start()

    def after(self, step: int) -> None:
        """Write the trace, or end the ranges, after the last step of the window."""
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what has been recorded, also of a run that ends inside the window."""
        if self._ranges is not None:
            ranges, self._ranges = self._ranges, None
            ranges.__exit__(None, None, None)
            self._monitor.say(f"NVTX ranges of iterations {self._begun} to {self._ended}")
        if self._running is not None:
            running, self._running = self._running, None
            self._write(running)

    @property
    def _is_running(self) -> bool:
        return self._running is not None or self._ranges is not None

    def _write(self, running: profile) -> None:
        started = time.perf_counter()
        with self._monitor.paused():
            said = self._export(running)
        seconds = time.perf_counter() - started
        self._monitor.say(f"{said} ({seconds:.1f} s)")

    def _export(self, running: profile) -> str:
        running.stop()
        path = trace_path(self._directory, self._rank, self._begun, self._ended)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # training is worth more than its trace
            return f"monitor.profile: cannot write {path}: {error}. Training goes on"
        return f"profile of iterations {self._begun} to {self._ended}: {path}"


@contextmanager
def profiled(profiler: StepProfiler | None, step: int) -> Iterator[None]:
    """Profile what happens inside as inner step ``step``, where it is in the profiler's window."""
    if profiler is None:
        yield
        return
    profiler.before(step)
    yield
    profiler.after(step)


def build_profiler(
    config: MonitorConfig, *, rank: int, device: torch.device, monitor: Monitor
) -> StepProfiler | None:
    """Return this rank's profiler, or ``None`` where the run does not profile it."""
    if config.profile.steps is None or config.dir is None or rank not in config.profile.ranks:
        return None
    directory = Path(config.dir) / "profile"
    return StepProfiler(config.profile, directory, rank=rank, device=device, monitor=monitor)
