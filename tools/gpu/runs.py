"""Checks that train: the program itself is started, and its output and event files are read."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.gpu.findings import Finding

__all__ = [
    "PAPER",
    "TINY",
    "Program",
    "Run",
    "parity",
    "planned",
    "start_up",
    "train_and_resume",
    "variants",
]

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data/demo"
Sections = Mapping[str, Mapping[str, Any]]
STOPPED = 85
HELD_OUT = "lm loss validation"  # tag of the held-out loss
SIDE_BY_SIDE = 4  # runs of one check that share the device

DATA: Sections = {
    "data": {
        "train": [{"path": str(DEMO / "train")}],
        "valid": [{"path": str(DEMO / "valid")}],
        "tokenizer_type": "sentencepiece",
        "tokenizer_model": str(DEMO / "tokenizer.model"),
    }
}
ALONE: Sections = {"parallel": {"num_replicas": 1}, "monitor": {"sample_tokens": 0}}
# The 150M and 416M models train on the demo's text; most of their vocabulary stays unused.
PAPER: Sections = {
    "training": {"train_tokens": None, "eval_interval": 0},
    "inner": {"lr": 0.01, "lr_warmup_iters": 5},
    "checkpoint": {"dir": None, "save_interval": 0},
    "monitor": {"log_interval": 1},
}
# On a CPU, for a rehearsal of these checks: the same shape of run with small numbers.
TINY: Sections = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 176,
        "num_attention_heads": 2,
        "kv_channels": 32,
        "seq_length": 64,
        "vocab_size": 4096,
    }
}


@dataclass(frozen=True)
class Run:
    """How a run ended.

    Attributes:
        code: Exit code.
        output: Everything that it printed.
        points: Tag -> value by inner step.
    """

    code: int
    output: str
    points: dict[str, dict[int, float]]

    @property
    def losses(self) -> list[float]:
        """The training losses in the order of steps."""
        return [value for _, value in sorted(self.points.get("lm loss", {}).items())]

    @property
    def digest(self) -> str:
        """The digest of the final anchor, ``n/a`` where the run has not come so far."""
        found = re.search(r"final anchor digest: (\S+)", self.output)
        return found[1] if found else "n/a"

    def tail(self) -> str:
        """Return the last lines, for the report of a failure."""
        return " | ".join(self.output.strip().splitlines()[-6:])[-900:]


class Program:
    """Starts runs in a directory.

    Args:
        directory: Place of configs, checkpoints and event files.
        on_gpu: Whether runs train on the GPU; otherwise they are a rehearsal on a CPU.
    """

    def __init__(self, directory: Path, *, on_gpu: bool) -> None:
        self.directory, self.on_gpu = directory, on_gpu

    def config(self, name: str, extends: Sequence[str], *sections: Sections) -> Path:
        """Write a config and return its path; later sections win, also over the directories."""
        place = self.directory / name
        place.mkdir(parents=True, exist_ok=True)
        merged: dict[str, Any] = {"extends": [str(ROOT / "configs" / each) for each in extends]}
        own = {
            "data": {"cache_dir": str(place / "index")},
            "checkpoint": {"dir": str(place / "checkpoints")},
            "monitor": {"dir": str(place / "events")},
        }
        for each in (DATA, own, *sections):
            for section, keys in each.items():
                merged.setdefault(section, {}).update(keys)
        path = place / "config.yaml"
        path.write_text(yaml.safe_dump(merged), encoding="utf-8")
        return path

    def run(
        self,
        config: Path,
        *,
        ranks: int = 0,
        environment: Mapping[str, str] | None = None,
        stop_after: str = "",
    ) -> Run:
        """Train.

        Args:
            config: The file.
            ranks: Ranks that DeepSpeed's launcher starts; 0 is one process without it.
            environment: Variables to add.
            stop_after: Send SIGUSR1 to the ranks once a printed line contains this.
        """
        command = [sys.executable, "-u"]
        if ranks:
            command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
            command += ["--master_port", str(_free_port())]
        command += [str(ROOT / "launch/pretrain.py"), "--config", str(config)]
        variables = {**os.environ, "PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "4"}
        if not self.on_gpu:
            variables["DS_ACCELERATOR"] = "cpu"
        process = subprocess.Popen(
            command,
            cwd=self.directory,
            env=variables | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        lines, asked = [], not stop_after
        for line in process.stdout:
            lines.append(line)
            if not asked and stop_after in line:
                _signal_ranks(process.pid)
                asked = True
        code = process.wait()
        output = "".join(lines)
        (config.parent / "output.txt").write_text(output, encoding="utf-8")
        return Run(code, output, _points(config.parent / "events"))


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _signal_ranks(launcher: int) -> None:
    """Send SIGUSR1 to the training processes below a launcher."""
    import psutil

    family = psutil.Process(launcher).children(recursive=True)
    last = [each for each in family if not each.children()] or family
    for process in last:
        if any(part.endswith("pretrain.py") for part in process.cmdline()):
            process.send_signal(signal.SIGUSR1)


def _points(directory: Path) -> dict[str, dict[int, float]]:
    from megatron_muloco.errors import ConfigError
    from tools.run_points import read_points

    try:
        return {tag: dict(points) for tag, points in read_points(str(directory)).items()}
    except ConfigError:  # it ended before the first event
        return {}


def largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest relative difference; infinite where the lengths differ."""
    if len(one) != len(other) or not one:
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


