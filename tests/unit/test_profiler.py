"""The step profiler records its window, spans of all threads included, and never ends a run."""

import gzip
import json
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from megatron_muloco.config.schema import MonitorConfig, ProfileConfig
from megatron_muloco.monitor.profiler import StepProfiler, build_profiler, profiled, trace_path

CPU = torch.device("cpu")


def work(name: str) -> None:
    with record_function(name):
        torch.ones(4) + 1


def steps(profiler: StepProfiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with profiled(profiler, step):
            work(f"muloco/step{step}")
            thread = threading.Thread(target=work, args=(f"muloco/thread{step}",))
            thread.start()
            thread.join()


def spans(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith("muloco/")}


def listener(said: list[str]) -> Any:
    return SimpleNamespace(say=said.append, paused=nullcontext)


def build(directory: Path, said: list[str], window: tuple[int, int], rank: int = 0) -> StepProfiler:
    config = ProfileConfig(steps=window, with_memory=True)
    return StepProfiler(config, directory, rank=rank, device=CPU, monitor=listener(said))


def test_a_trace_holds_exactly_the_steps_of_its_window(tmp_path: Path) -> None:
    said: list[str] = []
    steps(build(tmp_path, said, (3, 4), rank=2), 1, 6)
    path = trace_path(tmp_path, 2, 3, 4)
    assert [path] == list(tmp_path.iterdir())
    assert spans(path) == {f"muloco/{what}{step}" for what in ("step", "thread") for step in (3, 4)}
    assert len(said) == 1
    assert str(path) in said[0]


def test_a_run_that_resumes_or_ends_inside_the_window_keeps_its_part(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = build(tmp_path, said, (3, 8))
    steps(profiler, 5, 6)
    assert not said
    profiler.close()
    profiler.close()
    assert [trace_path(tmp_path, 0, 5, 6)] == list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    steps(build(tmp_path / "file", said, (1, 1)), 1, 2)
    assert len(said) == 1
    assert said[0].startswith("monitor.profile: cannot write")


def test_ranges_for_nsight_take_the_place_of_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ITT ranges are made as NVTX ranges are, and need no GPU: torch runs one profiler per thread.
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", torch.autograd.profiler.emit_itt)
    said: list[str] = []
    config, device = ProfileConfig(steps=(2, 3), nvtx=True), torch.device("cuda")
    profiler = StepProfiler(config, tmp_path, rank=0, device=device, monitor=listener(said))
    steps(profiler, 1, 4)
    profiler.close()
    assert said == ["NVTX ranges of iterations 2 to 3"]
    assert not list(tmp_path.iterdir())
    steps(build(tmp_path, said, (5, 5)), 5, 5)  # torch's profiler is free again
    assert [trace_path(tmp_path, 0, 5, 5)] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "rank", "built"),
    [
        (MonitorConfig(dir="runs", profile=ProfileConfig(steps=(1, 2), ranks=(0, 3))), 3, True),
        (MonitorConfig(dir="runs", profile=ProfileConfig(steps=(1, 2))), 1, False),
        (MonitorConfig(dir="runs"), 0, False),
    ],
)
def test_only_the_named_ranks_profile(config: MonitorConfig, rank: int, built: bool) -> None:
    profiler = build_profiler(config, rank=rank, device=CPU, monitor=listener([]))
    assert (profiler is not None) == built
