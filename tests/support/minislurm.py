"""`MiniSlurm`: a real SLURM on this machine while a test runs: several slurmd with fake GPUs.

    with MiniSlurm(nodes=4, gpus_per_node=8) as slurm:
        job = slurm.submit("launch/slurm/pretrain.sbatch", "configs/15b_k16.yaml")

Debian's slurmd can act as several nodes of one host (``-N name``, one port each), and a GPU is
whatever file the configuration names, so one directory holds a whole cluster. The configuration of
an installed SLURM is not read. Ports stay reserved while the cluster runs, so several clusters can
run at the same time. All processes end with the block, and with this process.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import psutil

from tests.support.ports import held_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
START_TIMEOUT_S = 30.0
CPUS_PER_NODE = 16  # as configured, not as detected: SLURM only counts them


def why_unavailable() -> str | None:
    """Return the reason that no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if missing:
        return f"no SLURM here: {', '.join(missing)} not found (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "a slurmd must be started by root, and this is not root"
    return None


class MiniSlurm:
    """Cluster of the nodes n1, n2, ..., which runs inside the ``with`` block."""

    def __init__(self, *, nodes: int, gpus_per_node: int) -> None:
        self._nodes = nodes
        self._gpus_per_node = gpus_per_node
        self._cleanup = ExitStack()
        self._directory = Path()
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # undoes a start that fails half-way
            # Not pytest's own directory: munge refuses a socket below one that others cannot enter.
            self._directory = Path(tempfile.mkdtemp(prefix="minislurm-"))
            stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
            self._directory.chmod(0o755)
            ports = stack.enter_context(held_ports(1 + self._nodes))
            self._write_files(ports)
            self._start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a user of this cluster, without variables of another SLURM."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH"))
        }
        return clean | {"SLURM_CONF": str(self._directory / "slurm.conf")}

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands and return its outcome, whatever it is."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | dict(env or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Run ``sbatch`` and return the job id."""
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env)
        assert done.returncode == 0, f"sbatch refused {arguments}: {done.stderr}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``, of a heterogeneous job's first component."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        first = shown.partition("\n")[0]
        return dict(field.split("=", 1) for field in first.split() if "=" in field)

    def lose_node(self, name: str) -> None:
        """Kill everything that runs on a node, as when its power fails, and report it as down.

        SLURM itself would notice after SlurmdTimeout, five minutes.
        """
        for process in self._processes_on(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._slurmds.pop(name).wait()
        done = self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power")
        assert done.returncode == 0, done.stderr

    def repair_node(self, name: str) -> None:
        """Start a node that was lost."""
        self._start_slurmd(self._cleanup, name)
        done = self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        assert done.returncode == 0, done.stderr
        self._await(f"{name} idle", self.idle)

    def _processes_on(self, name: str) -> list[psutil.Process]:
        """Return a node's slurmd, and the daemons and tasks of its steps."""
        slurmd, found = self._slurmds[name], []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                of_a_step = process.name().startswith("slurmstepd") and any(
                    Path(file.path).name == f"slurmd.{name}.log" for file in process.open_files()
                )
                if (
                    process.pid == slurmd.pid
                    or of_a_step
                    or environment.get("SLURMD_NODENAME") == name
                ):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def wait_for(
        self, what: str, condition: Callable[[], bool], *, timeout_s: float, log: Path
    ) -> None:
        """Poll until ``condition`` holds; on a time-out fail with the job's log."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                text = log.read_text() if log.exists() else "(no log)"
                raise AssertionError(f"waited {timeout_s:g} s for {what}; {log} holds:\n{text}")
            time.sleep(0.5)

    def idle(self) -> bool:
        """Return whether all nodes are idle."""
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == str(self._nodes)

    def _write_files(self, ports: Sequence[int]) -> None:
        for name in ("ctld", "spool", "log", "run", "munge", "dev"):
            (self._directory / name).mkdir()
        key = self._directory / "munge/key"
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(1024))
        gpus = ""
        for number in range(self._gpus_per_node):
            (self._directory / f"dev/gpu{number}").touch()
        if self._gpus_per_node:
            files = f"{self._directory}/dev/gpu[0-{self._gpus_per_node - 1}]"
            gpus = f"NodeName=n[1-{self._nodes}] Name=gpu File={files}\n"
        (self._directory / "gres.conf").write_text(gpus)
        (self._directory / "cgroup.conf").touch()
        (self._directory / "slurm.conf").write_text(self._slurm_conf(ports))

    def _slurm_conf(self, ports: Sequence[int]) -> str:
        here, host = self._directory, socket.gethostname().split(".")[0]
        node_ports = ",".join(map(str, ports[1:]))
        return f"""
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={here}/munge/socket
CredType=cred/munge
StateSaveLocation={here}/ctld
SlurmctldPidFile={here}/run/ctld.pid
SlurmdPidFile={here}/run/slurmd.%n.pid
SlurmdSpoolDir={here}/spool/%n
SlurmctldLogFile={here}/log/ctld.log
SlurmdLogFile={here}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
NodeName=n[1-{self._nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] \
CPUs={CPUS_PER_NODE} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1 \
RealMemory=4000 {f"Gres=gpu:{self._gpus_per_node}" if self._gpus_per_node else ""} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
"""

    def _start(self, stack: ExitStack) -> None:
        munge = self._directory / "munge"
        self._daemon(
            stack,
            "munged",
            "--foreground",
            f"--key-file={munge}/key",
            f"--socket={munge}/socket",
            f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed",
            f"--log-file={munge}/log",
        )
        self._await("munged's socket", lambda: (munge / "socket").exists())
        self._daemon(stack, "slurmctld", "-D")
        self._await("slurmctld", lambda: "UP" in self.run("scontrol", "ping").stdout)
        for number in range(1, self._nodes + 1):
            self._start_slurmd(stack, f"n{number}")
        stack.callback(self._cancel_all)
        self._await(f"{self._nodes} idle nodes", self.idle)

    def _start_slurmd(self, stack: ExitStack, name: str) -> None:
        self._slurmds[name] = self._daemon(stack, "slurmd", "-D", "-N", name)

    def _cancel_all(self) -> None:
        self.run("scancel", "--full", "--signal=KILL", "-u", "root")
        self.run("scancel", "-u", "root")
        deadline = time.monotonic() + 10
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _daemon(self, stack: ExitStack, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = _find(program)
        assert path is not None
        log = stack.enter_context((self._directory / f"log/{program}.out").open("a"))
        process = subprocess.Popen(
            # Even if this process is killed, no daemon is left behind.
            ["setpriv", "--pdeathsig", "KILL", path, *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        stack.callback(_end, process)
        return process

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {path.name} ---\n{path.read_text()[-2000:]}"
                    for path in sorted((self._directory / "log").iterdir())
                )
                raise AssertionError(f"no {what} within {START_TIMEOUT_S:g} s\n{logs}")
            time.sleep(0.2)


def _find(program: str) -> str | None:
    """Return a program's path, also from where Debian keeps daemons, often not on PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
