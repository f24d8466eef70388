"""The command and the environment with which the missing ranks are started."""

import base64
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from megatron_muloco.training import launch as module
from megatron_muloco.training.launch import launcher_command, relaunch


class Replaced(BaseException):
    """The process would be another program now."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        seen.update(path=path, arguments=arguments, environment=environment)
        seen["usr1"] = signal.getsignal(signal.SIGUSR1)
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", "--config", "c.yaml"])
    before = signal.getsignal(signal.SIGUSR1)
    yield seen
    signal.signal(signal.SIGUSR1, before)
    os.close(_holder_of(_port(seen)))


def _port(seen: dict[str, Any]) -> int:
    (option,) = [a for a in seen["arguments"] if a.startswith("--master_port=")]
    return int(option.partition("=")[2])


def _holder_of(port: int) -> int:
    """Return this process's descriptor that is bound to the port."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(entry))) as held:
                if held.getsockname()[1] == port:
                    return int(entry)
        except (OSError, IndexError, TypeError):
            continue
    raise AssertionError(f"no socket of this process is bound to {port}")


def test_the_command_names_all_ranks_of_this_machine() -> None:
    command = launcher_command(3, 29501, "/p/pretrain.py", ["--config", "a b.yaml"])
    (world,) = [a for a in command if a.startswith("--world_info=")]
    decoded = json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))
    assert decoded == {"localhost": [0, 1, 2]}
    assert command[-3:] == ["/p/pretrain.py", "--config", "a b.yaml"]
    assert "--master_port=29501" in command


def test_nothing_of_the_old_launcher_is_left(executed: dict[str, Any]) -> None:
    old = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GROUP_RANK": "0",
        "ROLE_WORLD_SIZE": "1",
    }
    with pytest.raises(Replaced):
        relaunch(2, ["--config", "c.yaml"], old | {"HOME": "/h", "OMP_NUM_THREADS": "5"})
    kept = executed["environment"]
    ours = {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive"}
    assert kept == {"HOME": "/h", "OMP_NUM_THREADS": "5"} | ours
    assert executed["arguments"][-2:] == ["--config", "c.yaml"]
    assert executed["path"] == sys.executable


def test_threads_are_divided_over_the_ranks(
    executed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    with pytest.raises(Replaced):
        relaunch(4, [], {})
    assert executed["environment"]["OMP_NUM_THREADS"] == "2"


def test_what_the_user_set_for_threads_stays(executed: dict[str, Any]) -> None:
    chosen = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active"}
    with pytest.raises(Replaced):
        relaunch(2, [], chosen)
    assert executed["environment"].items() >= chosen.items()


def test_the_launcher_survives_a_warning_signal_to_its_group(executed: dict[str, Any]) -> None:
    with pytest.raises(Replaced):
        relaunch(2, [], {})
    assert executed["usr1"] is signal.SIG_IGN


def test_the_port_is_held_until_a_rank_listens_on_it(executed: dict[str, Any]) -> None:
    with pytest.raises(Replaced):
        relaunch(2, [], {})
    port = _port(executed)
    assert os.get_inheritable(_holder_of(port))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("127.0.0.1", port))
        store.listen()
