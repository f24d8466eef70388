"""Faults for rank functions, for example ``with fail_call(reducer, "launch", number=3):``.

Each context manager replaces one method of one object while its block runs. Enter it inside a rank
function, on the rank that should fail.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def fail_call(owner: Any, method: str, *, number: int, error: BaseException) -> Iterator[None]:
    """Raise ``error`` in place of the ``number``-th call (from 1) of ``owner.method``."""

    def fail() -> None:
        raise error

    with _before_call(owner, method, number, fail):
        yield


@contextmanager
def kill_at_call(owner: Any, method: str, *, number: int) -> Iterator[None]:
    """Kill this process, as the out-of-memory killer would, at the ``number``-th call."""
    with _before_call(owner, method, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        yield


@contextmanager
def delay_call(owner: Any, method: str, *, number: int, seconds: float) -> Iterator[None]:
    """Delay this rank by ``seconds`` before the ``number``-th call."""
    with _before_call(owner, method, number, lambda: time.sleep(seconds)):
        yield


@contextmanager
def signal_at_call(owner: Any, method: str, *, number: int, signum: int) -> Iterator[None]:
    """Send this process a signal (a stop request) just before the ``number``-th call."""
    with _before_call(owner, method, number, lambda: os.kill(os.getpid(), signum)):
        yield


@contextmanager
def count_calls(owner: Any, method: str) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a list that grows by the positional arguments of each call; the calls still happen."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(owner, method)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, method, record)
    try:
        yield calls
    finally:
        setattr(owner, method, original)


@contextmanager
def _before_call(owner: Any, method: str, number: int, act: Callable[[], object]) -> Iterator[None]:
    original = getattr(owner, method)
    seen = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, method, call)
    try:
        yield
    finally:
        setattr(owner, method, original)


def describe_again(checkpoint: Path) -> None:
    """Bind the description of a checkpoint to its index as it is now, and renew its own digest."""
    from megatron_muloco.checkpoint.layout import INDEX_FILE, STATE_FILE
    from megatron_muloco.checkpoint.state import Description
    from megatron_muloco.data.indexed import file_digest

    tree = json.loads((checkpoint / STATE_FILE).read_text())
    del tree["content_digest"]
    tree["index_digest"] = file_digest(checkpoint / INDEX_FILE)
    (checkpoint / STATE_FILE).write_text(Description(**tree).to_json())
