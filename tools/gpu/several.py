"""Checks on several ranks: over the staged backend on one device, and over NCCL on several.

Every layout trains a small model for some rounds. Its losses are compared with those of the same
ranks on the CPU over gloo. Ranks are processes that are started once and train all layouts::

    python -m tools.gpu.several JOB RANK...    these ranks; JOB is a file that `_train_all` writes
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tools.gpu.findings import Finding

__all__ = ["Layout", "on_one_device", "on_several_devices"]

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4
# Sums of at most 512 * 64 * 8 terms in another order, as in tests/distributed/test_golden.py: each
# rounding is at most 2^-24 relative and grows like the square root of the number of terms, 512; six
# steps amplify a difference of parameters by less than 2 a step.
RELATIVE = 64 * 512 * 2.0**-24
STRESS_STEPS, STRESS_SECONDS = 2000, 120


@dataclass(frozen=True)
class Layout:
    """One run.

    Attributes:
        name: Its name in the report.
        sections: Keys of its configuration.
    """

    name: str
    sections: Mapping[str, Mapping[str, Any]]


def _parallel(
    replicas: int, tensor: int = 1, pipeline: int = 1, context: int = 1
) -> dict[str, Any]:
    return {
        "num_replicas": replicas,
        "context_parallel_size": context,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
    }


_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_CODE = {"overlap_steps": 1, "compression": {"kind": "linear", "bits": 4}}
FOUR_RANKS = (
    Layout("K 2, tp 2", {"parallel": _parallel(2, tensor=2)}),
    Layout("K 2, pp 2", {"parallel": _parallel(2, pipeline=2)}),
    Layout("K 2, cp 2", {"parallel": _parallel(2, context=2)}),
    Layout(
        "K 2, dp 2, 4 bits, overlap",
        {"parallel": _parallel(2), "training": _OVERLAP, "outer": _CODE},
    ),
)
TWO_RANKS = (
    Layout("K 2", {"parallel": _parallel(2)}),
    Layout("K 2, 4 bits, overlap", {"parallel": _parallel(2), "outer": _CODE}),
    Layout("tp 2", {"parallel": _parallel(1, tensor=2)}),
    Layout("pp 2", {"parallel": _parallel(1, pipeline=2)}),
    Layout("cp 2", {"parallel": _parallel(1, context=2)}),
    Layout("dp 2", {"parallel": _parallel(1), "training": _OVERLAP}),
)


@dataclass(frozen=True)
class Ranks:
    """Processes that train layouts one after the other.

    Attributes:
        label: Name of these processes in the report.
        backend: Backend of the default group.
        delay: For the staged backend: seconds by which sources are read late.
        on_cpu: Whether GPUs are hidden from them.
        own_device: Whether each sees one GPU, as tasks of a scheduler do; else all see all GPUs.
        spread: Whether ranks take GPUs of their own; otherwise they share the first.
        environment: Variables to set.
    """

    label: str
    backend: str
    delay: float = 0.0
    on_cpu: bool = False
    own_device: bool = False
    spread: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def variables(self, rank: int) -> dict[str, str]:
        """Return the environment of a rank."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **self.environment}
        if self.on_cpu:
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        elif self.own_device:
            variables["CUDA_VISIBLE_DEVICES"] = str(rank)
        return variables


Results = dict[str, list[dict[str, Any]]]
"""Layout -> what each rank came to."""


