"""`execute`: runs of a study on warm workers, each finished run at once in the table.

A worker is a process of one thread that has imported the program once and trains one run after the
other, all replicas of a run in turns (`training.one_process`). Workers end with their parent, also
when that is killed.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from megatron_muloco.errors import ConfigError
from tools.bench.provenance import commit
from tools.sweeps.runs import Run, Runs
from tools.sweeps.search import Search
from tools.sweeps.study import Study
from tools.sweeps.table import Outcome, ResultTable
from tools.sweeps.training import train_run

__all__ = ["execute", "finished_now"]

_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_RECYCLE = 40  # runs after which a worker is replaced, so that no leak can add up


def execute(
    study: Study,
    table: ResultTable,
    *,
    workers: int,
    slices: tuple[str, ...] = (),
    deadline: float = math.inf,
) -> int:
    """Train everything that is missing and return the number of runs made.

    Args:
        study: The study.
        table: Its table, which grows by a row as soon as a run ends.
        workers: Processes at a time.
        slices: Names of slices; all if empty.
        deadline: Time (`time.monotonic`) after which no run is started.

    Raises:
        ConfigError: A run failed; the message has what it said. Finished runs are in the table.
    """
    runs = Runs(study)
    search = Search(study, runs)
    with table.writing(), _Pool(workers, study) as pool:
        done = 0
        progress = _Progress(search, slices)
        try:
            while True:
                missing = search.missing(table.losses, slices)
                progress.update(table, missing, pool.busy)
                ready = [run for run in missing if run.key not in pool.busy]
                while ready and pool.has_idle and time.monotonic() < deadline:
                    pool.start(ready.pop(0))
                if not pool.busy:
                    return done
                for run, outcome in pool.finished():
                    table.add(run, outcome, commit(), finished_now())
                    progress.advance(run)
                    done += 1
        finally:
            progress.close()


def finished_now() -> str:
    """Return the time as the table has it, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---- processes -----------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: BaseProcess
    pipe: "Connection[Any, Any]"
    run: Run | None = None
    runs_made: int = 0


class _Pool:
    """Worker processes, started when they are first needed.

    Args:
        size: Largest number of processes.
        study: Study of all runs.
    """

    def __init__(self, size: int, study: Study) -> None:
        self._size, self._study = size, study
        self._workers: list[_Worker] = []
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            self._end(worker)

    @property
    def busy(self) -> set[str]:
        """Keys of the runs in work."""
        return {worker.run.key for worker in self._workers if worker.run is not None}

    @property
    def has_idle(self) -> bool:
        """Whether a run can start."""
        return len(self.busy) < self._size

    def start(self, run: Run) -> None:
        """Give a run to an idle worker."""
        worker = next((w for w in self._workers if w.run is None), None)
        if worker is not None and worker.runs_made >= _RECYCLE:
            self._end(worker)
            self._workers.remove(worker)
            worker = None
        if worker is None:
            worker = self._new()
            self._workers.append(worker)
        worker.run, worker.runs_made = run, worker.runs_made + 1
        worker.pipe.send(run)

    def finished(self) -> list[tuple[Run, Outcome]]:
        """Wait for at least one run and return those that have ended.

        Raises:
            ConfigError: A run failed, or its process was killed.
        """
        working = {worker.pipe: worker for worker in self._workers if worker.run is not None}
        outcomes = []
        for pipe in wait(list(working)):
            worker = working[pipe]  # type: ignore[index]
            run, worker.run = worker.run, None
            assert run is not None
            try:
                answer = worker.pipe.recv()
            except (EOFError, ConnectionError):
                worker.process.join()
                raise ConfigError(
                    f"the worker of run {run.key} ended with exit code {worker.process.exitcode}: "
                    "killed, perhaps for memory. Use fewer workers; finished runs are kept."
                ) from None
            if isinstance(answer, str):
                raise ConfigError(f"run {run.key} failed; its settings: {_set(run)}\n{answer}")
            outcomes.append((run, answer))
        return outcomes

    def _new(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_work, args=(there, self._study), daemon=True)
        kept = {name: os.environ.get(name) for name in _ENVIRONMENT}
        if not self._study.launch:
            os.environ.update(_ENVIRONMENT)  # read when the worker loads torch
        process.start()
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        there.close()
        return _Worker(process, here)

    def _end(self, worker: _Worker) -> None:
        worker.pipe.close()
        if worker.run is not None:
            worker.process.terminate()
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(pipe: "Connection[Any, Any]", study: Study) -> None:
    """Train every run that comes through the pipe; send back its outcome or a failure's text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to report
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(train_run(study, run))
        except Exception:  # noqa: BLE001 (the parent reports it, whatever it is)
            pipe.send(traceback.format_exc())


def _end_with(sentinel: int) -> None:
    """End this process at once when its parent is gone, whatever it is doing."""
    wait([sentinel])
    os._exit(1)


def _set(run: Run) -> str:
    return " ".join(f"'{text}'" for text in run.overrides)


# ---- progress ------------------------------------------------------------------------------------


class _Progress:
    """A bar over the estimated work of all known runs, with the time that is left.

    Runs that a search may still add are not known yet, so the total grows while it goes on.
    """

    def __init__(self, search: Search, slices: Sequence[str]) -> None:
        self._search, self._slices = search, tuple(slices)
        self._bar: tqdm[Any] = tqdm(
            total=0, unit="FLOP", unit_scale=True, dynamic_ncols=True, smoothing=0.1
        )

    def update(self, table: ResultTable, missing: list[Run], busy: set[str]) -> None:
        """Show the numbers of runs, and the work that is known."""
        waiting = len(self._search.waiting(table.losses, self._slices))
        self._bar.total = self._bar.n + sum(run.work for run in missing)
        later = f", {waiting} cells wait" if waiting else ""
        self._bar.set_description(f"{len(table.rows)} done, {len(missing)} known{later}")
        self._bar.refresh()

    def advance(self, run: Run) -> None:
        """Count a finished run."""
        self._bar.update(run.work)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
