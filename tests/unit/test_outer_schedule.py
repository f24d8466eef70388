"""The calendar of outer steps: every fragment once a round, never twice in flight."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.outer.schedule import Apply, Average, Launch, SyncSchedule


@st.composite
def schedules(draw: st.DrawFn) -> SyncSchedule:
    interval = draw(st.integers(1, 12))
    return SyncSchedule(
        sync_interval=interval,
        train_iters=draw(st.integers(1, 50)),
        fragment_count=draw(st.integers(1, 6)),
        overlap_steps=draw(st.integers(0, interval - 1)),
    )


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


def test_applies_come_before_launches() -> None:
    schedule = SyncSchedule(sync_interval=4, train_iters=8, fragment_count=2, overlap_steps=2)
    assert schedule.events(4) == (Apply(0, 2), Launch(1))


@given(schedules())
def test_a_fragment_is_launched_once_in_any_interval(schedule: SyncSchedule) -> None:
    for fragment in range(schedule.fragment_count):
        steps = launch_steps(schedule, fragment)
        if schedule.train_iters >= schedule.sync_interval:
            assert steps
            assert steps[0] <= schedule.sync_interval
        gaps = {later - earlier for earlier, later in itertools.pairwise(steps)}
        assert gaps <= {schedule.sync_interval}
        rounds = [schedule.round(step) for step in steps]
        assert len(set(rounds)) == len(rounds)


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


@pytest.mark.parametrize("overlap_steps", [-1, 4, 5])
def test_an_overlap_that_outlasts_the_interval_is_refused(overlap_steps: int) -> None:
    with pytest.raises(ValueError, match=r"overlap_steps .* is not in 0\.\.3"):
        SyncSchedule(sync_interval=4, train_iters=8, overlap_steps=overlap_steps)
