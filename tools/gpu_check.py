#!/usr/bin/env python
"""Checks the program on a machine with one NVIDIA GPU, and measures it.

    python -m tools.gpu_check                       all checks, about four minutes
    python -m tools.gpu_check --only codecs parity  some of them
    python -m tools.gpu_check --rehearse            the checks themselves, on a CPU, at small sizes

Each check runs in a process of its own with a time limit, and a failure does not end the others.
Checks that train need the demo's data (`python -m tools.demo_corpus`). Exit code: 0 when nothing
failed, also on a machine without a GPU, where the checks are only listed; 1 otherwise.

Not covered: several GPUs, NCCL between ranks, models that fill a node.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.gpu.findings import Finding

__all__ = ["CHECKS", "Check", "main"]

ROOT = Path(__file__).resolve().parents[1]
SIDE_BY_SIDE = 5


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Its name on the command line.
        where: Module and function.
        limit: Seconds after which it is ended.
        timed: Whether it measures time, and so runs with nothing beside it.
        trains: Whether it starts the program, and so needs the demo's data.
    """

    name: str
    where: str
    limit: int
    timed: bool = False
    trains: bool = False


CHECKS = (
    Check("resume", "tools.gpu.runs:train_and_resume", 200, trains=True),
    Check("variants", "tools.gpu.runs:variants", 200, trains=True),
    Check("parity", "tools.gpu.runs:parity", 120, trains=True),
    Check("start_up", "tools.gpu.runs:start_up", 120, trains=True),
    Check("background", "tools.gpu.kernels:background", 90),
    Check("ceilings", "tools.gpu.kernels:ceilings", 60, timed=True),
    Check("newton_schulz", "tools.gpu.kernels:newton_schulz_check", 90, timed=True),
    Check("codecs", "tools.gpu.kernels:codecs", 90, timed=True),
    Check("attention", "tools.gpu.kernels:attention", 60, timed=True),
    Check("speed", "tools.gpu.runs:speed", 150, timed=True, trains=True),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print their findings; return the exit code."""
    options = _parse(arguments)
    if options.child:
        _report_child(options.child, options.json, rehearse=options.rehearse)
        return 0
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    if not options.rehearse and not _has_gpu():
        names = ", ".join(check.name for check in chosen)
        print(f"No NVIDIA GPU is visible here, so nothing was checked. Left out: {names}.")
        return 0
    if any(check.trains for check in chosen) and not (ROOT / "data/demo/train.bin").exists():
        print("data/demo is missing. Write it first: python -m tools.demo_corpus")
        return 1
    began = time.perf_counter()
    findings: dict[str, list[Finding]] = {}
    # Timed checks run last and alone; the others share the device.
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        running = {pool.submit(_run, each, options): each for each in chosen if not each.timed}
        for done in as_completed(running):
            findings[running[done].name] = _shown(running[done], done.result())
    for check in chosen:
        if check.timed:
            findings[check.name] = _shown(check, _run(check, options))
    if options.json:
        rows = {name: [asdict(each) for each in found] for name, found in findings.items()}
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [each for found in findings.values() for each in found if each.passed is False]
    count = sum(len(found) for found in findings.values())
    seconds = time.perf_counter() - began
    print(f"{count} findings, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0], allow_abbrev=False
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="checks to run")
    parser.add_argument("--json", type=Path, help="file for all findings")
    parser.add_argument("--logs", type=Path, help="directory for the output of the checks")
    parser.add_argument(
        "--rehearse", action="store_true", help="run the checks on a CPU, at small sizes"
    )
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(check: Check, options: argparse.Namespace) -> list[Finding]:
    """Run one check in a process group of its own; whatever goes wrong is a finding."""
    with tempfile.TemporaryDirectory() as directory:
        began, found = time.perf_counter(), Path(directory) / "found.json"
        command = [sys.executable, "-m", "tools.gpu_check", "--child", check.name]
        command += ["--json", str(found), *(["--rehearse"] * options.rehearse)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=check.limit * (4 if options.rehearse else 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nended after {check.limit} s"
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            output += f"\n{time.perf_counter() - began:.0f} s"
            (options.logs / f"{check.name}.txt").write_text(output, encoding="utf-8")
        if found.exists():
            return [Finding(**each) for each in json.loads(found.read_text(encoding="utf-8"))]
        last = " | ".join(output.strip().splitlines()[-8:])
        return [Finding(check.name, last[-1500:] or "no output", passed=False)]


def _report_child(name: str, path: Path, *, rehearse: bool) -> None:
    """Run one check in this process and write its findings."""
    import importlib

    check = next(each for each in CHECKS if each.name == name)
    module, function = check.where.split(":")
    call = getattr(importlib.import_module(module), function)
    if check.trains:
        from tools.gpu.runs import Program

        with tempfile.TemporaryDirectory() as directory:
            found = call(Program(Path(directory), on_gpu=not rehearse))
    else:
        import torch

        found = call(torch.device("cpu" if rehearse else "cuda"))
    path.write_text(json.dumps([asdict(each) for each in found]), encoding="utf-8")


def _shown(check: Check, found: list[Finding]) -> list[Finding]:
    """Print the findings of a check and return them."""
    verdicts = {True: "ok", False: "FAILED", None: "-"}
    for each in found:
        print(f"{check.name:14} {verdicts[each.passed]:6} {each.what}: {each.result}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
