"""When fragments are launched and applied: a pure function of the inner step.

Inner steps and rounds are counted from 1. Round ``r`` has ``H_r`` inner steps and follows
``S_r = H_1 + ... + H_(r-1)``. In it fragment ``i`` of ``P`` is launched after step
``S_r + floor(H_r * (i + 1) / P)``, so the last fragment closes the round and the others are spread
evenly before it. Its result is applied ``tau`` steps later. ``H = 6, P = 3, tau = 1``::

    step         1    2    3    4    5    6    7    8    9   ...
    fragment 0        L    A                        L    A
    fragment 1                  L    A                          L
    fragment 2                            L    A
                 '------------ round 1 -----------'--- round 2

No torch here: tests, plans and drawings read the same function as the training loop.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "VALUES_PER_LINE",
    "Apply",
    "Average",
    "Launch",
    "LineCalendar",
    "RoundLength",
    "SyncSchedule",
]

RoundLength = Callable[[int], int]
"""The inner steps of a round as a function of its number, which is counted from 1."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Start reducing a fragment's pseudogradient."""

    fragment: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Use the result of the launch that was made after inner step ``launched_at``."""

    fragment: int
    launched_at: int


@dataclass(frozen=True, slots=True)
class Average:
    """Take the plain mean of a fragment's local parameters (flush only)."""

    fragment: int


