"""Checks the program on a machine with NVIDIA GPUs, and measures it: tests T0 to T12, B1 to B7.

    python -m tools.gpu_check                       everything that this machine can run
    python -m tools.gpu_check --only codecs parity  some of the checks
    python -m tools.gpu_check --rehearse            all checks on a CPU, at small sizes
    python -m tools.gpu_check --list                the ids, as a table, and what has never run

With one GPU it ends within ten minutes; several are checked after that. Without a GPU it runs the
part that needs none, and says for every id what it left out. Each check runs in a process of its
own with a time limit, and a failure does not end the others. Checks that train whole models need
the demo's data (`python -m tools.demo_corpus`) and a GPU. Exit code: 1 where something differs from
what it must be, else 0.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from tools.gpu.findings import ENTRIES, Finding, key_order, not_run, page_table, report

__all__ = ["CHECKS", "Check", "main"]

ROOT = Path(__file__).resolve().parents[1]
SIDE_BY_SIDE = 5
CORES = 2  # processes beside each other on a machine without a GPU
SLOWER = 6  # time limits are for a GPU; a CPU may be shared with others
BUDGET = 570  # seconds for everything that one GPU can check
LEAST = 20  # seconds: with less left, a check is not started


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name on the command line.
        keys: Ids that it gives findings for.
        where: Module and function.
        limit: Seconds after which it is ended.
        timed: Whether it measures time, and so runs with nothing beside it.
        trains: Whether it starts the program, and so needs the demo's data.
        without_gpu: What is left out of it on a machine without a GPU, where it still runs; empty
            where it does not.
        environment: Variables to set.
        under: Command that runs the check's process; left out where it is not installed.
        several: Whether it is for several GPUs, and so has time of its own.
    """

    name: str
    keys: tuple[str, ...]
    where: str
    limit: int
    timed: bool = False
    trains: bool = False
    without_gpu: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    several: bool = False


