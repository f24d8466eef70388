"""A reduction beside training: one thread, in order, and failures where results are used."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.comm.background import BackgroundReducer
from megatron_muloco.errors import SyncError
from megatron_muloco.outer.reducer import Reduced, ReductionStats, Residuals, Sizes

CPU = torch.device("cpu")


class Recorder:
    """A reducer that notes who calls what, and can be held up."""

    residual_names = ("residual",)
    returns_views = True

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.fail = False
        self.memory = torch.zeros(1)

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

    def wait(self, handle: Any) -> Reduced:
        fragment, tensors = handle
        self.note(f"wait {fragment}")
        if self.fail:
            raise SyncError("a peer failed")
        assert not torch.is_grad_enabled()
        self.memory.copy_(tensors["a"] * 2)
        stats = ReductionStats(torch.ones(1), torch.zeros(1, 0), wire_bytes=fragment)
        return Reduced({"a": self.memory}, stats)

    def forget_residual(self) -> None:
        self.note("forget")

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        self.note("residuals")
        return {"residual": {}}

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        self.note("load")

    def note(self, what: str) -> None:
        self.calls.append((what, threading.get_ident()))


def launch(reducer: BackgroundReducer, fragment: int, value: float = 1.0) -> Any:
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
        *("launch 0", "wait 0", "launch 1", "wait 1", "forget"),
        *("launch 2", "wait 2", "residuals", "load"),
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
    assert [what for what, _ in inner.calls] == ["launch 0", "wait 0"]
