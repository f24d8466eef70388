"""The plain command on a machine without accelerators: start, stop, resume, death of a rank."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_muloco.training.launch import launcher_command
from tests.support.byte_runs import byte_config, byte_dataset, run_here
from tests.support.ports import held_port
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
STEPS = 60
PATIENCE_S = 240.0  # a quiet machine needs a tenth


def config_in(directory: Path, prefix: str) -> Any:
    """Return a run of two replicas that saves every tenth step under ``directory``."""
    return byte_config(
        prefix,
        parallel={"num_replicas": 2},
        training={"train_iters": STEPS},
        checkpoint={"dir": str(directory / "saved"), "save_interval": 10},
        monitor={"dir": str(directory / "tensorboard")},
    )


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def undisturbed(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the final anchor's digest of an uninterrupted run, in warm workers."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run_ranks(run_here, 2, config_in(directory, prefix))
    return final_digest(directory)


def final_digest(directory: Path) -> str:
    path = directory / "saved" / f"iter_{STEPS:07d}" / "final_anchor" / "muloco.json"
    digest = json.loads(path.read_text())["anchor_digest"]
    assert isinstance(digest, str)
    return digest


def latest_step(directory: Path) -> int:
    return int((directory / "saved" / "latest_checkpointed_iteration.txt").read_text())


class Started:
    """Command in a process group of its own, with its output in a file."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.log = directory / f"log{time.monotonic_ns()}.txt"
        # As a scheduler would: of all processes in the group, only ranks answer the signal.
        shielded = ["bash", "-c", 'trap "" USR1; exec "$@"', "shield", *command]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                shielded,
                cwd=directory,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str) -> None:
        """Return once the output matches."""
        self._wait(lambda: re.search(pattern, self.text()) is not None, repr(pattern))

    def wait(self) -> int:
        """Return the exit code."""
        return self.process.wait(PATIENCE_S)

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks: the processes at the ends of the launchers' trees."""
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if SCRIPT in child.cmdline() and "deepspeed.launcher.launch" not in child.cmdline()
        ]

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.text()}"
            time.sleep(0.02)


@contextmanager
def started(command: list[str], directory: Path) -> Iterator[Started]:
    job = Started(command, directory)
    try:
        yield job
    finally:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def test_the_plain_command_stops_on_request_and_goes_on(
    prefix: str, undisturbed: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(config_in(tmp_path, prefix).model_dump(mode="json")))
    with held_port() as port:
        plain = ["deepspeed", f"--master_port={port}", SCRIPT, "--config", str(config)]
        with started(plain, tmp_path) as first:
            first.wait_for(r"iteration +3/")
            assert len(first.ranks()) == 2, "one rank was started by deepspeed, two are needed"
            os.killpg(first.process.pid, signal.SIGUSR1)
            assert first.wait() == 85, first.text()
        assert "needs 2 ranks" in first.text()
        assert "stopped on request; state saved" in first.text()
        stopped_at = latest_step(tmp_path)
        assert 3 < stopped_at < STEPS
        with started(plain, tmp_path) as second:
            assert second.wait() == 0, second.text()
    assert f"after inner step {stopped_at}" in second.text()
    assert final_digest(tmp_path) == undisturbed
    assert f"final anchor digest: {undisturbed}" in second.text()


def test_a_rank_that_dies_ends_the_job_and_leaves_a_whole_checkpoint(
    prefix: str, undisturbed: str, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    run = config_in(tmp_path, prefix)
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    with held_port() as port:
        command = launcher_command(2, port, SCRIPT, ["--config", str(config)])
        with started(command, tmp_path) as job:
            job.wait_for(r"iteration +12/")
            started_at = time.monotonic()
            job.ranks()[1].kill()
            code = job.wait()
            took = time.monotonic() - started_at
    assert code not in (0, 2, 85), job.text()
    # The launcher looks once a second and gives a rank 30 s to answer SIGTERM before it kills it.
    assert took < 35
    saved = latest_step(tmp_path)
    assert saved >= 10
    assert {ended.first_step for ended in run_ranks(run_here, 2, run)} == {saved + 1}
    assert final_digest(tmp_path) == undisturbed
