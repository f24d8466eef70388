"""The SLURM template on a real, small SLURM: its requests, and stop, requeue, resume."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megatron_muloco.config import load_config
from tests.support.minislurm import MiniSlurm, why_unavailable
from tests.support.ports import held_port
from tools.batch_script import ArrayTask, Request, batch_script, layout_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slurm,
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
]

ROOT = Path(__file__).parents[2]
TEMPLATE = "launch/slurm/pretrain.sbatch"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

# Keeps the training program's contract (exit codes, signals) without training. Rank 1 leaves later
# than rank 0 and would die of the signal that SLURM sends to remaining processes after a fault.
STAND_IN = """
import os, pathlib, signal, sys, time

stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
signal.signal(signal.SIGTERM, signal.SIG_DFL)
rank, here = int(os.environ["RANK"]), pathlib.Path(__file__).parent
assert os.environ["WORLD_SIZE"] == "2", os.environ["WORLD_SIZE"]
saved = here / f"saved{rank}"
print(f"rank {rank} sees {sys.argv[-2:]}", flush=True)
if "fail" in sys.argv[-1]:
    sys.exit(3)
if "crash" in sys.argv[-1]:
    latest = pathlib.Path(sys.argv[-1].split("=")[-1]) / "latest_checkpointed_iteration.txt"
    if rank == 0:
        latest.parent.mkdir(exist_ok=True)
        latest.write_text("5")
    while not latest.exists():
        time.sleep(0.1)
    sys.exit(17 if "numerics" in sys.argv[-1] else 3)
if saved.exists():
    sys.exit(0)
while not stop:
    time.sleep(0.1)
