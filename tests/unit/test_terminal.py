"""Ctrl-C and Ctrl-Z on a terminal: the first rank of a machine has it, launchers live on."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_muloco.training.stopping import Launchers, StopFile

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0

LAUNCHER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background
environments = [os.environ | {"LOCAL_RANK": str(rank)} for rank in range(2)]
ranks = [subprocess.Popen([sys.executable, sys.argv[1]], env=each) for each in environments]
codes = [rank.wait() for rank in ranks]
print("launcher in front:", os.tcgetpgrp(0) == os.getpgrp())
sys.exit(max(codes))
"""
RANK = """
import os, sys, time
from megatron_muloco.training.stopping import Launchers, StopRequest, Terminal
with StopRequest(Terminal(Launchers())) as stop:
    os.write(1, f"rank {os.environ['LOCAL_RANK']} runs\\n".encode())  # in one piece
    while not stop.requested or "STUBBORN" in os.environ:
        time.sleep(0.01)
sys.exit(85)
"""


class Session:
    """A launcher with two ranks on a terminal of its own, without a shell."""

    def __init__(self, directory: Path, **environment: str) -> None:
        (directory / "deepspeed").write_text(LAUNCHER)  # by its name it is known as a launcher
        (directory / "rank.py").write_text(RANK)
        self.keyboard, terminal = pty.openpty()
        command = [sys.executable, str(directory / "deepspeed"), str(directory / "rank.py")]
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )
        os.close(terminal)
        self.shown = ""

    def type(self, key: bytes) -> None:
        os.write(self.keyboard, key)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, self.shown
            if select.select([self.keyboard], [], [], 0.01)[0]:
                try:
                    self.shown += os.read(self.keyboard, 4096).decode()
                except OSError:  # all have closed it
                    return

    def code(self) -> int:
        self.until(lambda: False)
        return self.process.wait(PATIENCE_S)

    def state(self) -> str:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]


@contextmanager
def session(directory: Path, **environment: str) -> Iterator[Session]:
    begun = Session(directory, **environment)
    try:
        begun.until(lambda: all(f"rank {rank} runs" in begun.shown for rank in range(2)))
        yield begun
    finally:
        os.close(begun.keyboard)  # the terminal hangs up: all of the session end
        if begun.process.poll() is None:
            begun.process.kill()
        begun.process.wait()


def test_ctrl_c_reaches_ranks_and_the_launcher_returns_their_code(tmp_path: Path) -> None:
    with session(tmp_path) as ranks:
        ranks.type(b"\x03")
        assert ranks.code() == 85, ranks.shown
    assert "Ctrl-C again ends at once" in ranks.shown
    assert "launcher in front: True" in ranks.shown, "the terminal was not given back"
    assert "Traceback" not in ranks.shown


def test_a_second_ctrl_c_ends_all_ranks(tmp_path: Path) -> None:
    with session(tmp_path, STUBBORN="yes") as ranks:
        ranks.type(b"\x03")
        ranks.until(lambda: "Ctrl-C again" in ranks.shown)
        ranks.type(b"\x03")
        assert ranks.code() == 130, ranks.shown


def test_ctrl_z_stops_the_whole_job_and_the_foreground_goes_on(tmp_path: Path) -> None:
    with session(tmp_path) as ranks:
        ranks.type(b"\x1a")
        ranks.until(lambda: ranks.state() == "T")
        assert os.tcgetpgrp(ranks.keyboard) == ranks.process.pid
        os.killpg(ranks.process.pid, signal.SIGCONT)  # as `fg` of a shell does
        ranks.until(lambda: os.tcgetpgrp(ranks.keyboard) != ranks.process.pid)
        ranks.type(b"\x03")
        assert ranks.code() == 85, ranks.shown


# ---- the command that goes on ----

SCRIPT = ["launch/pretrain.py", "--config", "my run.yaml"]
COMMANDS = {
    "/bin/python /bin/deepspeed --num_gpus 8 launch/pretrain.py --config c.yaml": (
        "deepspeed --num_gpus 8 launch/pretrain.py --config c.yaml"
    ),
    "/bin/python -m torch.distributed.run -n 2 p.py": "python -m torch.distributed.run -n 2 p.py",
    "/bin/python -u -m deepspeed.launcher.launch --world_info=x p.py": (
        "python launch/pretrain.py --config 'my run.yaml'"
    ),
    "bash": "python launch/pretrain.py --config 'my run.yaml'",
}


@pytest.mark.parametrize("above", COMMANDS)
def test_the_command_is_that_of_the_launcher(
    above: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 30)
    monkeypatch.setattr(os, "getppid", lambda: 20)
    for process, parent, words in ((30, 20, "python p.py"), (20, 5, above), (5, 1, "bash")):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "stat").write_text(f"{process} (x) S {parent} 1 1")
        (tmp_path / str(process) / "cmdline").write_text(words.replace(" ", "\0") + "\0")
    assert Launchers(tmp_path).command(SCRIPT) == COMMANDS[above]


# ---- a stop file ----


def test_a_stop_file_is_found_once_a_second_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = tmp_path / "STOP"
    file = StopFile(path)
    assert not file.found()
    path.touch()
    now = 0.5
    assert not file.found()
    now = 1.0
    assert file.found()
    file.remove()
    assert not path.exists()
    assert file.found(), "the request stays"
    file.remove()


def test_a_run_without_a_directory_has_no_stop_file() -> None:
    file = StopFile(None)
    file.remove()
    assert not file.found()
