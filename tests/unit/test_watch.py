"""The rank that others wait for is named; threads with one store play the ranks of a job."""

import threading
import time
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from megatron_muloco.errors import EXIT_LOST, CheckpointError, SyncError
from megatron_muloco.training import watch as module
from megatron_muloco.training.watch import Post, Watch, missing_ranks


def posts(*counts: dict[str, int], beat: int = 1, silent: tuple[int, ...] = ()) -> dict[int, Post]:
    return {
        rank: Post(rank, 1 if rank in silent else beat, f"step {rank}", f"host{rank}", started)
        for rank, started in enumerate(counts)
    }


def named(*counts: dict[str, int], silent: tuple[int, ...] = ()) -> list[str]:
    before, after = posts(*counts), posts(*counts, beat=3, silent=silent)
    return missing_ranks(before, after, len(counts))


def test_nobody_is_named_while_nobody_waits() -> None:
    assert named({"outer/0": 4}, {"outer/0": 4}) == []


def test_a_living_rank_that_has_not_arrived_is_named_with_its_group() -> None:
    (line,) = named({"outer/0": 5}, {"outer/0": 4}, {"outer/0": 5})
    assert line == "rank 1 (host1): alive, in step 1, not arrived in outer [0, 1, 2]"


def test_a_silent_rank_is_named() -> None:
    (line,) = named({"outer/0": 5}, {"outer/0": 4}, silent=(1,))
    assert line.startswith("rank 1 (host1): silent, so frozen or dead; last in step 1")


def test_a_rank_that_waits_for_another_one_is_not_the_cause() -> None:
    """0 waits for 2 over replicas, 2 waits for 3 inside its replica."""
    lines = named(
        {"outer/0": 5, "tp/0": 9},
        {"outer/1": 4, "tp/0": 9},
        {"outer/0": 4, "tp/2": 8},
        {"outer/1": 4, "tp/2": 7},
    )
    assert [line.split()[1] for line in lines] == ["3"]


def test_a_rank_that_never_posted_is_named() -> None:
    before, after = posts({"a/0": 1}), posts({"a/0": 1}, beat=2)
    (line,) = missing_ranks(before, after, 2)
    assert line.startswith("rank 1: has posted nothing yet")


# ---- threads as ranks --------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # a rank that ends is a thread that does
)


class Ended(SystemExit):
    """In place of the end of the process; a thread ends quietly by it."""


class Group:
    """Counts collectives, as torch's groups do."""

    def __init__(self) -> None:
        self.count = 0

    def _get_sequence_number_for_group(self) -> int:
        return self.count


class Job:
    """Watches of several ranks around one store."""

    def __init__(self, world: int, limit: float) -> None:
        store = HashStore()
        self.groups = [Group() for _ in range(world)]
        self.watches = [Watch() for _ in range(world)]
        for rank, (watch, group) in enumerate(zip(self.watches, self.groups, strict=True)):
            watch.join(store, rank, world, limit=limit, control=limit)
            watch.follow({"outer group": (range(world), group)})
            watch.enter("inner step 7")

    def ended(self, rank: int) -> bool:
        thread = self.watches[rank]._thread
        thread.join(20.0)
        return not thread.is_alive()

    def close(self) -> None:
        for watch in self.watches:
            watch.close()


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which ranks would have ended."""
    found: list[int] = []

    def end(code: int) -> None:
        found.append(code)
        raise Ended

    monkeypatch.setattr(module, "_end", end)
    return found


def test_a_rank_that_does_not_arrive_ends_all_with_one_code(
    codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(3, limit=1.0)
    job.groups[0].count = job.groups[2].count = 1
    assert all(job.ended(rank) for rank in range(3))
    said = capsys.readouterr().err
    assert set(codes) == {EXIT_LOST}
    assert "alive, in inner step 7, not arrived in outer group [0, 1, 2]" in said
    assert "[rank 2] stack of thread MainThread" in said


def test_long_work_without_a_waiting_rank_is_no_fault(codes: list[int]) -> None:
    job = Job(2, limit=0.3)
    time.sleep(1.0)
    job.close()
    assert all(job.ended(rank) for rank in range(2))
    assert codes == []


def test_the_first_error_decides_the_code_and_is_named_by_the_others(
    codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(3, limit=3.0)
    assert job.watches[1].verdict(CheckpointError("tensors differ"), 2) == 2
    assert job.watches[0].verdict(RuntimeError("connection closed"), 1) == 2
    assert job.ended(2)  # it is in no collective, so nothing else would tell it
    job.close()
    assert codes == [2]
    said = capsys.readouterr().err
    assert "[rank 0] rank 1 ended the job first: CheckpointError: tensors differ" in said
    assert "[rank 2] rank 1 ended the job first: CheckpointError: tensors differ" in said


def test_an_error_of_a_collective_without_a_missing_rank_keeps_its_code() -> None:
    job = Job(2, limit=1.0)
    try:
        assert job.watches[0].verdict(SyncError("replicas disagree"), 1) == 1
    finally:
        job.close()


def test_a_store_that_does_not_answer_is_the_first_rank_s(
    codes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    class Frozen:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: threading.Event().wait(3.0)

    watch = Watch()
    watch.join(Frozen(), 1, 2, limit=0.6, control=0.6)
    watch._thread.join(20.0)
    assert codes == [EXIT_LOST]
    assert "rank 0: the job's rendezvous store, which it holds, does not answer" in (
        capsys.readouterr().err
    )


def test_a_job_that_is_never_joined_ends(codes: list[int]) -> None:
    watch = Watch(start_limit=0.1)
    watch.start()
    watch._thread.join(20.0)
    assert codes == [EXIT_LOST]


def test_the_end_of_the_launcher_is_told_once() -> None:
    told: list[int] = []
    watch = Watch(lambda: True, lambda: told.append(1))
    watch.start()
    time.sleep(2.5)
    watch.close()
    assert told == [1]
