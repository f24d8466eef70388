"""`run_trial`: one seeded trial through the real launcher, from its faults to its final state."""

import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from tests.chaos.faults import JOB_VARIABLE, NAN_VARIABLE, NEEDS_MOUNT, Fault, draw_faults
from tests.chaos.faults import to_environment as faults_to_environment
from tests.chaos.points import AWAY, BALLAST, ROOT, processes_of, saved_in
from tests.chaos.runs import (
    ChaosRun,
    State,
    UndisturbedRuns,
    draw_run,
    final_state,
    latest_step,
)
from tests.support.ports import held_port

__all__ = ["KillTrials", "Outcome", "Trial", "draw_trial", "run_trial"]

RUNS = 40  # trials draw from this many runs, so that few undisturbed runs are needed
LONGEST_START = 420.0  # seconds; the limits of the run are one and two minutes
GRACE_SECONDS = 25.0  # for processes that outlive the command
MOST_STARTS_AFTER = 3  # starts after the last fault
DISK_SIZE = "48m"


@dataclass(frozen=True)
class Trial:
    """What a seed means."""

    seed: int
    run: ChaosRun
    faults: list[Fault]


@dataclass
class Outcome:
    """What came of a trial.

    Attributes:
        problems: What broke a promise; empty for a trial that ended in the undisturbed state.
        codes: Exit code of each start.
        fired: For each fault whether its point was reached.
        steps: For each start the step of the latest checkpoint after it.
        seconds: Duration of the trial.
    """

    problems: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    fired: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def result(self) -> str:
        """Return ``equal``, or what went wrong."""
        return "; ".join(self.problems) or "equal"


def draw_trial(seed: int, prefix: str) -> Trial:
    """Draw a trial from its seed."""
    rng = random.Random(f"trial {seed}")
    run = draw_run(rng.randrange(RUNS), prefix)
    return Trial(seed, run, draw_faults(rng, run.world, run.counts))


def run_trial(trial: Trial, expected: State, directory: Path) -> Outcome:
    """Start the run again and again until it is done, each time with the next fault.

    Args:
        trial: The trial.
        expected: Final state of the undisturbed run.
        directory: New directory for its files.
    """
    began = time.monotonic()
    outcome = Outcome()
    saved = directory / "saved"
    saved.mkdir(parents=True)
    mounted = any(fault.act in NEEDS_MOUNT for fault in trial.faults) and _mount(saved)
    config = directory / "run.yaml"
    config.write_text(yaml.safe_dump(trial.run.located(directory).model_dump(mode="json")))
    try:
        for number in range(len(trial.faults) + MOST_STARTS_AFTER):
            fault = trial.faults[number] if number < len(trial.faults) else None
            _start(trial.run, config, fault, directory / f"start{number}", outcome)
            _repair(saved, mounted)
            outcome.steps.append(latest_step(saved))
            if final_state(saved, trial.run.steps) is not None:
                break
        _compare(final_state(saved, trial.run.steps), expected, outcome)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(saved)], check=False)
    outcome.seconds = time.monotonic() - began
    return outcome


def _start(run: ChaosRun, config: Path, fault: Fault | None, job: Path, outcome: Outcome) -> None:
    """Start the command once and note what it leaves behind."""
    job.mkdir()
    environment = os.environ | faults_to_environment([fault] if fault else [])
    environment |= {
        JOB_VARIABLE: str(job),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    if run.nan:
        environment[NAN_VARIABLE] = f"{run.nan[0]} {run.nan[1]}"
    launcher = ["deepspeed", "--num_accelerators", str(run.world)]
    saved = saved_in(job)
    script = ROOT / "tests" / "chaos" / "pretrain.py"
    with held_port() as port, (job / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [*launcher, f"--master_port={port}", str(script), "--config", str(config)],
            cwd=job,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(LONGEST_START)
            reached = latest_step(saved)
            is_done = final_state(saved, run.steps) is not None
            left = _left(job, GRACE_SECONDS)
            if left:
                outcome.problems.append(f"{job.name} left {len(left)} processes")
            if reached < run.steps and final_state(saved, run.steps) is not None:
                outcome.problems.append(f"ranks of {job.name} trained on without their launcher")
            # DeepSpeed's runner returns 0 when the launcher below it was killed, as the guide to
            # failures says; what counts then is the state.
            killed = fault is not None and fault.act == "kill launcher" and _has_fired(job)
            if process.returncode == 0 and not is_done and not killed:
                outcome.problems.append(f"{job.name} ended with 0 before it was done")
        except subprocess.TimeoutExpired:
            outcome.problems.append(f"{job.name} did not end in {LONGEST_START:g} s")
        finally:
            for each in processes_of(job):
                each.kill()
            code = process.wait()
    fired = _has_fired(job)
    outcome.codes.append(code)
    if fault is not None:
        outcome.fired.append(fired)
    if code not in (0, 85) and not fired:
        outcome.problems.append(f"{job.name} ended with {code} without a fault")


def _has_fired(job: Path) -> bool:
    return (job / "fired").exists()


def _left(job: Path, patience: float) -> list[psutil.Process]:
    """Return the processes of a start that are still there after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (found := processes_of(job)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _compare(found: State | None, expected: State, outcome: Outcome) -> None:
    if found is None:
        outcome.problems.append("not done")
    elif found != expected:
        keys = [key for key in expected if found.get(key) != expected[key]]
        outcome.problems.append(f"DIFFERENT STATE in {', '.join(keys)}")


# ---- disks ----


def _mount(directory: Path) -> bool:
    """Give a directory a small disk of its own; return False where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(directory)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _repair(saved: Path, mounted: bool) -> None:
    """Do what an operator would: free space, mount for writing, bring a lost directory back."""
    if mounted:
        subprocess.run(["mount", "-o", "remount,rw", str(saved)], check=False)
    (saved / BALLAST).unlink(missing_ok=True)
    away = saved.with_name(saved.name + AWAY)
    if away.exists():
        shutil.rmtree(saved, ignore_errors=True)
        away.rename(saved)


# ---- many trials ----


class KillTrials:
    """Makes trials by seed; undisturbed runs are kept for the trials that share them.

    Args:
        work: Directory for the files.
    """

    def __init__(self, work: Path) -> None:
        self._work, self._undisturbed = work, UndisturbedRuns(work)

    def __call__(self, seed: int) -> dict[str, object]:
        """Make the trial of a seed; return a line of the table."""
        trial = draw_trial(seed, self._undisturbed.prefix)
        outcome = run_trial(trial, self._undisturbed.state(trial.run), self._work / str(seed))
        return {
            "run": trial.run.number,
            "drawn": trial.run.words,
            "faults": " / ".join(map(str, trial.faults)),
            "acts": " / ".join(fault.act for fault in trial.faults),
            "points": " / ".join(fault.point for fault in trial.faults),
            "fired": " ".join("yes" if fired else "no" for fired in outcome.fired),
            "codes": " ".join(map(str, outcome.codes)),
            "steps": " ".join(map(str, outcome.steps)),
            "result": outcome.result,
            "held": "no" if outcome.problems else "yes",
            "seconds": round(outcome.seconds, 1),
        }

    def ranks(self, seed: int) -> int:
        """Return the number of ranks of a seed's run."""
        return draw_trial(seed, self._undisturbed.prefix).run.world
