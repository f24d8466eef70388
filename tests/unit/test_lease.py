"""One run at a time writes to a checkpoint directory, and a dead one never blocks its restart."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_muloco.checkpoint import lease as module
from megatron_muloco.checkpoint.lease import LOCK_FILE, Lease
from megatron_muloco.errors import CheckpointError


def lease(directory: Path, **options: Any) -> Lease:
    said: list[str] = []
    made = Lease(directory, said.append, **options)
    made.said = said  # type: ignore[attr-defined]
    return made


def content(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / LOCK_FILE).read_text())
    return found


def change(directory: Path, **values: Any) -> None:
    (directory / LOCK_FILE).write_text(json.dumps(content(directory) | values))


def test_a_lease_is_taken_and_given_back(tmp_path: Path) -> None:
    first = lease(tmp_path / "new")
    first.acquire()
    assert content(tmp_path / "new")["pid"] == os.getpid()
    first.check()
    first.release()
    assert not list((tmp_path / "new").iterdir())


def test_a_live_process_of_this_machine_keeps_others_out(tmp_path: Path) -> None:
    lease(tmp_path).acquire()
    parent = os.getppid()
    change(tmp_path, pid=parent, born=module._born(parent), host="here", started="yesterday")
    with pytest.raises(CheckpointError) as refusal:
        lease(tmp_path).acquire()
    message = str(refusal.value)
    assert f"in use by another run: process {parent} on here, which started at yesterday" in message
    assert f"delete {tmp_path / LOCK_FILE}" in message


def test_a_killed_run_does_not_block_its_restart(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\n"
        "from megatron_muloco.checkpoint.lease import Lease\n"
        "Lease(Path(sys.argv[1]), print).acquire()\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"process {run.pid} on"):
            lease(tmp_path).acquire()
        run.kill()
    restarted = lease(tmp_path, silent_seconds=1e6)  # it does not watch: the process is gone
    restarted.acquire()
    restarted.release()


def test_another_process_with_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    lease(tmp_path).acquire()
    parent = os.getppid()
    change(tmp_path, pid=parent, born=module._born(parent) + 1)  # type: ignore[operator]
    lease(tmp_path, silent_seconds=1e6).acquire()


@pytest.mark.parametrize("text", [None, "", "{", '{"token": 1}'])
def test_a_silent_run_elsewhere_is_taken_for_dead_after_the_limit(
    text: str | None, tmp_path: Path
) -> None:
    lease(tmp_path, beat_seconds=1e6).acquire()
    if text is None:
        change(tmp_path, token="theirs", machine="another", host="there")
    else:
        (tmp_path / LOCK_FILE).write_text(text)
    second = lease(tmp_path, silent_seconds=0.05)
    second.acquire()
    assert "waiting 0 s to see whether its run is alive" in second.said[0]  # type: ignore[attr-defined]
    assert content(tmp_path)["token"] != "theirs"


def test_a_run_elsewhere_that_beats_keeps_others_out(tmp_path: Path) -> None:
    lease(tmp_path, beat_seconds=1e6).acquire()
    change(tmp_path, token="theirs", machine="another", host="there")
    beats = threading.Timer(0.05, change, [tmp_path], {"beat": 8})
    beats.start()
    with (
        mock.patch.object(module, "_POLL_SECONDS", 0.02),
        pytest.raises(CheckpointError, match="on there"),
    ):
        lease(tmp_path, silent_seconds=30).acquire()
    beats.join()


def test_a_run_that_lost_its_lease_publishes_nothing_and_leaves_the_file(tmp_path: Path) -> None:
    first = lease(tmp_path)
    first.acquire()
    change(tmp_path, token="theirs", host="there")
    with pytest.raises(CheckpointError, match=r"now belongs to process .* on there"):
        first.check()
    first.release()
    assert content(tmp_path)["token"] == "theirs"


def test_a_deleted_file_is_made_again(tmp_path: Path) -> None:
    first = lease(tmp_path)
    first.acquire()
    own = content(tmp_path)["token"]
    (tmp_path / LOCK_FILE).unlink()
    first.check()
    assert content(tmp_path)["token"] == own
    first.release()


def test_a_held_lease_beats(tmp_path: Path) -> None:
    first = lease(tmp_path, beat_seconds=0.01)
    first.acquire()
    while content(tmp_path)["beat"] < 2:
        time.sleep(0.01)
    first.release()
    assert not list(tmp_path.iterdir())


def test_of_two_newcomers_the_slower_one_gives_the_file_back(tmp_path: Path) -> None:
    lease(tmp_path, beat_seconds=1e6).acquire()
    change(tmp_path, token="dead", machine="another")
    dead = lease(tmp_path)._read()
    quick, slow = lease(tmp_path), lease(tmp_path)
    quick._clear(dead)
    assert quick._create()
    with pytest.raises(CheckpointError, match="in use by another run"):
        slow._clear(dead)
    quick.check()
