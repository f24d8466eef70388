"""`train_run`: one run of a study, in this process or by a launcher, and what it gave."""

import math
import shutil
import subprocess
import sys
import time

from megatron_muloco.errors import EXIT_NUMERICS, ConfigError
from tools.sweeps.runs import Run
from tools.sweeps.study import Study
from tools.sweeps.table import Outcome

__all__ = ["train_run"]

_TAIL = 0.1  # share of the steps whose mean is the training loss at the end
_SHOWN = 2000  # characters of a failed launch


def train_run(study: Study, run: Run) -> Outcome:
    """Train one run and return what it gave.

    Without ``launch`` in the study all replicas share this process. With it, the training program
    is started with that command, and its losses are read from its event files.

    A loss that is not finite, or a run that stops because of such values, is the outcome
    ``diverged``: an answer of the sweep, not a failure of it.

    Raises:
        ConfigError: The launched program failed; the end of what it said is in the message.
    """
    started = time.perf_counter()
    loss, test_loss, losses, wire_bytes = (_launched if study.launch else _here)(study, run)
    seconds = round(time.perf_counter() - started, 1)
    tail = losses[-max(1, int(_TAIL * len(losses))) :]
    train_loss = sum(tail) / len(tail) if tail else math.nan
    if not all(math.isfinite(value) for value in (loss, test_loss or 0.0)):
        return Outcome("diverged", seconds=seconds)
    return Outcome(
        "ok", loss, math.nan if test_loss is None else test_loss, train_loss, wire_bytes, seconds
    )


Measured = tuple[float, float | None, list[float], int]
"""Held-out loss, test loss, training losses, bytes."""


def _here(study: Study, run: Run) -> Measured:
    """Train all replicas in this process, on one core."""
    from megatron_muloco.runtime.distributed import silence_known_warnings

    silence_known_warnings()  # before Megatron is imported, which warns
    from megatron_muloco.config import load_config
    from megatron_muloco.errors import NumericsError, SyncError
    from megatron_muloco.training.one_process import run_in_one_process

    try:
        result = run_in_one_process(load_config(study.base, run.overrides), writes=False)
    except (NumericsError, SyncError):
        return math.nan, None, [], 0
    return result.held_out[run.steps], result.test_loss, result.losses, max(result.wire_bytes)


def _launched(study: Study, run: Run) -> Measured:
    """Start the training program, wait for it, and read its event files."""
    from tools.run_points import read_points

    events = study.table.with_name(f"{study.table.stem}.events") / run.key
    shutil.rmtree(events, ignore_errors=True)  # of a start that was killed
    events.mkdir(parents=True)
    command = [
        *study.launch, "--config", str(study.base),
        "--set", *run.overrides, f"monitor.dir={events}",
    ]  # fmt: skip
    if study.launch[0] == "python":
        command[0] = sys.executable
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr)[-_SHOWN:]
        if done.returncode == EXIT_NUMERICS or "SyncError" in said:
            return math.nan, None, [], 0
        raise ConfigError(
            f"run {run.key} ended with {done.returncode}: {' '.join(command)}\n{said}"
        )
    points = read_points(str(events))
    test = points.get("lm loss test")
    sent = points.get("muloco/wire_bytes", [])
    return (
        dict(points["lm loss validation"]).get(run.steps, math.nan),
        test[-1][1] if test else None,
        [value for _, value in points.get("lm loss", [])],
        round(sum(value for _, value in sent)),
    )
