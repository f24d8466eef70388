"""Frozen, slow and killed ranks and launchers: names, stacks, exit codes, and nobody is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_muloco.errors import EXIT_LOST
from megatron_muloco.training.launch import launcher_command
from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.ports import held_port

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "pretrain.py")
PATIENCE_S = 240.0  # a quiet machine needs a tenth
LIMIT_MINUTES = 0.2  # long enough for the skew of two ranks that start on a loaded machine


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("bytes"))


def config_in(directory: Path, prefix: str, **changes: Any) -> Path:
    """Write a run of two replicas that takes longer than any test; return its config file."""
    sections: dict[str, Any] = {
        "parallel": {"num_replicas": 2},
        "training": {
            "train_iters": 20_000,
            "distributed_timeout_minutes": LIMIT_MINUTES,
            "control_timeout_minutes": 10.0,  # it covers the start, too
        },
        "checkpoint": {"dir": str(directory / "saved")},
        "monitor": {"log_interval": 1},
    }
    config = byte_config(prefix, **(sections | changes))
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)


class Ranks:
    """Ranks that were started without a launcher, each with a log of its own."""

    def __init__(
        self, directory: Path, config: Path, world: int, port: int, script: str = SCRIPT
    ) -> None:
        self.logs = [directory / f"rank{rank}.txt" for rank in range(world)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = os.environ | {
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-u", script, "--config", str(config)]
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        command, cwd=directory, env=environment, stdout=out, stderr=out
                    )
                )

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def reach(self, step: int) -> None:
        def there() -> bool:
            assert all(process.poll() is None for process in self.processes), self.text(0)
            return re.search(rf"iteration +{step}/", self.text(0)) is not None

        until(there, f"step {step}")

    def code(self, rank: int) -> int:
        return self.processes[rank].wait(PATIENCE_S)


@contextmanager
def ranks_of(
    directory: Path, config: Path, world: int = 2, script: str = SCRIPT
) -> Iterator[Ranks]:
    with held_port() as port:
        ranks = Ranks(directory, config, world, port, script)
        try:
            yield ranks
        finally:
            for process in ranks.processes:
                process.kill()
                process.wait()


@pytest.mark.parametrize("frozen", [1, 0], ids=["another", "the first, which holds the store"])
def test_a_frozen_rank_is_named_and_the_others_end(
    frozen: int, prefix: str, tmp_path: Path
) -> None:
    with ranks_of(tmp_path, config_in(tmp_path, prefix)) as ranks:
        ranks.reach(3)
        ranks.processes[frozen].send_signal(signal.SIGSTOP)
        assert ranks.code(1 - frozen) == EXIT_LOST, ranks.text(1 - frozen)
        said = ranks.text(1 - frozen)
    assert re.search(r"has waited \d+ s of at most 12 s in .*(inner|outer) step", said), said
    if frozen:
        assert re.search(r"rank 1 \(.*\): silent, so frozen or dead; last in", said), said
        assert re.search(r"not arrived in outer group \[0, 1\]", said), said
    else:
        assert "rank 0: the job's rendezvous store" in said
    assert "stack of thread MainThread" in said


def test_a_frozen_rank_is_named_to_ranks_that_wait_for_it_through_others(
    prefix: str, tmp_path: Path
) -> None:
    """2 replicas x tp 2: rank 2 waits for its neighbour 3, and replica 0 for replica 1."""
    parallel = {"num_replicas": 2, "tensor_model_parallel_size": 2}
    with ranks_of(tmp_path, config_in(tmp_path, prefix, parallel=parallel), 4) as ranks:
        ranks.reach(3)
        ranks.processes[3].send_signal(signal.SIGSTOP)
        assert [ranks.code(rank) for rank in range(3)] == [EXIT_LOST] * 3, ranks.text(0)
        said = "".join(ranks.text(rank) for rank in range(3))
    assert re.search(r"rank 3 \(.*\): silent, so frozen or dead; last in", said), said
    assert not re.search(r"rank [012] \(.*\): (silent|alive)", said), said


FREEZES_IN_A_SAVE = """
import os, signal, sys
sys.argv[0] = {script!r}
from megatron_muloco.checkpoint.store import CheckpointStore
from megatron_muloco.training.main import main
original = CheckpointStore.save
def save(self, step, state, **given):
    if os.environ["RANK"] == "1" and step == 4:
        os.kill(os.getpid(), signal.SIGSTOP)
    return original(self, step, state, **given)