def _train_all(
    ranks: Ranks, layouts: Sequence[Layout], size: int, directory: Path, seconds: float
) -> Results | str:
    """Train all layouts; return the results, or what went wrong."""
    from torch.distributed import TCPStore

    place = directory / ranks.label.replace(" ", "_")
    place.mkdir(parents=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {
        "place": str(place),
        "data": str(directory / "documents"),
        "port": store.port,
        "size": size,
        "backend": ranks.backend,
        "delay": ranks.delay,
        "spread": ranks.spread and not ranks.own_device,
        "layouts": {each.name: each.sections for each in layouts},
    }
    file = place / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    # On a CPU one process imports everything and then becomes all ranks; CUDA survives no fork.
    together = [range(size)] if ranks.on_cpu else [range(rank, rank + 1) for rank in range(size)]
    processes = []
    for members in together:
        with (place / f"output{members[0]}.txt").open("w") as output:
            command = [sys.executable, "-m", "tools.gpu.several", str(file), *map(str, members)]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=ranks.variables(members[0]),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    failure = _wait(processes, time.monotonic() + seconds)
    if failure is not None:
        said = (place / f"output{failure}.txt").read_text(encoding="utf-8", errors="replace")
        last = " | ".join(said.strip().splitlines()[-6:])[-900:]
        return f"ranks failed or did not end in {seconds:.0f} s: {last}"
    found = [
        json.loads((place / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(size)
    ]
    return {each.name: [of_rank[each.name] for of_rank in found] for each in layouts}


def _wait(processes: Sequence["subprocess.Popen[bytes]"], deadline: float) -> int | None:
    """Wait for all; return the first that failed or was not done, and end the others."""
    try:
        while any(process.poll() is None for process in processes):
            failed = [i for i, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                hung = [i for i, process in enumerate(processes) if process.poll() is None]
                return (failed or hung)[0]
            time.sleep(0.05)
        return next((i for i, process in enumerate(processes) if process.returncode), None)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the ranks that it has become
                process.wait()


# ---- one rank ------------------------------------------------------------------------------------


def _train_ranks(job_file: Path, members: Sequence[int]) -> int:
    """Train as these ranks, each in a process of its own; return the exit code."""
    from tools.gpu import inside  # before the fork: imports take longer than training

    assert inside
    if len(members) == 1:
        _train_rank(job_file, members[0])
        return 0
    children = []
    for rank in members:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _train_rank(job_file, rank)
                code = 0
            except BaseException:  # noqa: BLE001 - the process ends here
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in children)


def _train_rank(job_file: Path, rank: int) -> None:
    """Train the layouts of a job as one rank and write what came out."""
    from megatron_muloco.runtime.distributed import silence_known_warnings
    from tools.gpu import inside

    silence_known_warnings()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    results = {}
    for name, sections in job["layouts"].items():
        joined = inside.Joined(
            rank=rank,
            size=job["size"],
            port=job["port"],
            prefix=name,
            backend=job["backend"],
            delay=job["delay"],
            device=rank if job["spread"] else 0,
        )
        result = inside.trained(inside.run_config(job["data"], sections), joined)
        results[name] = asdict(result)
    Path(job["place"], f"rank{rank}.json").write_text(json.dumps(results), encoding="utf-8")


# ---- comparisons ---------------------------------------------------------------------------------


def _compared(
    key: str, label: str, layout: str, found: Results | str, expected: Results | str, bound: float
) -> Finding:
    """Compare the ranks of a layout with the reference; ``bound`` 0 asks for equal bits."""
    what = f"{layout}, {label}"
    for each in (found, expected):
        if isinstance(each, str):
            return Finding(key, what, each, passed=False)
    assert not isinstance(found, str)
    assert not isinstance(expected, str)
    ours, theirs = found[layout], expected[layout]
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one["losses"], other["losses"], strict=True)
    ]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    # All replicas have one anchor: the digest covers the whole model.
    anchors = {each["digest"] for each in ours}
    falls = ours[0]["losses"][-1] < ours[0]["losses"][0]
    same = anchors == {each["digest"] for each in theirs}
    result = f"losses differ by {difference:.1e} at most, {len(pairs)} of them; "
    result += f"{len(anchors)} anchor{'s' * (len(anchors) > 1)} of {len(ours)} ranks"
    result += f", the reference's bits: {'yes' if same else 'no'}"
    passed = difference <= bound and len(anchors) == 1 and falls and (same or bound > 0)
    return Finding(key, what, result, passed)


def on_one_device(device: torch.device) -> list[Finding]:
    """T10: train on four ranks that share a device, over the staged backend."""
    from tools.gpu import inside

    on_cpu = device.type == "cpu"
    reference = Ranks("gloo", "gloo", on_cpu=True)
    # Late reads show a source that is overwritten before the wait.
    variants = [Ranks("staged", "staged", delay=0.001, on_cpu=on_cpu)]
    if not on_cpu:
        variants.insert(0, Ranks("staged without delay", "staged"))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        inside.write_documents(directory)
        seconds = 400 if on_cpu else 120
        expected = _train_all(reference, FOUR_RANKS, RANKS, directory, seconds)
        findings = []
        for ranks in variants:
            found = _train_all(ranks, FOUR_RANKS, RANKS, directory, seconds)
            findings += [
                _compared(
                    "T10",
                    f"{ranks.label} against gloo on the CPU",
                    layout.name,
                    found,
                    expected,
                    0.0 if on_cpu else RELATIVE,
                )
                for layout in FOUR_RANKS
            ]
    return findings


def on_several_devices(device: torch.device) -> list[Finding]:
    """T12: the layouts on NCCL, also with one visible GPU a rank, and a long run with overlap."""
    from tools.gpu import inside

    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        return []
    size, layouts = (4, FOUR_RANKS) if count >= RANKS else (2, TWO_RANKS)
    variants = (
        Ranks("nccl", "nccl", spread=True),
        Ranks("nccl, one GPU seen by each", "nccl", own_device=True),
    )
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        inside.write_documents(directory)
        expected = _train_all(
            Ranks("gloo", "gloo", on_cpu=True), layouts, size, directory, STRESS_SECONDS
        )
        findings = []
        for ranks in variants:
            found = _train_all(ranks, layouts, size, directory, STRESS_SECONDS)
            findings += [
                _compared("T12", ranks.label, layout.name, found, expected, RELATIVE)
                for layout in layouts
            ]
        findings.append(_stress(size, directory))
    return findings


def _stress(size: int, directory: Path) -> Finding:
    """Train long with phases beside training and one hardware queue, which would show a cycle."""
    sections = {
        "parallel": _parallel(2, tensor=size // 2),
        "outer": _CODE,
        "training": {"train_iters": STRESS_STEPS},
        "monitor": {"log_interval": 100},
    }
    ranks = Ranks("stress", "nccl", spread=True, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    layout = Layout(f"K 2, tp {size // 2}, 4 bits, overlap", sections)
    began = time.monotonic()
    found = _train_all(ranks, [layout], size, directory, STRESS_SECONDS)
    done = not isinstance(found, str)
    result = f"{time.monotonic() - began:.0f} s" if done else str(found)
    what = f"{layout.name}: {STRESS_STEPS:,} steps, CUDA_DEVICE_MAX_CONNECTIONS=1"
    return Finding("T12", what, result, done)


if __name__ == "__main__":
    sys.exit(_train_ranks(Path(sys.argv[1]), [int(rank) for rank in sys.argv[2:]]))
