"""`InterruptTrials`: Ctrl-C on the terminal of a real `deepspeed` command, at seeded moments.

A trial starts the command on a pseudo-terminal. When a rank has reached the drawn point, Ctrl-C is
written to the terminal, as a keyboard would. The command has to end with 85 and a checkpoint, or
with 0 if the run was done, without a stack trace and in a few lines, and the command that its last
line names has to be the one that was started. Then the run is resumed, in warm processes, and has
to end in the undisturbed state.
"""

import fcntl
import os
import pty
import random
import re
import select
import shlex
import signal
import struct
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import yaml

from tests.chaos.faults import CLOCK, JOB_VARIABLE, NAN_VARIABLE, Fault, to_environment
from tests.chaos.points import ROOT, processes_of
from tests.chaos.runs import (
    ChaosRun,
    UndisturbedRuns,
    draw_run,
    final_state,
    latest_step,
    undisturbed,
)
from tests.support.ports import held_port

__all__ = ["InterruptTrials", "draw_interrupt"]

RUNS = 40
MOST_RANKS = 2
MOST_LINES = 10  # of a stopped run after Ctrl-C, with those of the launchers
LONGEST_START = 900.0  # seconds
_SCHEDULED = re.compile(r"\] (step \d+: validation loss|saved )")
COLUMNS = 300  # of the terminal, so that the last line is one line

# Moment -> points of it.
MOMENTS: dict[str, tuple[str, ...]] = {
    "start-up": (CLOCK, "start"),
    "step": ("step",),
    "outer step": ("launch", "apply"),
    "save": ("save", "write tensor", "publish", "latest"),
    "end": ("flush", "final anchor"),
}


def draw_interrupt(seed: int, prefix: str) -> tuple[ChaosRun, str, Fault]:
    """Draw run, moment and point of a seed; five seeds in a row have all moments."""
    rng = random.Random(f"interrupt {seed}")
    moment = [*MOMENTS][seed % len(MOMENTS)]
    while True:
        run = draw_run(rng.randrange(RUNS), prefix)
        points = [p for p in MOMENTS[moment] if p == CLOCK or run.counts[p]]
        if run.world <= MOST_RANKS and points:
            break
    point = rng.choice(points)
    if point == CLOCK:
        return run, moment, Fault("Ctrl-C", 0, CLOCK, seconds=round(rng.uniform(0.5, 8.0), 2))
    first = point in ("publish", "latest")
    rank = 0 if first else rng.randrange(run.world)
    seconds = round(rng.choice((0.0, 0.0, rng.uniform(0.0, 0.2))), 3)
    return run, moment, Fault("Ctrl-C", rank, point, rng.randint(1, run.counts[point]), seconds)


class InterruptTrials:
    """Makes trials by seed; undisturbed runs are kept for the trials that share them.

    Args:
        work: Directory for the files.
    """

    def __init__(self, work: Path) -> None:
        self._work, self._undisturbed = work, UndisturbedRuns(work)

    def __call__(self, seed: int) -> dict[str, object]:
        """Make the trial of a seed; return a line of the table."""
        run, moment, fault = draw_interrupt(seed, self._undisturbed.prefix)
        run = _patient(run)
        expected = self._undisturbed.state(run)
        directory = self._work / str(seed)
        (directory / "saved").mkdir(parents=True)
        config = directory / "run.yaml"
        config.write_text(yaml.safe_dump(run.located(directory).model_dump(mode="json")))
        began = time.monotonic()
        with held_port() as port:
            script = ROOT / "tests" / "chaos" / "pretrain.py"
            command = ["deepspeed", "--num_accelerators", str(run.world), f"--master_port={port}"]
            command += [str(script), "--config", str(config)]
            code, pressed, after = _interrupted(command, run, fault, directory / "start0")
        saved = latest_step(directory / "saved")
        done = final_state(directory / "saved", run.steps) is not None
        problems = _judge(code, pressed, after, saved, done, moment)
        named = re.search(r"go on with: +(.*)", after)
        if code == 85 and (named is None or shlex.split(named[1]) != command):
            problems.append("another command than the one that was started")
        undisturbed(run, directory)  # from the checkpoint on
        if final_state(directory / "saved", run.steps) != expected:
            problems.append("NOT THE UNDISTURBED STATE")
        return {
            "run": run.number,
            "drawn": run.words,
            "moment": moment,
            "point": str(fault),
            "pressed": "yes" if pressed else "no",
            "code": code,
            "saved": saved,
            "lines": len(_lines(after)),
            "result": "; ".join(problems) or "equal",
            "held": "no" if problems else "yes",
            "seconds": round(time.monotonic() - began, 1),
        }


