"""Replicas at different steps agree on the step to stop at; the real loop in threads, no ranks.

One thread is one replica. Threads run one at a time, and a seeded choice decides whose turn it is
at every access to the shared store and at every inner step, so that each example is one exact
interleaving and a hang is found by counting turns.
"""

import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_muloco.data.sampler import BatchLayout
from megatron_muloco.errors import CheckpointError, SyncError
from megatron_muloco.training import loop, stopping
from megatron_muloco.training.loop import Outcome
from megatron_muloco.training.stopping import StopAgreement, StopFile, StopRequest
from megatron_muloco.training.watch import Watch

LAST_STEP = 12
MOST_TURNS = 20_000  # a run takes some hundreds


class Deadlock(AssertionError):
    """Nobody can go on, or nobody gets anywhere."""


class Turns:
    """Lets one of several threads run at a time, chosen at random with unequal odds."""

    def __init__(self, count: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._odds = [self._random.choice([1, 1, 5, 50]) for _ in range(count)]
        self._waiting: dict[int, Callable[[], bool]] = {}
        self._gates = [threading.Semaphore(0) for _ in range(count)]
        self._alive = set(range(count))
        self._turns = 0
        self.failure: BaseException | None = None

    def run(self, bodies: list[Callable[[], Any]]) -> list[Any]:
        """Run all bodies to their ends and return what they returned."""
        results: list[Any] = [None] * len(bodies)

        def play(index: int) -> None:
            try:
                self._gates[index].acquire()
                self._check()
                results[index] = bodies[index]()
            except BaseException as error:
                self.failure = self.failure or error
            self._alive.discard(index)
            self._next()

        threads = [threading.Thread(target=play, args=(i,)) for i in range(len(bodies))]
        self._waiting = {index: lambda: True for index in self._alive}
        for thread in threads:
            thread.start()
        self._next()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return results

    def wait(self, index: int, until: Callable[[], bool] = lambda: True) -> None:
        """Give up the turn; come back when chosen, not before ``until()`` holds."""
        self._waiting[index] = until
        self._next()
        self._gates[index].acquire()
        self._check()

    def _next(self) -> None:
        self._turns += 1
        able = [i for i in sorted(self._waiting) if self.failure or self._waiting[i]()]
        if (not able and self._alive) or (self._turns > MOST_TURNS and not self.failure):
            self.failure = Deadlock(f"after {self._turns} turns; alive: {self._alive}")
            able = sorted(self._waiting)
        if able:
            (chosen,) = self._random.choices(able, [self._odds[i] for i in able])
            del self._waiting[chosen]
            self._gates[chosen].release()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure


class Job:
    """K replicas of one rank each around the real loop: a shared store, meetings, counters."""

    def __init__(
        self,
        replicas: int,
        seed: int,
        *,
        sync_interval: int = 4,
        delay: int = 0,
        saves: int = 0,
        evaluations: int = 0,
        stepped: bool = False,
    ) -> None:
        self.turns = Turns(replicas, seed)
        self.replicas, self.sync_interval, self.delay = replicas, sync_interval, delay
        self.saves, self.evaluations, self.stepped = saves, evaluations, stepped
        self.values: dict[str, bytes] = {}
        self.steps = [0] * replicas
        self.arrivals: dict[Any, set[int]] = {}
        self.saved: dict[int, int] = {}
        self.stops = [StopRequest() for _ in range(replicas)]
        self.stalls_at = 0

    def run(self) -> list[Outcome]:
        """Return how every replica ended."""
        return self.turns.run(
            [
                lambda r=r: loop.train(self.context(r), self.stops[r])  # type: ignore[misc]
                for r in range(self.replicas)
            ]
        )

    def meet(self, replica: int, what: Any) -> None:
        """Wait for all replicas at ``what``."""
        here = self.arrivals.setdefault(what, set())
        here.add(replica)
        self.turns.wait(replica, lambda: len(here) == self.replicas)

    def context(self, replica: int) -> Any:
        """Return what `train` uses of a context."""
        optimizer = FakeOptimizer(self, replica)
        groups = SimpleNamespace(
            is_leader=True,
            on_last_stage=True,
            coords=SimpleNamespace(tp=0, cp=0),
            topology=SimpleNamespace(data=1, replica_size=1, pipeline=1),
        )
        config = SimpleNamespace(
            training=SimpleNamespace(eval_interval=self.evaluations, global_batch_size=1),
            checkpoint=SimpleNamespace(save_interval=self.saves, async_save=False),
            monitor=SimpleNamespace(sample_tokens=0),
        )
        return SimpleNamespace(
            config=config,
            derived=SimpleNamespace(train_iters=LAST_STEP, num_microbatches=1),
            groups=groups,
            model=SimpleNamespace(zero_grad_buffer=lambda: None),
            optimizer=optimizer,
            forward=lambda batches, count: torch.zeros(()),
            train_data=SimpleNamespace(
                microbatch=lambda step, index: None, layout=BatchLayout(1, 1, 1, 1)
            ),
            valid_data=None,
            test_data=None,
            profiler=None,
            monitor=FakeMonitor(),
            probe=None,
            store=FakeStore(self, replica),
            state=SimpleNamespace(
                scalars={}, groups=None, view=SimpleNamespace(shards=()), anchors=dict
            ),
            agreement=StopAgreement(
                SharedValues(self, replica), replica=replica, num_replicas=self.replicas
            ),
            first_step=1,
            stop_file=StopFile(None),
            watch=Watch(),
        )


class SharedValues:
    """A rendezvous store; other replicas may act before each access."""

    def __init__(self, job: Job, replica: int) -> None:
        self._job, self._replica = job, replica

    def set(self, key: str, value: str) -> None:
        self._job.turns.wait(self._replica)
        self._job.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._job.turns.wait(self._replica)
        return self._job.values[key]

    def check(self, keys: list[str]) -> bool:
        self._job.turns.wait(self._replica)
        return all(key in self._job.values for key in keys)


class FakeOptimizer:
    """Counts steps; its outer steps wait until all replicas have launched.

    A stepped reduction also waits half of the delay after the launch, and sends again there.
    """

    inner = None
    spikes = SimpleNamespace(watches_losses=False)
    advances = True

    def __init__(self, job: Job, replica: int) -> None:
        self._job, self._replica = job, replica
        self.schedule = None

    def zero_grad(self) -> None:
        pass

    def inner_step(self) -> Any:
        self._job.turns.wait(self._replica)
        self._job.steps[self._replica] += 1
        return SimpleNamespace(lr=0.0, grad_norm=0.0, skipped=False)

    def waits_after(self, step: int) -> bool:
        """Whether something is launched, in flight or applied after the step."""
        launched = step - step % self._job.sync_interval
        return launched > 0 and step <= launched + self._job.delay

    def outer_step(self, metadata: object) -> None:
        step, delay = self._job.steps[self._replica], self._job.delay
        launched = step - step % self._job.sync_interval
        half = launched + -(-delay // 2) if self._job.stepped else launched
        if launched and step == launched + delay:
            self._wait_for(half)
        elif launched and step == half and self._job.stepped:
            self._wait_for(launched)

    def stalled(self) -> str:
        """Return the reason of the stop that all replicas know after the apply of a step."""
        return "too few replicas" if self._job.steps[self._replica] == self._job.stalls_at else ""

    def _wait_for(self, step: int) -> None:
        self._job.turns.wait(self._replica, lambda: min(self._job.steps) >= step)

    def flush(self) -> None:
        self._job.meet(self._replica, "flush")


class FakeStore:
    """Saves together."""

    directory = stopping  # never looked at: `_save_final_anchor` is replaced

    def __init__(self, job: Job, replica: int) -> None:
        self._job, self._replica = job, replica

    def save(self, step: int, state: object, *, prune: bool) -> str:
        self._job.meet(self._replica, ("save", step))
        self._job.saved[step] = self._job.saved.get(step, 0) + 1
        return f"checkpoint {step}"

    failures = 0

    def poll(self) -> None:
        """Every save is done when it returns."""

    def wait(self) -> bool:
        return True

    def standing(self) -> str:
        return ""

    def evaluate(self, step: int) -> None:
        """Meet the other replicas, among which the forward passes are divided."""
        self._job.meet(self._replica, ("evaluate", step))


class FakeMonitor:
    """Listens."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None

    def paused(self, kind: str = "") -> Any:
        return nullcontext()


@pytest.fixture(autouse=True, scope="module")
def _quick_loop() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping.time, "sleep", lambda seconds: None)
        patch.setattr(loop, "_save_final_anchor", lambda context, last_step: True)
        patch.setattr(loop, "_evaluate", lambda context, step: context.store.evaluate(step))
        patch.setattr(loop, "digests_of", lambda *args: {loop.ANCHOR: ""})
        patch.setattr(loop, "require_finite", lambda *args: None)
        yield


def request_at(job: Job, replica: int, step: int) -> None:
    """Deliver the signal to ``replica`` while it is at ``step``."""
    original = job.turns.wait

    def wait(index: int, until: Callable[[], bool] = lambda: True) -> None:
        original(index, until)
        if job.steps[replica] >= step:
            job.stops[replica].requested = True

    job.turns.wait = wait  # type: ignore[method-assign]


@given(
    replicas=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    step=st.integers(0, LAST_STEP),
    everyone=st.booleans(),
    sync_interval=st.sampled_from([1, 3, 4, 20]),
    delay=st.sampled_from([0, 0, 1, 2, 3]),
    saves=st.sampled_from([0, 1, 2, 5]),
    evaluations=st.sampled_from([0, 0, 2, 3]),
    stepped=st.booleans(),
)
@example(2, 0, LAST_STEP - 1, False, 20, 0, 0, 0, False)
def test_all_replicas_stop_at_the_same_step_and_nobody_hangs(
    replicas: int,
    seed: int,
    step: int,
    everyone: bool,
    sync_interval: int,
    delay: int,
    saves: int,
    evaluations: int,
    stepped: bool,
) -> None:
    job = Job(
        replicas,
        seed,
        sync_interval=sync_interval,
        delay=min(delay, sync_interval - 1),
        saves=saves,
        evaluations=evaluations,
        stepped=stepped,
    )
    for replica in range(replicas) if everyone else [seed % replicas]:
        request_at(job, replica, step)
    outcomes = job.run()
    assert len(set(job.steps)) == 1, job.steps
    assert len(set(outcomes)) == 1
    assert job.saved[job.steps[0]] == replicas, "the last step is saved by everybody, once"
    if outcomes[0] is Outcome.STOPPED:
        assert step < job.steps[0] < LAST_STEP
    else:
        assert (outcomes[0], job.steps[0]) == (Outcome.DONE, LAST_STEP)


def test_a_lone_replica_stops_one_step_after_the_request() -> None:
    job = Job(1, 0)
    request_at(job, 0, 5)
    assert job.run() == [Outcome.STOPPED]
    # Noted in step 5 or, after its loss was shared, in step 6; told to the ranks in the next.
    assert job.steps[0] in (6, 7)


def test_without_a_request_nobody_waits() -> None:
    job = Job(3, 1, sync_interval=3)
    assert job.run() == [Outcome.DONE] * 3
    assert job.saved == {LAST_STEP: 3}


@pytest.mark.parametrize("requested", [False, True])
def test_a_run_that_stalls_saves_once_and_stops_everywhere(requested: bool) -> None:
    job = Job(3, 4, sync_interval=3)
    job.stalls_at = 6
    if requested:  # while the others are on their way to the outer step of step 6
        request_at(job, 1, 5)
    assert job.run() == [Outcome.STALLED] * 3
    assert job.saved == {6: 3}


class Values:
    """A store of one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)


def test_a_replica_that_others_wait_for_trains_on_and_posts_again() -> None:
    values = Values()
    slow, fast = (StopAgreement(values, replica=r, num_replicas=2) for r in range(2))
    assert slow.decide(4) is None
    fast.announce(8)
    slow.request()
    assert [slow.decide(step) for step in (5, 6, 7)] == [None] * 3
    slow.announce(8)
    assert fast.decide(8) == 9
    assert slow.decide(8) == 9


def test_replicas_that_never_post_are_named_after_the_limit() -> None:
    values = Values()
    agreements = [StopAgreement(values, replica=r, num_replicas=3, limit=0.0) for r in range(3)]
    agreements[0].request()
    agreements[2].announce(4)
    assert agreements[0].decide(3) is None, "it is awaited, so it does not wait"
    with pytest.raises(SyncError, match=r"replicas \[1, 2\] have not said within 0 s"):
        agreements[0].decide(4)


def test_a_failed_periodic_save_is_tried_again_and_a_failed_last_one_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_until(step: int) -> Job:
        job = Job(2, 2, saves=5)
        original = FakeStore.save

        def save(self: FakeStore, at: int, state: object, *, prune: bool) -> str:
            path = original(self, at, state, prune=prune)
            if at < step:
                raise CheckpointError("no space left")
            return path

        monkeypatch.setattr(FakeStore, "save", save)
        return job

    assert full_until(6).run() == [Outcome.DONE] * 2
    assert full_until(LAST_STEP + 1).run() == [Outcome.SAVE_FAILED] * 2
    stopped = full_until(LAST_STEP + 1)
    request_at(stopped, 1, 6)
    assert stopped.run() == [Outcome.SAVE_FAILED] * 2
    assert stopped.steps[0] < LAST_STEP
