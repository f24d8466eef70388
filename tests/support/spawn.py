"""Runs a function on several ranks from an ordinary test: ``run_ranks(fn, world_size, *args)``.

    def reduce_my_rank(scale: int) -> float:          # module level: it is pickled by reference
        total = torch.tensor(float(dist.get_rank() * scale))
        dist.all_reduce(total)
        return total.item()

    def test_all_reduce() -> None:
        assert run_ranks(reduce_my_rank, 4, 10) == [60.0] * 4

Ranks are processes of a pool that lives as long as the test session: started by ``spawn`` when
first needed, kept warm, replaced when they fail. In each, ``torch.distributed`` and
``deepspeed.comm`` are initialised on gloo for one call. Functions are pickled by module and name,
so they belong at the top level of a test module (``tests`` is a package and the repository root is
on ``sys.path``); ``functools.partial`` of such a function works too, a lambda does not.
"""

import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.rank_worker import STACK_DUMP_SIGNAL, Call, Report, serve

MAX_RANKS = 16  # `make test` stays at 8; the full matrix has four replicas of tp 2 x pp 2
START_TIMEOUT_S = 180.0  # importing torch and DeepSpeed eight times on two loaded cores
TIDY_TIMEOUT_S = 20.0  # destroying process groups after a call
GRACE_S = 1.0  # after the first failure: time for the other ranks to report theirs


class RankFailure(AssertionError):
    """At least one rank raised, died or hung; the message holds its number and its traceback."""


class Worker:
    """One process of the pool. It is idle after it sent ``ready``, until a call is sent to it."""

    def __init__(self, stack_dir: Path, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.stack_file = stack_dir / f"worker{number}.txt"
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, self.stack_file), name=f"rank worker {number}", daemon=True
        )
        self.process.start()
        theirs.close()

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Return whether the worker became ready for a call within the limit."""
        try:
            return self.connection.poll(timeout_s) and self.connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            return False

    def stack(self) -> str:
        """Return the stacks of all threads of a process that may be stuck inside a collective."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, STACK_DUMP_SIGNAL)
            time.sleep(0.3)  # the dump is written by the signal handler of the other process
        return self.stack_file.read_text() if self.stack_file.exists() else ""

    def end(self) -> None:
        """Stop the process at once."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Warm workers and the rendezvous store of their process groups."""

    def __init__(self) -> None:
        from torch.distributed import TCPStore

        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[Worker] = []
        self._numbers = itertools.count()
        # Port 0: the operating system picks a free port, and the store keeps it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._calls = itertools.count()

    def call(
        self, fn: Callable[..., Any], world_size: int, args: Sequence[Any], timeout_s: float
    ) -> list[Any]:
        """Run ``fn(*args)`` on ``world_size`` ranks; see `run_ranks`."""
        target = _pickled(fn, args)
        workers = self._take(world_size)
        prefix = f"call{next(self._calls)}"
        try:
            for rank, worker in enumerate(workers):
                call = Call(rank, world_size, self._store.port, prefix, timeout_s, target)
                worker.connection.send_bytes(pickle.dumps(call))
            reports = _collect(workers, timeout_s)
            kept = [w for w in workers if w.wait_until_ready(TIDY_TIMEOUT_S)]
            self._replace([w for w in workers if w not in kept])
        except BaseException:  # also an interrupt: half-finished ranks must not serve another call
            self._replace(workers)
            raise
        return [pickle.loads(report.value) for report in reports]

    def close(self) -> None:
        """End all workers."""
        self._replace(list(self._workers))
        self._directory.cleanup()

    def _take(self, world_size: int) -> list[Worker]:
        fresh = [
            Worker(Path(self._directory.name), next(self._numbers))
            for _ in range(world_size - len(self._workers))
        ]
        self._workers += fresh
        deadline = time.monotonic() + START_TIMEOUT_S
        for worker in fresh:
            if not worker.wait_until_ready(deadline - time.monotonic()):
                stack = worker.stack()
                self._replace(fresh)
                raise RankFailure(f"a rank worker did not start in {START_TIMEOUT_S:g} s\n{stack}")
        return self._workers[:world_size]

    def _replace(self, workers: Sequence[Worker]) -> None:
        """End these workers; the next call that needs as many ranks starts others."""
        for worker in workers:
            self._workers.remove(worker)
            worker.end()


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Return what ``fn(*args)`` returned on each of ``world_size`` gloo ranks, in rank order.

    Args:
        fn: Module-level function (or a partial of one) of a test module.
        world_size: Ranks, at most 16.
        args: The same picklable arguments for every rank.
        timeout_s: Limit for the slowest rank, from the moment all processes are up.

    Raises:
        RankFailure: A rank raised, exited, was killed, or did not finish. The message starts with
            the number and the traceback of the rank that failed first; after a time-out it holds
            every rank's stack.
    """
    if not 1 <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size {world_size} is not in 1..{MAX_RANKS}")
    return _session_pool().call(fn, world_size, args, timeout_s)


def shutdown() -> None:
    """End the session's workers, if any were started."""
    if _session_pool.cache_info().currsize:
        _session_pool().close()
        _session_pool.cache_clear()


@cache
def _session_pool() -> Pool:
    return Pool()


def _pickled(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    try:
        return pickle.dumps((fn, tuple(args)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"run_ranks cannot send {fn!r} and its arguments to another process: {error}. "
            "Rank functions are defined at the top level of a test module."
        ) from error


def _collect(workers: Sequence[Worker], timeout_s: float) -> list[Report]:
    """Return every rank's report; raise about the earliest failure as soon as one is known."""
    reports: dict[int, Report] = {}
    deadline = time.monotonic() + timeout_s
    while len(reports) < len(workers):
        waiting = {w.connection: rank for rank, w in enumerate(workers) if rank not in reports}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            reports[rank] = _receive(workers[rank])
            if reports[rank].failure:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not ready:
            break
    failed = {rank: report for rank, report in reports.items() if report.failure}
    if failed:
        raise RankFailure(_failure_message(failed, len(workers)))
    if len(reports) < len(workers):
        raise RankFailure(_timeout_message(workers, reports, timeout_s))
    return [reports[rank] for rank in range(len(workers))]


def _receive(worker: Worker) -> Report:
    try:
        report = pickle.loads(worker.connection.recv_bytes())
        assert isinstance(report, Report)
        return report
    except (EOFError, OSError):
        failed_at = time.monotonic()
        worker.process.join(timeout=5)
        return Report(
            failure=f"the process ended with exit code {worker.process.exitcode}\n{worker.stack()}",
            # Peers notice a lost connection before this process is collected: it failed first.
            failed_at=failed_at - GRACE_S,
        )


def _failure_message(failed: dict[int, Report], world_size: int) -> str:
    first = min(failed, key=lambda rank: failed[rank].failed_at)
    others = sorted(rank for rank in failed if rank != first)
    also = f" (ranks {', '.join(map(str, others))} failed after it)" if others else ""
    return f"rank {first} of {world_size} failed{also}\n{failed[first].failure}"


def _timeout_message(
    workers: Sequence[Worker], reports: dict[int, Report], timeout_s: float
) -> str:
    hung = [rank for rank in range(len(workers)) if rank not in reports]
    lines = [f"ranks {hung} of {len(workers)} did not finish in {timeout_s:g} s; their stacks:"]
    lines += [f"--- rank {rank} ---\n{workers[rank].stack()}" for rank in hung]
    return "\n".join(lines)
