"""Stop signals are remembered, whenever and however often they come."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_muloco.training.stopping import Launchers, StopRequest


@pytest.fixture(autouse=True)
def not_ignored() -> Iterator[None]:
    """Signals as a terminal's child has them, also where the tests run in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_is_remembered_and_may_come_twice(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert stop.requested


def test_handlers_are_put_back_also_after_an_error() -> None:
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(KeyError), StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_ctrl_c_and_a_closed_terminal_are_stop_requests_unless_ignored(
    number: signal.Signals,
) -> None:
    """`nohup` and `&` ignore them on purpose."""
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.requested
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(number)
            assert not stop.requested
    finally:
        signal.signal(number, before)


SECOND_CTRL_C = """
import os, signal, sys
from megatron_muloco.training.stopping import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    print("once", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGINT})
    # No Python code runs in the main thread from here on, as in a collective that waits.
    b"".join(iter(lambda: sys.stdin.buffer.read(1), b""))
print("not ended")
"""


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND_CTRL_C], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"once\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
        assert process.wait() == 130


def test_handlers_that_are_entered_twice_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop, stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert signal.getsignal(signal.SIGTERM) == before


# ---- launchers above a rank --------------------------------------------------------------


def processes(directory: Path, tree: dict[int, tuple[int, str]]) -> Path:
    """Write what Linux would show of processes: process -> parent and command."""
    for process, (parent, command) in tree.items():
        place = directory / str(process)
        place.mkdir(exist_ok=True)
        (place / "stat").write_text(f"{process} (a (b) c) S {parent} 1 1")
        (place / "cmdline").write_text(command.replace(" ", "\0"))
    return directory


NODE = "python -u -m deepspeed.launcher.launch --world_info=x /p/pretrain.py"


def test_the_end_of_any_launcher_above_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 30)
    monkeypatch.setattr(os, "getppid", lambda: 20)
    tree = {
        30: (20, "python -u pretrain.py"),
        20: (10, NODE),
        10: (5, "/bin/python /bin/deepspeed pretrain.py"),
        5: (1, "bash deepspeed.sh"),
    }
    launchers = Launchers(processes(tmp_path, tree))
    assert not launchers.ended()
    processes(tmp_path, {10: (1, "/bin/python /bin/deepspeed pretrain.py")})
    assert not launchers.ended(), "the shell above may end: nohup deepspeed ... &"
    processes(tmp_path, {20: (1, NODE)})
    assert launchers.ended()


def test_a_shell_is_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 30)
    monkeypatch.setattr(os, "getppid", lambda: 20)
    tree = {30: (20, "python pretrain.py"), 20: (10, "bash -c x"), 10: (1, NODE)}
    launchers = Launchers(processes(tmp_path, tree))
    processes(tmp_path, {30: (1, "python pretrain.py")})
    assert not launchers.ended()


def test_an_ignored_signal_is_heard_inside() -> None:
    """Launchers start ranks with SIGUSR1 ignored."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)