_SAME = "the comparison with a GPU: both sides are this CPU"
_TIMES = "times and rates"
CHECKS = (
    Check("resume", ("T11", "T8"), "tools.gpu.runs:train_and_resume", 200, trains=True),
    Check("variants", ("T8", "B1"), "tools.gpu.runs:variants", 200, trains=True),
    Check("parity", ("T7",), "tools.gpu.runs:parity", 120, trains=True),
    Check("start_up", ("T11",), "tools.gpu.runs:start_up", 120, trains=True),
    Check(
        "ranks",
        ("T10",),
        "tools.gpu.several:on_one_device",
        150,
        without_gpu="CUDA tensors, streams and events",
    ),
    Check(
        "background",
        ("T5",),
        "tools.gpu.kernels:background",
        90,
        without_gpu="streams, late kernels, pinned memory",
    ),
    Check(
        "background_uncached",
        ("T5",),
        "tools.gpu.kernels:background_briefly",
        90,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    Check(
        "background_memcheck",
        ("T5",),
        "tools.gpu.kernels:background_briefly",
        120,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        under=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
    Check("outer_parts", ("T2",), "tools.gpu.parts:outer_parts", 60, without_gpu=_SAME),
    Check("fusions", ("T9",), "tools.gpu.parts:fusions", 60, without_gpu="the kernels of a GPU"),
    Check(
        "ceilings", ("T0", "B3"), "tools.gpu.kernels:ceilings", 60, timed=True, without_gpu=_TIMES
    ),
    Check(
        "newton_schulz",
        ("T3", "B3"),
        "tools.gpu.kernels:newton_schulz_check",
        90,
        timed=True,
        without_gpu="shapes of the 15B model and times",
    ),
    Check("codecs", ("T1", "B4"), "tools.gpu.kernels:codecs", 90, timed=True, without_gpu=_SAME),
    Check(
        "attention",
        ("T0", "T4", "B2"),
        "tools.gpu.kernels:attention",
        60,
        timed=True,
        without_gpu="the kernels of a GPU",
    ),
    Check("synchronizations", ("T6",), "tools.gpu.measure:synchronizations", 60),
    Check("layer", ("B2",), "tools.gpu.measure:layer", 120, timed=True),
    Check("outer_step", ("B4",), "tools.gpu.measure:outer_step", 60, timed=True),
    Check("storage", ("B5",), "tools.gpu.measure:storage", 60, timed=True),
    Check("gaps", ("B6", "B7"), "tools.gpu.measure:gaps", 60, timed=True),
    Check("speed", ("B1",), "tools.gpu.measure:speed", 150, timed=True, trains=True),
    Check(
        "devices",
        ("T12",),
        "tools.gpu.several:on_several_devices",
        600,
        timed=True,
        several=True,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print their findings; return the exit code."""
    options = _parse(arguments)
    if options.list:
        print(page_table(), f"Never run on a GPU: {', '.join(not_run())}.", sep="\n\n")
        return 0
    if options.child:
        _report_child(options.child, options.json, on_cpu=options.on_cpu, whole=options.rehearse)
    options.on_cpu = options.rehearse or not _has_gpu()
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    runs = [check for check in chosen if not _reason(check, options)]
    if any(check.trains for check in runs) and not (ROOT / "data/demo/train.bin").exists():
        print("data/demo is missing. Write it first: python -m tools.demo_corpus")
        return 1
    began = time.perf_counter()
    findings, late = [], []
    for check, found in _run_all(runs, options, began):
        if found is None:
            late.append(check)
        else:
            findings += _noted(check, found, time.perf_counter() - began)
    findings.sort(key=lambda each: key_order(each.key))
    left_out = _left_out(chosen, late, findings, options)
    print(report(findings, left_out))
    failed = [each for each in findings if each.passed is False]
    seconds = time.perf_counter() - began
    print(f"\n{len(findings)} findings, {len(failed)} differ, {seconds:.0f} s")
    if options.json:
        rows = [asdict(each) for each in findings]
        whole = {"seconds": round(seconds), "findings": rows, "left_out": left_out}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


def _run_all(
    checks: Sequence[Check], options: argparse.Namespace, began: float
) -> Iterator[tuple[Check, list[Finding] | None]]:
    """Run the checks and yield each with its findings as soon as it ends.

    ``None`` stands for a check that was not started because ten minutes had passed.
    """
    # Timed checks run last and alone; the others share the device. A CPU is not timed.
    alone = [check for check in checks if check.timed and not options.on_cpu]
    with ThreadPoolExecutor(CORES if options.on_cpu else SIDE_BY_SIDE) as pool:
        running = {
            pool.submit(_run, check, options): check for check in checks if check not in alone
        }
        for done in as_completed(running):
            yield running[done], done.result()
    for check in alone:
        left = BUDGET - (time.perf_counter() - began)
        if check.several:
            yield check, _run(check, options)
        elif left < LEAST:
            yield check, None
        else:
            yield check, _run(replace(check, limit=min(check.limit, int(left))), options)


def _reason(check: Check, options: argparse.Namespace) -> str:
    """Return why a check does not run on this machine, else ``""``."""
    if options.on_cpu and not options.rehearse and not check.without_gpu:
        return "needs a GPU"
    if check.under and (options.on_cpu or shutil.which(check.under[0]) is None):
        return f"{check.under[0]} is not installed" if not options.on_cpu else "needs a GPU"
    return ""


def _left_out(
    chosen: Sequence[Check],
    late: Sequence[Check],
    findings: Sequence[Finding],
    options: argparse.Namespace,
) -> dict[str, str]:
    """Return for each id what was left out of it, and why."""
    reasons: dict[str, list[str]] = {entry.key: [] for entry in ENTRIES}
    for check in CHECKS:
        reason = "not asked for" if check not in chosen else _reason(check, options)
        if not reason and options.on_cpu and not options.rehearse:
            reason = check.without_gpu
        if check in late:
            reason = f"no time left after {BUDGET} s"
        for key in check.keys:
            if reason and f"{check.name}: {reason}" not in reasons[key]:
                reasons[key].append(f"{check.name}: {reason}")
    seen = {each.key for each in findings}
    for entry in ENTRIES:
        if entry.key not in seen and not reasons[entry.key]:
            needs = f"needs {entry.needs}" if entry.needs else "no check gave a finding here"
            reasons[entry.key].append(needs)
    return {key: "; ".join(texts) for key, texts in reasons.items() if texts}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0], allow_abbrev=False
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="checks to run")
    parser.add_argument("--list", action="store_true", help="print what each id is, and end")
    parser.add_argument("--json", type=Path, help="file for all findings")
    parser.add_argument("--logs", type=Path, help="directory for the output of the checks")
    parser.add_argument(
        "--rehearse", action="store_true", help="run the checks on a CPU, at small sizes"
    )
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--on-cpu", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(check: Check, options: argparse.Namespace) -> list[Finding]:
    """Run one check in a process group of its own; whatever goes wrong is a finding."""
    with tempfile.TemporaryDirectory() as directory:
        began, found = time.perf_counter(), Path(directory) / "found.json"
        command = [*check.under, sys.executable, "-m", "tools.gpu_check", "--child", check.name]
        command += ["--json", str(found), *(["--rehearse"] * options.rehearse)]
        command += ["--on-cpu"] * options.on_cpu
        variables = {**os.environ, **check.environment}
        if options.on_cpu:
            variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        limit = check.limit * (SLOWER if options.on_cpu else 1)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nended after {limit} s"
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            output += f"\n{time.perf_counter() - began:.0f} s"
            (options.logs / f"{check.name}.txt").write_text(output, encoding="utf-8")
        findings = []
        if found.exists():
            rows = json.loads(found.read_text(encoding="utf-8"))
            findings = [Finding(**each) for each in rows]
        if process.returncode or not found.exists():
            last = " | ".join(output.strip().splitlines()[-8:])
            findings.append(
                Finding(check.keys[0], check.name, last[-1500:] or "no output", passed=False)
            )
        return findings


def _report_child(name: str, path: Path, *, on_cpu: bool, whole: bool) -> NoReturn:
    """Run one check in this process, write its findings and end the process."""
    import importlib

    check = next(each for each in CHECKS if each.name == name)
    module, function = check.where.split(":")
    call = getattr(importlib.import_module(module), function)
    if check.trains:
        from tools.gpu.runs import Program

        with tempfile.TemporaryDirectory() as directory:
            found = call(Program(Path(directory), on_gpu=not on_cpu))
    else:
        import torch

        found = call(torch.device("cpu" if on_cpu else "cuda"))
    if on_cpu and not whole:  # what a CPU takes is of no use
        found = [each for each in found if not each.key.startswith("B")]
    path.write_text(json.dumps([asdict(each) for each in found]), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # As a run ends: the teardown of the interpreter may abort in a thread of a reduction.
    os._exit(0)


def _noted(check: Check, found: list[Finding], seconds: float) -> list[Finding]:
    """Print one line about a check that has ended; return its findings."""
    differ = sum(each.passed is False for each in found)
    keys = ", ".join(check.keys)
    print(f"{seconds:5.0f} s  {check.name} ({keys}): {len(found)} findings, {differ} differ",
          flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