class _Round(NamedTuple):
    """A round: its number, the inner steps before it (S_r) and those in it (H_r)."""

    number: int
    start: int
    steps: int

    def launch(self, fragment: int, count: int) -> int:
        """Return the step after which a fragment is launched, in ``start + 1 .. start + steps``.

        Source: torchft's streaming DiLoCo, which the MuLoCo experiments use, has the same places
        for a constant interval. With more fragments than steps some share the last one.
        """
        return self.start + (self.steps * (fragment + 1) // count or self.steps)


@dataclass(frozen=True, slots=True)
class SyncSchedule:
    """The calendar of outer steps.

    Invariant: every fragment is launched once in every round, and never twice in flight.

    Attributes:
        sync_interval: Inner steps of a round (H_r), constant or a pure function of the round; a
            constant is also what lies between two launches of a fragment.
        train_iters: Inner steps of the whole run.
        fragment_count: Fragments (P).
        overlap_steps: Inner steps from a launch to its apply (tau); 0 blocks.
    """

    sync_interval: int | RoundLength
    train_iters: int
    fragment_count: int = 1
    overlap_steps: int = 0
    # S_1, S_2, ... up to the first that is not before train_iters.
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that describe no schedule; the config reports them with more words."""
        if min(self.steps_of_round(1), self.train_iters, self.fragment_count) < 1:
            raise ValueError(
                f"sync_interval, train_iters and fragment_count are at least 1: {self}"
            )
        starts = [0]
        while starts[-1] < self.train_iters:
            steps = self.steps_of_round(len(starts))
            if steps < 1:
                raise ValueError(f"sync_interval is {steps} in round {len(starts)}: {self}")
            starts.append(starts[-1] + steps)
        object.__setattr__(self, "_starts", tuple(starts))
        shortest = self._shortest_interval()
        if not 0 <= self.overlap_steps < shortest:
            raise ValueError(
                f"overlap_steps {self.overlap_steps} is not in 0..{shortest - 1}: a "
                "fragment would be launched again before its last result is applied"
            )

    # ---- rounds -----------------------------------------------------------------------------

    def steps_of_round(self, round_index: int) -> int:
        """Return H_r, the inner steps of a round."""
        interval = self.sync_interval
        return interval(round_index) if callable(interval) else interval

    def round(self, step: int) -> int:
        """Return the round that inner step ``step`` belongs to, counted from 1 (0 for step 0)."""
        return self._round_of(step).number if step > 0 else 0

    def ends_round(self, step: int) -> bool:
        """Return whether a round ends with inner step ``step``."""
        if step < 1:
            return False
        found = self._round_of(step)
        return found.start + found.steps == step

    def _round_of(self, step: int) -> _Round:
        """Return the round of a step from 1 on; beyond ``train_iters`` the rounds just go on."""
        following = bisect_left(self._starts, step)
        if following < len(self._starts):
            start = self._starts[following - 1]
            return _Round(following, start, self._starts[following] - start)
        found = _Round(following, self._starts[-1], self.steps_of_round(following))
        while found.start + found.steps < step:
            after = found.number + 1
            found = _Round(after, found.start + found.steps, self.steps_of_round(after))
        return found

    def _rounds(self) -> list[_Round]:
        """Return the rounds up to the one that ``train_iters`` is in, which is there as a whole."""
        bounds = enumerate(pairwise(self._starts), 1)
        return [_Round(number, start, end - start) for number, (start, end) in bounds]

    # ---- launches ---------------------------------------------------------------------------

    def launches_at(self, step: int, fragment: int) -> bool:
        """Return whether the fragment is launched after inner step ``step``."""
        return step >= 1 and self._round_of(step).launch(fragment, self.fragment_count) == step

    def is_full_interval(self, launched_at: int) -> bool:
        """Return whether a launch covers a whole interval; first ones may cover a part of H_1."""
        return launched_at >= self.steps_of_round(1)

    def last_launch(self, step: int, fragment: int) -> int:
        """Return the latest step up to ``step`` at which the fragment is launched, 0 if none."""
        while step >= 1:  # at most twice
            current = self._round_of(step)
            launch = current.launch(fragment, self.fragment_count)
            if launch <= step:
                return launch
            step = current.start
        return 0

    def interval(self, launched_at: int, fragment: int) -> int:
        """Return the inner steps that a launch covers: since the one before, or the beginning."""
        return launched_at - self.last_launch(launched_at - 1, fragment)

    def repeats_interval(self, launched_at: int, fragment: int) -> bool:
        """Return whether a launch covers as many steps as the fragment's launch before it."""
        before = self.last_launch(launched_at - 1, fragment)
        return before > 0 and launched_at - before == self.interval(before, fragment)

    def longest_gap(self) -> int:
        """Return the most inner steps between two launches of whatever fragments."""
        gaps = (
            after - before
            for steps in {found.steps for found in self._rounds()}
            for before, after in pairwise(self._places(steps))
        )
        return max(gaps)

    def _places(self, steps: int) -> list[int]:
        """Return 0 and the places of launches in a round of ``steps`` inner steps, ascending."""
        count = self.fragment_count
        return sorted({0, *(_Round(1, 0, steps).launch(i, count) for i in range(count))})

    def _shortest_interval(self) -> int:
        """Return the fewest inner steps from a launch to the next one of the same fragment.

        The lengths of rounds count as well, so that it is H where H is constant, also in a run
        that is too short for two launches.
        """
        rounds, count = self._rounds(), self.fragment_count
        between = [
            _Round(2, before, after).launch(i, count) - _Round(1, 0, before).launch(i, count)
            for before, after in {(one.steps, two.steps) for one, two in pairwise(rounds)}
            for i in range(count)
        ]
        return min(between + [found.steps for found in rounds])

    # ---- events -----------------------------------------------------------------------------

    def events(self, step: int) -> tuple[Launch | Apply, ...]:
        """Return what is due after inner step ``step``, in the order in which it must happen.

        Applies come before launches, so that a launch sees the parameters that the applies left.
        Without overlap a launch is followed by its own apply, and all launches of the step are
        started before the first result is waited for.
        """
        if not 1 <= step <= self.train_iters:
            raise ValueError(f"inner step {step} is not in 1..{self.train_iters}")
        fragments = range(self.fragment_count)
        sent_at = step - self.overlap_steps
        launches = tuple(Launch(i) for i in fragments if self.launches_at(step, i))
        applies = tuple(Apply(i, sent_at) for i in fragments if self.launches_at(sent_at, i))
        return applies + launches if self.overlap_steps else launches + applies

    def most_in_flight(self) -> int:
        """Return how many fragments are under way at once in the run, at most."""
        before, seen, most = 0, set[tuple[int, int]](), 0
        for now in self._rounds():
            if (before, now.steps) not in seen:  # a launch reaches into the next round at most
                seen.add((before, now.steps))
                launches = {now.launch(i, self.fragment_count) for i in range(self.fragment_count)}
                within = [step for step in launches if step <= self.train_iters]
                most = max([most, *(len(self.in_flight(step)) for step in within)])
            before = now.steps
        return most

    def in_flight(self, step: int) -> tuple[Apply, ...]:
        """Return the applies still owed after the events of ``step``, oldest launch first."""
        owed = [
            Apply(i, launched_at)
            for i in range(self.fragment_count)
            if (launched_at := self.last_launch(step, i))
            and launched_at + self.overlap_steps > step
        ]
        return tuple(sorted(owed, key=lambda apply: (apply.launched_at, apply.fragment)))

    def flush_events(self) -> tuple[Apply | Average, ...]:
        """Return what brings all replicas together after the last inner step of the run.

        Fragments in flight are applied; then every fragment that saw inner steps after its last
        launch is averaged. With one fragment and H dividing ``train_iters`` nothing is averaged.
        """
        end = self.train_iters
        stale = [i for i in range(self.fragment_count) if self.last_launch(end, i) < end]
        return self.in_flight(end) + tuple(Average(i) for i in stale)


# ------------------------------------------------------------------------------------------
# When a line is due, and which lines ride with which outer step: pure functions of the inner step.
#
# Between outer steps replicas do not talk, so the losses of the steps at which a line is due wait
# and travel together with the next launch. ``log_interval = 2``, launches after steps 5 and 10::
#
#     step      1   2   3   4   5   6   7   8   9   10
#     due           x       x       x       x       x
#     launch                    L                   L
#     carries                  2,4                6,8,10        3 slots in every launch
#
# No torch here.


VALUES_PER_LINE = 3
"""Loss, gradient norm and skipped steps of a replica."""


@dataclass(frozen=True, slots=True)
class LineCalendar:
    """The calendar of console lines and training points.

    Attributes:
        log_interval: Inner steps between lines.
        schedule: Outer steps; ``None`` without.
    """

    log_interval: int
    schedule: SyncSchedule | None = None

    def due(self, step: int) -> bool:
        """Return whether inner step ``step`` ends with a line."""
        return step % self.log_interval == 0

    def launches(self, step: int) -> bool:
        """Return whether some fragment is launched after inner step ``step``."""
        schedule = self.schedule
        return schedule is not None and any(
            schedule.launches_at(step, fragment) for fragment in range(schedule.fragment_count)
        )

    def carried(self, launch_step: int) -> tuple[int, ...]:
        """Return the steps whose lines ride with the launches after ``launch_step``.

        They are the due ones after the previous launch, of whatever fragment.
        """
        previous = launch_step - 1
        while previous > 0 and not self.launches(previous):
            previous -= 1
        return tuple(step for step in range(previous + 1, launch_step + 1) if self.due(step))

    def value_count(self) -> int:
        """Return how many numbers a replica sends along with every launch of the run."""
        return self.slots() * VALUES_PER_LINE

    def slots(self) -> int:
        """Return how many lines may ride with one launch; the same for every launch of the run."""
        if self.schedule is None:
            return 0
        # A gap of g steps holds at most ceil(g / log_interval) due ones.
        return -(-self.schedule.longest_gap() // self.log_interval)