def _patient(run: ChaosRun) -> ChaosRun:
    """Return the run with long limits: nothing hangs, and a loaded machine starts slowly."""
    limits = {"distributed_timeout_minutes": 5.0, "control_timeout_minutes": 10.0}
    training = run.config.training.model_copy(update=limits)
    return replace(run, config=run.config.model_copy(update={"training": training}))


def _judge(code: int, pressed: bool, after: str, saved: int, done: bool, moment: str) -> list[str]:
    """Return what broke the promise of a start that was interrupted."""
    problems = []
    if code != (0 if done else 85):
        problems.append(f"exit code {code}")
    if pressed and not done and not saved and moment != "start-up":
        problems.append("nothing saved")
    if "Traceback" in after:
        problems.append("a stack trace")
    # A run that was done anyway ends with its summary, as without Ctrl-C.
    if pressed and not done and len(_lines(after)) > MOST_LINES:
        problems.append(f"{len(_lines(after))} lines after Ctrl-C")
    return problems


def _lines(text: str) -> list[str]:
    """Return the lines that stay on a terminal: a carriage return begins a line again.

    The first one, on which Ctrl-C was pressed, does not count. Evaluations and saves that were due
    before the step to stop after are left out: they are lines of the schedule, not of the stop.
    """
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\n", "\n"))
    lines = [line.rpartition("\r")[2].strip() for line in plain.split("\n")[1:]]
    return [line for line in lines if line and line != "^C" and not _SCHEDULED.search(line)]


def _environment(job: Path, run: ChaosRun, fault: Fault) -> dict[str, str]:
    return {
        **os.environ,
        **to_environment([fault]),
        **({NAN_VARIABLE: f"{run.nan[0]} {run.nan[1]}"} if run.nan else {}),
        JOB_VARIABLE: str(job),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def _interrupted(
    command: list[str], run: ChaosRun, fault: Fault, job: Path
) -> tuple[int, bool, str]:
    """Start a command on a terminal and press Ctrl-C at the point.

    Returns:
        The exit code, whether Ctrl-C was pressed, and what the terminal showed after it.
    """
    job.mkdir()
    environment = _environment(job, run, fault)
    process, terminal = pty.fork()
    if process == 0:
        # As a terminal's child has it, also where this program runs in the background.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(job)
        os.execvpe(command[0], command, environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    shown, pressed_at = b"", -1
    deadline = time.monotonic() + LONGEST_START
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.02)[0]:
                try:
                    shown += os.read(terminal, 1 << 16)
                except OSError:  # nobody has the terminal open any more
                    break
            # Before the first line of the program, and after its last, Ctrl-C is the launchers'.
            if pressed_at < 0 and (job / "fired").exists() and _rank_is_in_front(terminal, process):
                pressed_at = len(shown)
                os.write(terminal, b"\x03")
    finally:
        (job / "output.txt").write_bytes(shown)
        for each in processes_of(job) if time.monotonic() >= deadline else []:
            each.kill()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(terminal)
    after = shown[pressed_at:].decode(errors="replace") if pressed_at >= 0 else ""
    return code, pressed_at >= 0, after


def _rank_is_in_front(terminal: int, process: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) not in (process, 0)
    except OSError:
        return False