time.sleep(3 * rank)
saved.touch()
sys.exit(85)
"""


# Says how it was called, and runs what it was asked to run inside the image.
APPTAINER = """#!/bin/bash
echo "apptainer: $*"
shift 7
exec "$@"
"""

# Between all nodes being idle and the second start. Without it the second start has been seen to
# end as FAILED before its script began; SLURM itself would wait two minutes.
SETTLE_S = 5.0

BOTH_RANKS_RUN = r"rank 0 sees[\s\S]*rank 1 sees|rank 1 sees[\s\S]*rank 0 sees"


@pytest.fixture(scope="module")
def cluster() -> Iterator[MiniSlurm]:
    """Cluster of sixteen nodes with eight GPUs, the size that the 15B run requests."""
    with MiniSlurm(nodes=16, gpus_per_node=8) as slurm:
        yield slurm


# For jobs on this machine.
HERE = {
    "MASTER_ADDR": "127.0.0.1",  # n1, n2, ... are no names that anything can resolve
    # The environment of this test run, which need not be .venv.
    "MULOCO_ACTIVATE": "/dev/null",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
}


class Job:
    """One submission of the template on two one-rank CPU nodes, under ``directory``."""

    OPTIONS = ("--nodes=2", "--gpus-per-node=0", "--mem=100", "--no-kill")

    def __init__(
        self, cluster: MiniSlurm, directory: Path, *arguments: str, env: dict[str, str]
    ) -> None:
        self._cluster = cluster
        self.log = directory / "job.log"
        self.id = cluster.submit(
            *self.OPTIONS,
            f"--output={self.log}",
            TEMPLATE,
            *arguments,
            cwd=ROOT,
            env=HERE | {"MULOCO_SLOTS_PER_NODE": "1"} | env,
        )

    def signal_when(self, pattern: str, *, timeout_s: float) -> None:
        """Warn the job, as SLURM does before the time limit, once its log matches ``pattern``."""

        def written() -> bool:
            return bool(re.search(pattern, self.text())) or self._state() in OVER

        self._wait(f"{pattern!r} in the log", written, timeout_s)
        assert self._state() not in OVER, f"the job ended before its signal:\n{self.text()}"
        done = self._cluster.run("scancel", f"--signal={signal.SIGUSR1.name[3:]}", self.id)
        assert done.returncode == 0, done.stderr

    def restart_now(self, *, timeout_s: float, restarts: int = 1) -> None:
        """Wait until the job is requeued and let it start without SLURM's two minutes of delay."""

        def requeued() -> bool:
            # Idle: starting while the first attempt is still being cleaned up fails. SLURM's delay
            # is there for that.
            return (
                self._field("Restarts") == str(restarts)
                and self._state() == "PENDING"
                and self._cluster.idle()
            )

        self._wait("the requeue", requeued, timeout_s)
        time.sleep(SETTLE_S)
        done = self._cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        assert done.returncode == 0, done.stderr

    def wait_for_line(self, pattern: str, *, timeout_s: float) -> None:
        """Wait until the log matches ``pattern``."""
        self._wait(f"{pattern!r}", lambda: bool(re.search(pattern, self.text())), timeout_s)

    def wait_for_requeue(self, restarts: int, *, timeout_s: float) -> None:
        """Wait until the job is in the queue for a further start."""

        def requeued() -> bool:
            return self._field("Restarts") == str(restarts) and self._state() == "PENDING"

        self._wait(f"requeue {restarts}", requeued, timeout_s)

    def wait_for_end(self, *, timeout_s: float) -> tuple[str, str]:
        """Return the final state and exit code."""
        self._wait("the end", lambda: self._state() in OVER, timeout_s)
        return self._state(), self._field("ExitCode").split(":")[0]

    def text(self) -> str:
        """Return the log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def _state(self) -> str:
        return self._field("JobState")

    def _field(self, name: str) -> str:
        return self._cluster.job(self.id).get(name, "")

    def _wait(self, what: str, condition: Callable[[], bool], timeout_s: float) -> None:
        self._cluster.wait_for(what, condition, timeout_s=timeout_s, log=self.log)


class SubmittedJob(Job):
    """One submission by ``launch/submit.py`` on two one-rank CPU nodes, with logs in ``directory``.

    Attributes:
        script: The batch script that it printed.
    """

    def __init__(
        self, cluster: MiniSlurm, directory: Path, *arguments: str, env: dict[str, str]
    ) -> None:
        self._cluster = cluster
        done = submit_py(cluster, *self.arguments(directory), *arguments, env=env)
        assert done.returncode == 0, done.stderr
        self.script, _, said = done.stdout.partition("batch script\n\n")[2].partition("submitted ")
        self.id = re.findall(r"job (\d+)", said)[0]
        self.log = Path(re.findall(r"tail -F (\S+)", said)[0])

    @staticmethod
    def arguments(directory: Path) -> list[str]:
        return [
            *("--config", "configs/cpu_k2.yaml", "--cpu", "--nodes", "2", "--ranks-per-node", "1"),
            *("--log-dir", str(directory / "logs")),
        ]


def submit_py(
    cluster: MiniSlurm, *arguments: str, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "launch/submit.py", *arguments)
    return cluster.run(*command, cwd=ROOT, env=HERE | env)


@pytest.fixture
def port() -> Iterator[str]:
    with held_port() as number:
        yield str(number)


@pytest.fixture
def stand_in(tmp_path: Path, port: str) -> dict[str, str]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return {"MULOCO_PRETRAIN": str(script), "MASTER_PORT": port}


def submission(cluster: MiniSlurm, *options: str) -> tuple[int, str]:
    done = cluster.run(
        "sbatch", "--test-only", *options, TEMPLATE, "configs/15b_k16.yaml", cwd=ROOT
    )
    return done.returncode, done.stderr


def test_the_15b_submission_is_accepted(cluster: MiniSlurm) -> None:
    code, said = submission(cluster)
    assert code == 0, said
    assert "nodes n[1-16]" in said


@pytest.mark.parametrize("impossible", ["--nodes=17", "--gpus-per-node=9"])
def test_an_impossible_submission_is_rejected(cluster: MiniSlurm, impossible: str) -> None:
    code, said = submission(cluster, impossible)
    assert code != 0
    assert "not available" in said


@pytest.mark.parametrize(
    "path", [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "paper"],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_what_is_submitted_for_a_config_is_accepted_with_its_numbers(
    cluster: MiniSlurm, tmp_path: Path, path: Path
) -> None:
    config = load_config(str(path))
    layout = layout_for(config, nodes=None)
    request = Request(path, (), layout, gpus=True, logs=tmp_path, name=path.stem)
    code, said = submission_of(cluster, tmp_path, batch_script(request))
    assert code == 0, said
    parallel = config.parallel
    ranks = parallel.num_replicas * (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    last = max(1, ranks // 8)
    assert ("nodes n1 " if last == 1 else f"nodes n[1-{last}] ") in said


@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_submitted_for_a_cluster_is_accepted(
    cluster: MiniSlurm, tmp_path: Path, launcher: str, parts: int
) -> None:
    path = ROOT / "configs/15b_k16.yaml"
    layout = layout_for(load_config(str(path)), nodes=None, ranks_per_node=8, components=parts)
    request = Request(
        path, (), layout, gpus=True, logs=tmp_path, name="mine",
        partitions=("debug", "debug")[:parts], directives={"switches": "1@10:00"},
        settings={"MULOCO_LAUNCHER": launcher},
        tasks=(ArrayTask(("inner.lr=1",), ""),) * 3 if parts == 1 else (),
    )  # fmt: skip
    code, said = submission_of(cluster, tmp_path, batch_script(request))
    assert code == 0, said


def submission_of(cluster: MiniSlurm, directory: Path, script: str) -> tuple[int, str]:
    file = directory / "job.sbatch"
    file.write_text(script)
    done = cluster.run("sbatch", "--test-only", str(file), cwd=directory)
    return done.returncode, done.stderr


def test_a_stopped_job_is_requeued_with_its_arguments(
    cluster: MiniSlurm, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    job = Job(cluster, tmp_path, "configs/cpu_k2.yaml", "--set", "a.b=[1, 2]", env=stand_in)
    job.signal_when(BOTH_RANKS_RUN, timeout_s=60)
    job.restart_now(timeout_s=60)
    assert job.wait_for_end(timeout_s=60) == ("COMPLETED", "0"), job.text()
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert job.text().count("rank 0 sees ['--set', 'a.b=[1, 2]']") == 2, job.text()
    assert "requeue 1 of at most 30" in job.text()


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        pytest.param((), {}, id="deepspeed"),
        pytest.param(("--launcher", "srun"), {}, id="srun", marks=pytest.mark.slow),
        pytest.param(
            ("--launcher", "srun", "--partition", "debug", "debug"), {}, id="two-parts",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--container", "image", "--container-runtime", "apptainer", "--modules", "cuda/13",
             "--interface", "lo", "--mount", "/usr"),
            {"BASH_FUNC_module%%": "() { echo module $*; }"}, id="apptainer",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_what_is_submitted_is_what_a_dry_run_shows_and_is_requeued(
    cluster: MiniSlurm,
    tmp_path: Path,
    stand_in: dict[str, str],
    arguments: tuple[str, ...],
    extra: dict[str, str],
    small_run: list[str],
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apptainer").write_text(APPTAINER)
    (programs / "apptainer").chmod(0o755)
    env = stand_in | extra | {"PATH": f"{programs}:{HERE['PATH']}"}
    overrides = ("--set", *small_run, f"checkpoint.dir={tmp_path}/saved")
    shown = submit_py(
        cluster, *SubmittedJob.arguments(tmp_path), "--dry-run", *arguments, *overrides, env=env
    ).stdout
    assert not (tmp_path / "logs").exists()
    job = SubmittedJob(cluster, tmp_path, *arguments, *overrides, env=env)
    assert job.script == shown.partition("batch script\n\n")[2]
    kept = cluster.run("scontrol", "write", "batch_script", job.id, "-").stdout
    # SLURM keeps the script of a heterogeneous job without a blank line.
    assert [line for line in kept.splitlines() if line] == (
        [line for line in job.script.splitlines() if line]
    )
    job.signal_when(BOTH_RANKS_RUN, timeout_s=60)
    job.restart_now(timeout_s=60)
    assert job.wait_for_end(timeout_s=60) == ("COMPLETED", "0"), job.text()
    assert "requeue 1 of at most 30" in job.text()
    if "apptainer" in arguments:
        assert "module load cuda/13" in job.text()
        mounts = f"{ROOT}:{ROOT},{tmp_path}/logs:{tmp_path}/logs,/usr:/usr"
        assert f"exec --nv --bind {mounts} --pwd {ROOT} image bash" in job.text()


@pytest.mark.parametrize(
    ("arguments", "extra", "code", "said"),
    [
        pytest.param(("--set", "fail=1"), {}, "3", "ended with code 3", id="fault"),
        pytest.param((), {"MULOCO_MAX_RESTARTS": "0"}, "85", "not requeued", id="cap"),
    ],
)
def test_a_job_is_not_requeued(
    cluster: MiniSlurm,
    tmp_path: Path,
    stand_in: dict[str, str],
    arguments: tuple[str, ...],
    extra: dict[str, str],
    code: str,
    said: str,
) -> None:
    job = Job(cluster, tmp_path, "configs/cpu_k2.yaml", *arguments, env=stand_in | extra)
    if extra:
        job.signal_when(BOTH_RANKS_RUN, timeout_s=60)
    assert job.wait_for_end(timeout_s=60) == ("FAILED", code), job.text()
    assert said in job.text()


def test_a_job_is_requeued_after_a_fault_only_if_it_has_saved_a_checkpoint(
    cluster: MiniSlurm, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    """The first start saves step 5 and crashes; the second one resumes there and saves nothing."""
    saves = f"checkpoint.dir={tmp_path}/crash"
    job = Job(cluster, tmp_path, "configs/cpu_k2.yaml", "--set", saves, env=stand_in)
    job.restart_now(timeout_s=90)
    assert job.wait_for_end(timeout_s=90) == ("FAILED", "3"), job.text()
    assert "ended with code 3, with a checkpoint of step 5; requeue 1 of at most 30" in job.text()
    assert job.text().count("requeue ") == 1, job.text()


def test_a_job_that_trains_nothing_any_more_is_not_requeued_with_a_checkpoint_either(
    cluster: MiniSlurm, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    saves = f"checkpoint.dir={tmp_path}/crash_numerics"
    job = Job(cluster, tmp_path, "configs/cpu_k2.yaml", "--set", saves, env=stand_in)
    assert job.wait_for_end(timeout_s=60) == ("FAILED", "17"), job.text()
    assert "ended with code 17, nothing is trained any more; not requeued" in job.text()


def test_a_missing_config_ends_the_job_before_anything_starts(
    cluster: MiniSlurm, tmp_path: Path
) -> None:
    job = Job(cluster, tmp_path, "configs/no_such.yaml", env={})
    assert job.wait_for_end(timeout_s=30) == ("FAILED", "2")
    assert "no_such.yaml" in job.text()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The CPU config on a dataset of bytes, small enough that starting up is most of the time."""
    directory = tmp_path_factory.mktemp("bytes")
    text = directory / "text.txt"
    text.write_text("\n\n".join(topics.values())[:60_000])
    command = [sys.executable, "tools/prepare_data.py", "--tokenizer-type=byte-level"]
    command += ["--format=paragraphs", f"--input={text}", f"--output-prefix={directory}/train"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    overrides = {
        "model.num_layers": 2,
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 128,
        "model.num_attention_heads": 1,
        "model.seq_length": 64,
        "model.vocab_size": 512,
        "data.train": f"[{{path: {directory / 'train'}}}]",
        "data.valid": "[]",
        "data.tokenizer_type": "byte-level",
        "data.tokenizer_model": "null",
        "training.micro_batch_size": 2,
        "training.global_batch_size": 4,
        "training.train_iters": 200,
        "training.eval_interval": 0,
        "outer.sync_interval": 5,
        "checkpoint.save_interval": 0,
        "monitor.log_interval": 1,
    }
    return [f"{key}={value}" for key, value in overrides.items()]


def test_a_stopped_and_requeued_run_ends_where_an_undisturbed_one_does(
    cluster: MiniSlurm, tmp_path: Path, small_run: list[str]
) -> None:
    digests = {}
    for name in ("undisturbed", "stopped"):
        directory = tmp_path / name
        directory.mkdir()
        own = [f"checkpoint.dir={directory}/saved", f"monitor.dir={directory}/tensorboard"]
        with held_port() as port:
            job = Job(
                cluster,
                directory,
                "configs/cpu_k2.yaml",
                *(part for override in small_run + own for part in ("--set", override)),
                env={"MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)},
            )
            if name == "stopped":
                job.signal_when(r"iteration +7/", timeout_s=120)
                job.restart_now(timeout_s=60)
            assert job.wait_for_end(timeout_s=180) == ("COMPLETED", "0"), job.text()
        (digests[name],) = re.findall(r"final anchor digest: (\w+)", job.text())
    assert "requeue 1 of" in job.text()
    steps = [int(step) for step in re.findall(r" iteration +(\d+)/", job.text())]
    assert steps == list(range(1, 201)), "a step was repeated or left out by the resume"
    assert digests["stopped"] == digests["undisturbed"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "srun"])
def test_a_run_that_is_preempted_by_a_signal_and_by_a_lost_node_ends_undisturbed(
    cluster: MiniSlurm, tmp_path: Path, small_run: list[str], launcher: str
) -> None:
    """The second start loses a node; the third one goes on from the newest checkpoint."""
    digests = {}
    for name in ("undisturbed", "preempted"):
        directory = tmp_path / name
        own = [f"checkpoint.dir={directory}/saved", f"monitor.dir={directory}/tensorboard"]
        overrides = ("--set", *small_run, *own, "checkpoint.save_interval=20")
        with held_port() as port:
            job = SubmittedJob(
                cluster, directory, "--launcher", launcher, *overrides,
                env={"MASTER_PORT": str(port)},
            )  # fmt: skip
            if name == "preempted":
                job.signal_when(r"iteration +7/", timeout_s=120)
                job.restart_now(timeout_s=60)
                job.wait_for_line(r"iteration +4\d/", timeout_s=120)
                cluster.lose_node("n2")
                job.wait_for_requeue(2, timeout_s=120)
                cluster.repair_node("n2")
                job.restart_now(timeout_s=60, restarts=2)
            assert job.wait_for_end(timeout_s=180) == ("COMPLETED", "0"), job.text()
        (digests[name],) = re.findall(r"final anchor digest: (\w+)", job.text())
    assert digests["preempted"] == digests["undisturbed"]