CheckpointStore.save = save
main()
"""


@pytest.mark.slow  # the limit of saves is that of the start as well, which may take a minute
def test_a_rank_that_is_frozen_in_a_save_is_named_and_the_save_before_is_whole(
    prefix: str, tmp_path: Path
) -> None:
    script = tmp_path / "freezes.py"
    script.write_text(FREEZES_IN_A_SAVE.format(script=SCRIPT))
    training = {
        "train_iters": 20_000,
        "distributed_timeout_minutes": LIMIT_MINUTES,
        "control_timeout_minutes": 1.5,
    }
    checkpoint = {"dir": str(tmp_path / "saved"), "save_interval": 2}
    config = config_in(tmp_path, prefix, training=training, checkpoint=checkpoint)
    with ranks_of(tmp_path, config, script=str(script)) as ranks:
        assert ranks.code(0) == EXIT_LOST, ranks.text(0)
        said = ranks.text(0)
    assert "in the save after inner step 4 for:" in said
    # Its last post may be one beat older than the save.
    assert re.search(r"rank 1 \(.*\): silent.*, not arrived in job \[0, 1\]", said), said
    latest = tmp_path / "saved" / "latest_checkpointed_iteration.txt"
    assert latest.read_text().strip() == "2"


def test_a_stop_request_does_not_wait_for_a_frozen_replica_without_end(
    prefix: str, tmp_path: Path
) -> None:
    # Console lines come with an outer step, and there are 100 inner steps until the next one, which
    # would wait first.
    outer = {"sync_interval": 100}
    with ranks_of(tmp_path, config_in(tmp_path, prefix, outer=outer)) as ranks:
        ranks.reach(3)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        ranks.processes[0].send_signal(signal.SIGUSR1)
        assert ranks.code(0) == EXIT_LOST, ranks.text(0)
        said = ranks.text(0)
    assert "in the agreement on a stop after inner step" in said
    assert re.search(r"rank 1 \(.*\): silent", said), said


def test_the_first_fault_gives_the_exit_code_of_all_ranks(prefix: str, tmp_path: Path) -> None:
    """A rank that is killed leaves a broken connection to the others, which say who is missing."""
    with ranks_of(tmp_path, config_in(tmp_path, prefix)) as ranks:
        ranks.reach(3)
        ranks.processes[1].kill()
        assert ranks.code(0) == EXIT_LOST, ranks.text(0)
        assert re.search(r"rank 1 \(.*\): silent, so frozen or dead", ranks.text(0))


# ---- launchers ---------------------------------------------------------------------------


def of_job(config: Path) -> list[psutil.Process]:
    """Return the processes that name the config on their command lines."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(config) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("victim", "number"),
    [("command", signal.SIGTERM), ("command", signal.SIGHUP), ("node", signal.SIGKILL)],
    ids=["TERM to deepspeed", "HUP to deepspeed", "KILL to the node's launcher"],
)
def test_no_rank_outlives_its_launcher_and_the_state_is_saved(
    victim: str, number: signal.Signals, prefix: str, tmp_path: Path
) -> None:
    config = config_in(tmp_path, prefix)
    log = tmp_path / "log.txt"
    with held_port() as port, log.open("w") as out:
        if victim == "command":
            command = ["deepspeed", f"--master_port={port}", SCRIPT, "--config", str(config)]
        else:
            command = launcher_command(2, port, SCRIPT, ["--config", str(config)])
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        job = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=out,
            # Not ignored, also where the tests run under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        try:
            until(lambda: re.search(r"iteration +3/", log.read_text()), "step 3")
            job.send_signal(number)
            until(lambda: not of_job(config), f"end of {of_job(config)}")
        finally:
            for process in of_job(config):
                process.kill()
            job.wait()
    assert "stopped on request; state saved" in log.read_text()
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").is_file()