# ---- one rank from end to end ------------------------------------------------------------------


def train_and_resume(program: Program) -> list[Finding]:
    """Train under the launcher, in bf16 and fp32; stop, resume, and compare with the whole run."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda precision: _resume(program, precision), ("bf16", "fp32"))
        return [finding for each in found for finding in each]


def _resume(program: Program, precision: str) -> list[Finding]:
    steps = 120 if program.on_gpu else 30
    length: Sections = {
        "training": {
            "precision": precision,
            "deterministic": True,
            "train_iters": steps,
            "eval_interval": steps // 2,
            "eval_iters": 2,
        },
        "checkpoint": {"save_interval": steps // 2},
        "monitor": {"log_interval": 10},
    }
    whole, parted = (
        program.config(f"{precision}_{name}", ["cpu_k2.yaml"], ALONE, length)
        for name in ("whole", "parted")
    )
    reference = program.run(whole, ranks=1)
    first = program.run(parted, ranks=1, stop_after="consumed samples")
    second = program.run(parted, ranks=1)
    held_out = [value for _, value in sorted(reference.points.get(HELD_OUT, {}).items())]
    codes = (reference.code, first.code, second.code)
    stopped = re.search(r"stopped on request; state saved, at (iteration \d+)", first.output)
    done = codes == (0, STOPPED, 0)
    detail = f", stopped at {stopped[1] if stopped else 'n/a'}"
    return [
        Finding(
            "T11",
            f"{precision}, launcher: whole run, stopped run, resumed run",
            f"exit codes {codes}"
            + (detail if done else f"; {reference.tail()} || {first.tail()} || {second.tail()}"),
            done,
        ),
        Finding(
            "T11",
            f"{precision}: loss of {steps} steps, held-out loss",
            f"{_ends(reference.losses)}; {_ends(held_out)}",
            _falls(reference.losses) and _falls(held_out),
        ),
        Finding(
            "T8",
            f"{precision}: resumed against whole",
            f"final anchors {'equal' if reference.digest == second.digest else 'differ'} "
            f"in bits; last loss differs by {_last_difference(reference, second):.1e}",
            reference.digest == second.digest != "n/a",
        ),
    ]


def _ends(values: Sequence[float]) -> str:
    return f"{values[0]:.4f} to {values[-1]:.4f}" if values else "n/a"


def _falls(values: Sequence[float]) -> bool:
    return len(values) > 1 and values[-1] < values[0]


def _last_difference(one: Run, other: Run) -> float:
    return largest_difference(one.losses[-1:], other.losses[-1:])


def parity(program: Program) -> list[Finding]:
    """Compare 20 fp32 steps on the device with the same steps on the CPU."""
    short: Sections = {
        "training": {"train_iters": 20, "eval_interval": 0},
        "inner": {
            "lr_warmup_iters": 5,
            "muon": {"ns_dtype": "fp32", "exchange_dtype": "fp32"},
        },
        "outer": {"sync_interval": 5},
        "checkpoint": {"dir": None, "save_interval": 0},
        "monitor": {"log_interval": 1},
    }
    runs = [
        program.run(program.config(name, ["cpu_k2.yaml"], ALONE, short), environment=variables)
        for name, variables in (("device", {}), ("host", {"DS_ACCELERATOR": "cpu"}))
    ]
    difference = largest_difference(runs[0].losses, runs[1].losses)
    detail = "" if difference < 1 else f"; {runs[0].tail()} || {runs[1].tail()}"
    return [
        Finding(
            "T7",
            "20 fp32 steps, H = 5, device against CPU",
            f"losses differ by {difference:.1e} at most, {_ends(runs[0].losses)}{detail}",
            difference <= 1e-4,
        )
    ]


def start_up(program: Program) -> list[Finding]:
    """Start on the CPU beside a visible GPU, and as a task that sees one GPU of its node."""
    few: Sections = {
        "training": {"train_iters": 4, "eval_interval": 0},
        "inner": {"lr_warmup_iters": 1},
        "outer": {"sync_interval": 2},
        "checkpoint": {"dir": None, "save_interval": 0},
        "monitor": {"log_interval": 1, "sample_tokens": 0},
    }
    cpu = program.run(
        program.config("on_cpu", ["cpu_k2.yaml"], few),
        ranks=2,
        environment={"DS_ACCELERATOR": "cpu"},
    )
    task = {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_LOCALID": "3",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_STEP_ID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    one = program.run(program.config("task", ["cpu_k2.yaml"], ALONE, few), environment=task)
    return [
        Finding(
            "T11",
            f"{label}",
            f"exit code {run.code}, {len(run.losses)} steps" + (f"; {run.tail()}" * bool(run.code)),
            run.code == 0 and len(run.losses) == 4,
        )
        for label, run in (
            ("DS_ACCELERATOR=cpu with a visible GPU, two ranks", cpu),
            ("a SLURM task with local rank 3 and one visible GPU", one),
        )
    ]


# ---- variants of one run -----------------------------------------------------------------------

VARIANTS: Mapping[str, Sections] = {
    "as configured": {},
    "the same again": {},
    "outer.state_device cpu": {"outer": {"state_device": "cpu"}},
    "outer.transport host": {"outer": {"transport": "host"}},
    "no overlap inside the replica": {
        "training": {"overlap_grad_reduce": False, "overlap_param_gather": False}
    },
    "monitor.profile": {"monitor": {"profile": {"steps": [7, 8]}}},
    "monitor.profile.nvtx": {"monitor": {"profile": {"steps": [7, 8], "nvtx": True}}},
    "evaluation in between": {"training": {"eval_interval": 3, "eval_iters": 1}},
    "training.fusions none": {"training": {"fusions": "none"}},
    "training.deterministic false": {"training": {"deterministic": False}},
    "overlap": {"outer": {"overlap_steps": 2}},
    "overlap, host": {"outer": {"overlap_steps": 2, "transport": "host"}},
    "overlap, 4 bits": {
        "outer": {"overlap_steps": 2, "compression": {"kind": "linear", "bits": 4}}
    },
    "overlap, 4 bits, host": {
        "outer": {
            "overlap_steps": 2,
            "transport": "host",
            "compression": {"kind": "linear", "bits": 4},
        }
    },
}
# Other kernels round at other places. Without determinism two equal runs differed by 3e-4.
ABOUT_AS = dict.fromkeys(("training.fusions none", "training.deterministic false"), "as configured")
# Variant -> the one whose bits it must have.
SAME_AS = {
    name: "as configured"
    for name in VARIANTS
    if name not in ABOUT_AS and name != "as configured" and not name.startswith("overlap")
} | {"overlap, host": "overlap", "overlap, 4 bits, host": "overlap, 4 bits"}


def variants(program: Program) -> list[Finding]:
    """Train the 150M model in bf16, deterministically, under settings that must not change it."""
    short: Sections = {
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 12,
            "train_tokens": None,
            "eval_interval": 0,
            "deterministic": True,
        },
        "outer": {"sync_interval": 4},
    }
    configs = {
        name: program.config(
            f"variant_{index}",
            ["models/150m.yaml", "methods/muloco_k1.yaml"],
            PAPER,
            {} if program.on_gpu else TINY,
            _merged(short, sections),
        )
        for index, (name, sections) in enumerate(VARIANTS.items())
    }
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        runs = dict(zip(configs, pool.map(program.run, configs.values()), strict=True))
    findings = [_variant(name, run, runs) for name, run in runs.items()]
    plans = {name: planned(configs[name]) for name in list(VARIANTS)[:3:2]}
    for name, plan in plans.items():
        peak = runs[name].points.get("perf/peak_memory_gib", {0: float("nan")})
        measured = max(peak.values()) * 2**30
        findings.append(
            Finding(
                "B1",
                f"150M, {name}: memory",
                f"peak {measured / 1e9:.2f} GB; plan {plan / 1e9:.2f} GB",
            )
        )
    return findings


def _merged(one: Sections, other: Sections) -> Sections:
    return {name: {**one.get(name, {}), **other.get(name, {})} for name in {**one, **other}}


def _variant(name: str, run: Run, runs: Mapping[str, Run]) -> Finding:
    if run.code or not run.losses:
        return Finding("T8", f"150M, {name}", f"exit code {run.code}; {run.tail()}", passed=False)
    result = f"loss {_ends(run.losses)}"
    passed = _falls(run.losses)
    other = SAME_AS.get(name) or ABOUT_AS.get(name)
    if other:
        difference = largest_difference(run.losses, runs[other].losses)
        equal = run.digest == runs[other].digest
        result += f"; from {other!r}: losses {difference:.1e}, anchor bits "
        result += "equal" if equal else "differ"
        # The bound is chosen: a fault makes more of it.
        same = difference == 0 and equal if name in SAME_AS else difference <= 1e-2
        passed = passed and same
    if "monitor.profile" in name:
        said = re.findall(r"(?:profile|NVTX ranges) of iterations.*", run.output)
        result += f"; {said[0] if said else 'NO PROFILE'}".split(": /")[0]
        passed = passed and bool(said)
    return Finding("T8", f"150M, {name}", result, passed)


def planned(config: Path) -> int:
    """Return the bytes of tensors that the plan counts for one rank, at the peak."""
    from megatron_muloco.config import load_config
    from megatron_muloco.config.derived import topology_of
    from megatron_muloco.planning.memory import memory_plan

    loaded = load_config(str(config), ())
    return memory_plan(loaded, topology_of(loaded, 1)).allocated
