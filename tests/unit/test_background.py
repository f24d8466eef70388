"""Reductions beside training, in a thread or in steps; the first failure is final."""

import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.comm.background import BackgroundReducer, SteppedReducer, beside_training
from megatron_muloco.comm.reducers import (
    Phases,
    build_plain_reducer_for,
    finish,
    new_memory,
)
from megatron_muloco.config.outer import NesterovOuter
from megatron_muloco.errors import RuntimeMismatch, SyncError
from megatron_muloco.outer.reducer import Reduced, Reducer, ReductionStats, Residuals, Sizes

CPU = torch.device("cpu")


class Recorder:
    """A reducer of three crossings that notes who calls what, and can be held up."""

    residual_names = ("residual",)
    returns_views = True
    crossings = 3

    def __init__(self, sends_from: torch.device = CPU) -> None:
        self.sends_from = sends_from
        self.calls: list[tuple[str, int]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.fail = False
        self.buffer = torch.zeros(1)

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        return new_memory(sizes, CPU)

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> Any:
        assert self.go_on.wait(10)
        self.note(f"launch {fragment}")
        return fragment, tensors

    def advance(self, handle: Any) -> None:
        raise AssertionError("wrappers execute phases")

    def wait(self, handle: Any) -> Reduced:
        self.note(f"wait {handle[0]}")
        return finish(self.phases(handle))

    def phases(self, handle: Any) -> Phases:
        fragment, tensors = handle
        for crossing in range(2, self.crossings + 1):
            self.note(f"send {fragment}.{crossing}")
            yield
        self.note(f"end {fragment}")
        if self.fail:
            raise SyncError("a peer failed")
        assert not torch.is_grad_enabled()
        self.buffer.copy_(tensors["a"] * 2)
        stats = ReductionStats(torch.ones(1), torch.zeros(1, 0), wire_bytes=fragment)
        return Reduced({"a": self.buffer}, stats)

    def forget_residual(self) -> None:
        self.note("forget")

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        self.note("residuals")
        return {"residual": {}}

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        self.note("load")

    def note(self, what: str) -> None:
        self.calls.append((what, threading.get_ident()))


def whole(fragment: int) -> tuple[str, ...]:
    """The calls of one reduction from end to end in the thread."""
    phases = (f"send {fragment}.2", f"send {fragment}.3", f"end {fragment}")
    return (f"launch {fragment}", f"wait {fragment}", *phases)


def launch(reducer: Reducer, fragment: int, value: float = 1.0) -> Any:
    tensors = {"a": torch.tensor([value])}
    return reducer.launch(fragment, tensors, 1.0, torch.zeros(0), round_index=1)


def test_training_goes_on_while_the_reduction_waits() -> None:
    inner = Recorder()
    inner.go_on.clear()
    reducer = BackgroundReducer(inner, CPU)
    handle = launch(reducer, 3, 4.0)  # returns, though the reducer is held up
    assert not inner.calls
    inner.go_on.set()
    reduced = reducer.wait(handle)
    assert reduced.mean["a"].tolist() == [8.0]
    assert reduced.stats.wire_bytes == 3


def test_everything_happens_in_one_thread_in_the_order_of_the_calls() -> None:
    inner = Recorder()
    inner.go_on.clear()
    reducer = BackgroundReducer(inner, CPU)
    handles = [launch(reducer, 0), launch(reducer, 1)]
    reducer.forget_residual()  # after the codes of the launches before it
    handles.append(launch(reducer, 2))
    inner.go_on.set()
    for fragment in (1, 0, 2):
        assert reducer.wait(handles[fragment]).stats.wire_bytes == fragment
    assert reducer.residuals([]) == {"residual": {}}
    reducer.load_residuals({}, [])
    order, threads = zip(*inner.calls, strict=True)
    assert order == (
        *(*whole(0), *whole(1), "forget"),
        *(*whole(2), "residuals", "load"),
    )
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert reducer.residual_names == inner.residual_names


def test_a_mean_outlives_the_next_launch() -> None:
    reducer = BackgroundReducer(Recorder(), CPU)
    first, second = launch(reducer, 0, 1.0), launch(reducer, 1, 3.0)
    assert reducer.wait(second).mean["a"].tolist() == [6.0]
    assert reducer.wait(first).mean["a"].tolist() == [2.0]


def test_a_failure_is_raised_where_the_result_is_asked_for() -> None:
    inner = Recorder()
    inner.fail = True
    reducer = BackgroundReducer(inner, CPU)
    handle = launch(reducer, 0)
    with pytest.raises(SyncError, match="a peer failed"):
        reducer.wait(handle)


def test_nothing_is_launched_after_a_failure() -> None:
    """Peers are in the collectives of the launch that failed, and would take others for them."""
    inner = Recorder()
    inner.fail = True
    reducer = BackgroundReducer(inner, CPU)
    first, second = launch(reducer, 0), launch(reducer, 1)
    with pytest.raises(SyncError, match="a peer failed"):
        reducer.wait(first)
    inner.fail = False
    for later in (second, launch(reducer, 2)):
        with pytest.raises(SyncError, match="a peer failed"):
            reducer.wait(later)
    with pytest.raises(SyncError, match="a peer failed"):
        reducer.residuals([])
    assert [what for what, _ in inner.calls] == list(whole(0))


# ---- in steps ----------------------------------------------------------------------------


def test_the_memory_that_is_sent_decides_who_reduces() -> None:
    """Collectives on an accelerator are the main thread's; from the host, a thread's."""
    cuda = torch.device("cuda")
    assert isinstance(beside_training(Recorder(), CPU, overlap_steps=2), BackgroundReducer)
    on_device = beside_training(Recorder(cuda), cuda, overlap_steps=2)
    assert isinstance(on_device, SteppedReducer)
    with pytest.raises(RuntimeMismatch, match="the job could hang"):
        BackgroundReducer(Recorder(cuda), cuda)
    for through_host, memory in ((False, "cuda"), (True, "cpu")):
        phased = build_plain_reducer_for(None, cuda, deterministic=True, through_host=through_host)
        assert phased.sends_from.type == memory


@pytest.mark.parametrize(
    "compression",
    [{"kind": "linear", "bits": 4}, {"kind": "topk", "density": 0.1}, {"wire_dtype": "bf16"}],
)
def test_a_run_on_an_accelerator_gives_nothing_of_nccl_to_a_thread(
    compression: dict[str, Any],
) -> None:
    from megatron_muloco.training.build_optimizer import build_reducer

    keys = {"lr": 0.7, "momentum": 0.9, "overlap_steps": 2, "compression": compression}
    outer = NesterovOuter(kind="nesterov", **keys)
    groups: Any = SimpleNamespace(exchange=None)
    assert isinstance(build_reducer(outer, groups, torch.device("cuda"), []), SteppedReducer)
    assert isinstance(build_reducer(outer, groups, CPU, []), BackgroundReducer)
    assert not outer.reduces_in_thread(accelerator=True)
    assert outer.reduces_in_thread(accelerator=False)
    from_host = NesterovOuter(kind="nesterov", transport="host", **keys)
    assert from_host.reduces_in_thread(accelerator=True)


@pytest.mark.parametrize(
    ("overlap", "by_step"),
    [  # collectives by inner step after the launch; the rest is left to the wait
        (1, [2]),
        (2, [1, 1]),
        (3, [1, 1, 0]),
        (6, [0, 1, 0, 1, 0, 0]),
    ],
)
def test_crossings_get_equal_shares_of_the_overlap(overlap: int, by_step: list[int]) -> None:
    inner = Recorder()
    reducer, seen = SteppedReducer(inner, overlap_steps=overlap), []
    handle = launch(reducer, 0)
    for _ in by_step:
        before = len(inner.calls)
        reducer.advance(handle)
        seen.append(len(inner.calls) - before)
    assert seen == by_step
    with torch.no_grad():
        assert reducer.wait(handle).mean["a"].tolist() == [2.0]
    order, threads = zip(*inner.calls, strict=True)
    assert order == ("launch 0", "send 0.2", "send 0.3", "end 0")
    assert set(threads) == {threading.get_ident()}


@torch.no_grad()
def test_a_wait_before_its_time_executes_what_is_left() -> None:
    """A checkpoint waits for what is in flight; other launches do not disturb it."""
    inner = Recorder()
    reducer = SteppedReducer(inner, overlap_steps=6)
    first = launch(reducer, 0, 1.0)
    reducer.advance(first)
    second = launch(reducer, 1, 3.0)
    reducer.advance(first)
    reducer.advance(second)
    assert reducer.wait(second).mean["a"].tolist() == [6.0]
    assert reducer.wait(first).mean["a"].tolist() == [2.0]
    assert [what for what, _ in inner.calls] == [
        *("launch 0", "launch 1", "send 0.2", "send 1.2", "send 1.3", "end 1"),
        *("send 0.3", "end 0"),
    ]


@torch.no_grad()
def test_a_step_that_fails_is_the_last_one() -> None:
    inner = Recorder()
    reducer = SteppedReducer(inner, overlap_steps=3)
    first, second = launch(reducer, 0), launch(reducer, 1)
    inner.fail = True
    with pytest.raises(SyncError, match="a peer failed"):
        reducer.wait(first)
    inner.fail = False
    executed = len(inner.calls)
    for call in (
        lambda: reducer.wait(second),
        lambda: reducer.advance(second),
        lambda: launch(reducer, 2),
        lambda: reducer.residuals([]),
        reducer.forget_residual,
    ):
        with pytest.raises(SyncError, match="a peer failed"):
            call()
    assert len(inner.calls) == executed
