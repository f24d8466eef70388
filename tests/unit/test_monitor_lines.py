"""Which lines are due, and which ride with which launch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.outer.schedule import VALUES_PER_LINE, Launch, LineCalendar, SyncSchedule


@st.composite
def calendars(draw):
    rounds = draw(st.lists(st.integers(1, 24), min_size=4, max_size=4))
    changing = draw(st.booleans())
    interval = (lambda r: rounds[min(r, 4) - 1]) if changing else rounds[0]
    shortest = min(rounds) if changing else interval
    schedule = SyncSchedule(
        sync_interval=interval,
        train_iters=sum(rounds) if changing else 4 * interval,
        fragment_count=draw(st.integers(1, shortest if changing else 8)),
        overlap_steps=draw(st.integers(0, shortest - 1)),
    )
    return LineCalendar(draw(st.integers(1, 30)), schedule)


@given(calendars())
def test_every_due_line_rides_with_exactly_one_launch_step_in_order(calendar):
    end = calendar.schedule.train_iters  # the end of a round, so the last step launches
    carried = [
        step for launch in range(1, end + 1) if calendar.launches(launch)
        for step in calendar.carried(launch)
    ]  # fmt: skip
    assert carried == [step for step in range(1, end + 1) if calendar.due(step)]


@given(calendars())
def test_no_launch_carries_more_lines_than_there_are_slots(calendar):
    for step in range(1, calendar.schedule.train_iters + 1):
        if calendar.launches(step):
            assert len(calendar.carried(step)) <= calendar.slots()


@given(calendars())
def test_launches_are_those_of_the_schedule(calendar):
    schedule = calendar.schedule
    for step in range(1, schedule.train_iters + 1):
        launched = any(isinstance(event, Launch) for event in schedule.events(step))
        assert calendar.launches(step) == launched


@pytest.mark.parametrize(
    ("interval", "fragments", "log_interval", "slots"),
    [(30, 1, 10, 3), (30, 1, 7, 5), (30, 3, 10, 1), (30, 1, 100, 1), (1, 1, 1, 1)],
)
def test_slots_by_hand(interval, fragments, log_interval, slots):
    calendar = LineCalendar(log_interval, SyncSchedule(interval, 10 * interval, fragments))
    assert calendar.slots() == slots
    assert calendar.value_count() == slots * VALUES_PER_LINE


def test_without_an_outer_step_nothing_rides():
    calendar = LineCalendar(2)
    assert (calendar.slots(), calendar.value_count(), calendar.launches(4)) == (0, 0, False)
