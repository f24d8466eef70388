"""Traces which files of the package execute during one outer step and one checkpoint save.

A profile hook sees every Python function that is entered, on the calling thread and on threads
started meanwhile. Two ranks train a tiny model as two replicas. The *second* outer step and one
save after it are recorded: by then everything that is built once has been built.

The CPU seam (`runtime/accelerator.py`) is left out where it only redirects torch functions. It runs
under every tensor operation on a machine without an accelerator and nowhere else.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_muloco
from megatron_muloco.checkpoint.state import RunState
from megatron_muloco.checkpoint.store import CheckpointStore
from tests.support.tiny_models import MUON, NESTEROV, finish_tiny, start_tiny, tiny_config

PACKAGE = Path(megatron_muloco.__file__).parent
CPU_SEAM = ("CpuDeviceMode.__torch_function__", "_on_cpu")


@dataclass(frozen=True)
class Method:
    """A run to trace, and the most files that it should cross.

    Attributes:
        name: Name in tables and test ids.
        outer: Keys of the outer section beside those of every run here.
        limits: Files at most: ``outer step`` and ``save``.
    """

    name: str
    outer: dict[str, Any]
    limits: dict[str, int]


METHODS = (
    Method("fp32", {}, {"outer step": 13, "save": 17}),
    Method(
        "statistical 4 bit, error feedback",
        {"compression": {"kind": "statistical", "bits": 4, "error_feedback": True}},
        {"outer step": 17, "save": 17},
    ),
)


@contextmanager
def crossed_files() -> Iterator[dict[str, set[str]]]:
    """Collect file (relative to the package) -> names of its functions that are entered inside."""
    found: dict[str, set[str]] = {}
    prefix = f"{PACKAGE}/"

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(prefix):
            return
        if code.co_qualname not in CPU_SEAM:
            file = code.co_filename.removeprefix(prefix)
            found.setdefault(file, set()).add(code.co_qualname)

    threading.setprofile(enter)
    sys.setprofile(enter)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def trace(method: Method, directory: Path) -> dict[str, dict[str, set[str]]]:
    """Return the files and functions of one ``outer step`` and one ``save`` on this rank of two."""
    outer = {**NESTEROV, **method.outer}
    config = tiny_config(parallel={"num_replicas": 2}, inner=MUON, outer=outer)
    run = start_tiny(config)
    interval = config.outer.sync_interval
    run.train(2 * interval - 1)
    with _recorded(run.optimizer, "outer_step") as step:
        run.train(1)
    assert run.optimizer.last_outer is not None
    assert run.optimizer.last_outer.applied
    optimizer = run.optimizer
    state = RunState(
        run.groups, optimizer.view, optimizer.inner, optimizer.synchronizer, config, {}
    )
    store = CheckpointStore(directory, run.groups)
    with crossed_files() as save:
        store.save(optimizer.steps, state)
    finish_tiny()
    return {"outer step": step, "save": save}


@contextmanager
def _recorded(owner: Any, method: str) -> Iterator[dict[str, set[str]]]:
    """Record only while ``owner.method`` runs."""
    found: dict[str, set[str]] = {}
    plain: Callable[..., Any] = getattr(owner, method)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with crossed_files() as files:
            result = plain(*args, **kwargs)
        found.update(files)
        return result

    setattr(owner, method, recorded)
    try:
        yield found
    finally:
        delattr(owner, method)
