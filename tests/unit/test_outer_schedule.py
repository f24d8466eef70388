"""The calendar of outer steps: every fragment once a round, never twice in flight."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.outer.schedule import Apply, Average, Launch, SyncSchedule


@dataclass(frozen=True)
class Lengths:
    """The steps of the first rounds; the last number goes on."""

    steps: tuple[int, ...]

    def __call__(self, round_index: int) -> int:
        return self.steps[min(round_index, len(self.steps)) - 1]


@st.composite
def schedules(draw: st.DrawFn) -> SyncSchedule:
    """Constant and changing intervals; no more fragments than steps where they change."""
    steps = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)))
    constant = len(steps) == 1
    return SyncSchedule(
        sync_interval=steps[0] if constant else Lengths(steps),
        train_iters=draw(st.integers(1, 50)),
        fragment_count=draw(st.integers(1, 6 if constant else min(6, *steps))),
        overlap_steps=draw(st.integers(0, min(steps) - 1)),
    )


def starts_of(schedule: SyncSchedule) -> list[int]:
    """S_1, S_2, ... in the run."""
    starts = [0]
    while starts[-1] < schedule.train_iters:
        starts.append(starts[-1] + schedule.steps_of_round(len(starts)))
    return starts[:-1]


def launch_steps(schedule: SyncSchedule, fragment: int) -> list[int]:
    steps = range(1, schedule.train_iters + 1)
    return [step for step in steps if Launch(fragment) in schedule.events(step)]


def test_one_fragment_without_overlap_syncs_after_every_interval() -> None:
    schedule = SyncSchedule(sync_interval=4, train_iters=9)
    calendar = {step: schedule.events(step) for step in range(1, 10)}
    assert {step: events for step, events in calendar.items() if events} == {
        4: (Launch(0), Apply(0, 4)),
        8: (Launch(0), Apply(0, 8)),
    }


def test_the_drawing_in_the_module() -> None:
    schedule = SyncSchedule(sync_interval=6, train_iters=9, fragment_count=3, overlap_steps=1)
    assert [schedule.events(step) for step in range(1, 10)] == [
        (),
        (Launch(0),),
        (Apply(0, 2),),
        (Launch(1),),
        (Apply(1, 4),),
        (Launch(2),),
        (Apply(2, 6),),
        (Launch(0),),
        (Apply(0, 8),),
    ]


def test_rounds_of_different_lengths_by_hand() -> None:
    schedule = SyncSchedule(Lengths((4, 6, 2)), train_iters=15, fragment_count=2, overlap_steps=1)
    # Rounds end after 4, 10, 12 and 14; the first fragment closes the first half of each.
    assert [launch_steps(schedule, i) for i in range(2)] == [[2, 7, 11, 13, 15], [4, 10, 12, 14]]
    assert [schedule.interval(t, 0) for t in launch_steps(schedule, 0)] == [2, 5, 4, 2, 2]
    assert [schedule.interval(t, 1) for t in launch_steps(schedule, 1)] == [4, 6, 2, 2]
    assert [schedule.repeats_interval(t, 1) for t in (4, 10, 12, 14)] == [False, False, False, True]
    assert schedule.flush_events() == (Apply(0, 15), Average(1))
    assert schedule.interval(15, 1) == 1  # what the average covers
    assert [schedule.round(step) for step in (0, 4, 5, 10, 11, 14, 15)] == [0, 1, 2, 2, 3, 4, 5]


def test_applies_come_before_launches() -> None:
    schedule = SyncSchedule(sync_interval=4, train_iters=8, fragment_count=2, overlap_steps=2)
    assert schedule.events(4) == (Apply(0, 2), Launch(1))


@given(
    interval=st.integers(1, 12),
    fragment_count=st.integers(1, 8),
    train_iters=st.integers(1, 50),
    data=st.data(),
)
def test_a_constant_interval_has_the_closed_form(
    interval: int, fragment_count: int, train_iters: int, data: st.DataObject
) -> None:
    tau = data.draw(st.integers(0, interval - 1))
    schedule = SyncSchedule(interval, train_iters, fragment_count, tau)
    same = SyncSchedule(lambda round_index: interval, train_iters, fragment_count, tau)
    offsets = [interval * (i + 1) // fragment_count % interval for i in range(fragment_count)]

    def launched(step: int) -> list[int]:
        return [i for i, o in enumerate(offsets) if step >= 1 and (step - o) % interval == 0]

    for step in range(1, train_iters + 1):
        launches = tuple(Launch(i) for i in launched(step))
        applies = tuple(Apply(i, step - tau) for i in launched(step - tau))
        expected = applies + launches if tau else launches + applies
        assert schedule.events(step) == same.events(step) == expected
    for step in range(2 * train_iters):  # the calendar goes on where the run ends
        assert schedule.round(step) == same.round(step) == -(-step // interval)
        assert schedule.ends_round(step) == (step > 0 and step % interval == 0)
        for i, offset in enumerate(offsets):
            latest = max(0, step - (step - offset) % interval)
            assert schedule.last_launch(step, i) == same.last_launch(step, i) == latest


@given(schedules())
def test_a_fragment_is_launched_once_in_every_round(schedule: SyncSchedule) -> None:
    starts, count = starts_of(schedule), schedule.fragment_count
    for fragment in range(count):
        steps = launch_steps(schedule, fragment)
        rounds = [schedule.round(step) for step in steps]
        assert rounds == list(range(1, len(steps) + 1))
        # every round that the run completes has its launch
        last = len(starts) if schedule.ends_round(schedule.train_iters) else len(starts) - 1
        assert len(steps) >= last
        for step, start, number in zip(steps, starts, rounds, strict=False):
            share = schedule.steps_of_round(number) * (fragment + 1) // count
            assert step == start + (share or schedule.steps_of_round(number))


@given(schedules())
def test_intervals_add_up_to_the_steps_before_the_last_launch(schedule: SyncSchedule) -> None:
    first_round = schedule.steps_of_round(1)
    for fragment in range(schedule.fragment_count):
        steps = launch_steps(schedule, fragment)
        intervals = [schedule.interval(step, fragment) for step in steps]
        assert min([1, *intervals]) == 1
        assert sum(intervals) == (steps or [0])[-1]
        full = [schedule.is_full_interval(step) for step in steps]
        assert full == [i > 0 or n == first_round for i, n in enumerate(intervals)]
        repeated = [schedule.repeats_interval(step, fragment) for step in steps]
        assert repeated == [i > 0 and n == intervals[i - 1] for i, n in enumerate(intervals)]


@given(schedules())
def test_rounds_follow_each_other_and_end_with_a_launch(schedule: SyncSchedule) -> None:
    last = schedule.fragment_count - 1
    for step in range(1, schedule.train_iters + 1):
        assert schedule.round(step + 1) == schedule.round(step) + schedule.ends_round(step)
        assert schedule.ends_round(step) == schedule.launches_at(step, last)


@given(schedules())
def test_the_fullest_moment_and_the_longest_gap_are_found(schedule: SyncSchedule) -> None:
    steps = range(1, schedule.train_iters + 1)
    assert schedule.most_in_flight() == max(len(schedule.in_flight(step)) for step in steps)
    end = starts_of(schedule)[-1] + schedule.steps_of_round(len(starts_of(schedule)))
    fragments = range(schedule.fragment_count)
    launches = [t for t in range(1, end + 1) if any(schedule.launches_at(t, i) for i in fragments)]
    gaps = [after - before for before, after in itertools.pairwise([0, *launches])]
    assert schedule.longest_gap() == max(gaps)


@given(schedules())
def test_every_launch_is_applied_once_and_on_time(schedule: SyncSchedule) -> None:
    open_since: dict[int, int] = {}
    for step in range(1, schedule.train_iters + 1):
        for event in schedule.events(step):
            if isinstance(event, Launch):
                assert event.fragment not in open_since
                open_since[event.fragment] = step
            else:
                assert open_since.pop(event.fragment) == event.launched_at
                assert step == event.launched_at + schedule.overlap_steps
        owed = {(apply.fragment, apply.launched_at) for apply in schedule.in_flight(step)}
        assert owed == set(open_since.items())
    flushed = [event for event in schedule.flush_events() if isinstance(event, Apply)]
    assert {(apply.fragment, apply.launched_at) for apply in flushed} == set(open_since.items())


@given(schedules())
def test_the_flush_averages_what_has_seen_inner_steps_since(schedule: SyncSchedule) -> None:
    averaged = [e.fragment for e in schedule.flush_events() if isinstance(e, Average)]
    for fragment in range(schedule.fragment_count):
        steps = launch_steps(schedule, fragment)
        assert schedule.last_launch(schedule.train_iters, fragment) == (steps or [0])[-1]
        assert (fragment in averaged) == ((steps or [0])[-1] < schedule.train_iters)


def test_the_flush_does_nothing_for_one_fragment_and_whole_rounds() -> None:
    # The 15B run: 36,330 = 1,211 * 30 steps.
    assert SyncSchedule(sync_interval=30, train_iters=36_330).flush_events() == ()


def test_rounds_are_counted_from_one() -> None:
    schedule = SyncSchedule(sync_interval=3, train_iters=9)
    assert [schedule.round(step) for step in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]


def test_a_round_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SyncSchedule(0, train_iters=8)
    with pytest.raises(ValueError, match="sync_interval is 0 in round 2"):
        SyncSchedule(Lengths((4, 0)), train_iters=8)
    assert SyncSchedule(Lengths((4, 4, 0)), train_iters=8).events(8)  # no such round in the run


def test_the_shortest_interval_of_a_fragment_bounds_the_overlap() -> None:
    # 12, 6 and 12 steps: the first fragment of two waits 9 steps, the second only 6.
    lengths = Lengths((12, 6, 12))
    SyncSchedule(lengths, train_iters=30, fragment_count=2, overlap_steps=5)
    with pytest.raises(ValueError, match=r"overlap_steps 6 is not in 0\.\.5"):
        SyncSchedule(lengths, train_iters=30, fragment_count=2, overlap_steps=6)
    SyncSchedule(lengths, train_iters=12, fragment_count=2, overlap_steps=6)  # ends before


@pytest.mark.parametrize("overlap_steps", [-1, 4, 5])
def test_an_overlap_that_outlasts_the_interval_is_refused(overlap_steps: int) -> None:
    with pytest.raises(ValueError, match=r"overlap_steps .* is not in 0\.\.3"):
        SyncSchedule(sync_interval=4, train_iters=8, overlap_steps=overlap_steps)
