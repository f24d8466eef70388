"""`SyncSchedule` and `LineCalendar`: outer events and log lines as functions of the inner step.

Inner steps and rounds are counted from 1. Round ``r`` has ``H_r`` inner steps and comes after
``S_r = H_1 + ... + H_(r-1)`` steps. Fragment ``i`` of ``P`` is launched after inner step
``S_r + floor(H_r * (i + 1) / P)`` and applied ``tau`` steps later: the last fragment is launched at
the end of the round, the others are spread evenly before it. ``H = 6, P = 3, tau = 1``::

    step         1    2    3    4    5    6    7    8    9   ...
    fragment 0        L    A                        L    A
    fragment 1                  L    A                          L
    fragment 2                            L    A
                 '------------ round 1 -----------'--- round 2

Replicas do not communicate between outer steps, so the losses of log lines wait for the next launch
and are sent with it; `LineCalendar` says which lines with which launch. The functions are pure and
import no torch: planner, tests and training loop use the same ones.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from megatron_muloco.config.outer import SynchronizedOuter

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
"""Inner steps of a round as a function of its number, which is counted from 1."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Start reducing a fragment's pseudogradient.

    Attributes:
        fragment: Index of the fragment.
    """

    fragment: int


@dataclass(frozen=True, slots=True)
class Apply:
    """Wait for a launched fragment, move its anchor and merge it into the local parameters.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
    """

    fragment: int
    launched_at: int


@dataclass(frozen=True, slots=True)
class Average:
    """Set a fragment to the plain mean of the local parameters (flush only).

    Attributes:
        fragment: Index of the fragment.
    """

    fragment: int


class _Round(NamedTuple):
    """One round.

    Attributes:
        number: r, counted from 1.
        start: S_r, inner steps before the round.
        steps: H_r, inner steps in the round.
    """

    number: int
    start: int
    steps: int

    def launch(self, fragment: int, count: int) -> int:
        """Return the step after which a fragment is launched, in ``start + 1 .. start + steps``.

        Source: for a constant interval, the same steps as in torchft's streaming DiLoCo, which the
        MuLoCo experiments use.
        """
        # With P > H the first fragments get the offset 0, which is the end of the previous round.
        # They take the last step instead, so that every round launches every fragment once.
        return self.start + (self.steps * (fragment + 1) // count or self.steps)


@dataclass(frozen=True, slots=True)
class SyncSchedule:
    """Launches and applies of a run as a pure function of the inner step.

    Invariant: every fragment is launched exactly once in every round, and is never in flight twice.

    Attributes:
        sync_interval: Inner steps of a round (H_r), a constant or a pure function of the round. A
            constant is also the number of steps between two launches of a fragment.
        train_iters: Inner steps of the whole run.
        fragment_count: Number of fragments (P).
        overlap_steps: Inner steps from a launch to its apply (tau); 0 blocks.
    """

    sync_interval: int | RoundLength
    train_iters: int
    fragment_count: int = 1
    overlap_steps: int = 0
    # S_1, S_2, ... up to the first that is not before train_iters.
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise `ValueError` for impossible numbers; config checks report them with their keys."""
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
        object.__setattr__(self, "_starts", tuple(starts))  # frozen: set once, here
        shortest = self._shortest_interval()
        if not 0 <= self.overlap_steps < shortest:
            raise ValueError(
                f"overlap_steps {self.overlap_steps} is not in 0..{shortest - 1}: a "
                "fragment would be launched again before its last result is applied"
            )

    @classmethod
    def from_config(cls, outer: SynchronizedOuter, train_iters: int) -> "SyncSchedule":
        """Return the schedule of a run's outer steps."""
        return cls(
            sync_interval=outer.sync_interval,
            train_iters=train_iters,
            fragment_count=outer.fragments.count,
            overlap_steps=outer.overlap_steps,
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
        """Return the round of a step >= 1. Rounds continue beyond ``train_iters``."""
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
        """Return all rounds of the run; the last one in full, even where the run ends inside it."""
        bounds = enumerate(pairwise(self._starts), 1)
        return [_Round(number, start, end - start) for number, (start, end) in bounds]

    # ---- launches ---------------------------------------------------------------------------

    def launches_at(self, step: int, fragment: int) -> bool:
        """Return whether the fragment is launched after inner step ``step``."""
        return step >= 1 and self._round_of(step).launch(fragment, self.fragment_count) == step

    def is_full_interval(self, launched_at: int) -> bool:
        """Return whether a launch covers a full interval; in round 1 it may cover fewer steps."""
        return launched_at >= self.steps_of_round(1)

    def last_launch(self, step: int, fragment: int) -> int:
        """Return the last step <= ``step`` after which the fragment is launched, 0 if none."""
        while step >= 1:  # at most two passes: every round has a launch
            current = self._round_of(step)
            launch = current.launch(fragment, self.fragment_count)
            if launch <= step:
                return launch
            step = current.start
        return 0

    def interval(self, launched_at: int, fragment: int) -> int:
        """Return the inner steps that a launch covers: since the previous launch, or the start."""
        return launched_at - self.last_launch(launched_at - 1, fragment)

    def repeats_interval(self, launched_at: int, fragment: int) -> bool:
        """Return whether a launch covers as many steps as the fragment's previous launch."""
        before = self.last_launch(launched_at - 1, fragment)
        return before > 0 and launched_at - before == self.interval(before, fragment)

    def longest_gap(self) -> int:
        """Return the largest number of inner steps between consecutive launches of any fragment."""
        gaps = (
            after - before
            for steps in {found.steps for found in self._rounds()}
            for before, after in pairwise(self._places(steps))
        )
        return max(gaps)

    def _places(self, steps: int) -> list[int]:
        """Return 0 and the launch steps within a round of ``steps`` inner steps, ascending."""
        count = self.fragment_count
        return sorted({0, *(_Round(1, 0, steps).launch(i, count) for i in range(count))})

    def _shortest_interval(self) -> int:
        """Return the smallest number of inner steps between two launches of the same fragment.

        The round lengths are included in the minimum, so the result is H for a constant interval,
        also in a run too short for two launches.
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
        """Return the events due after inner step ``step``, in the order in which they must happen.

        With overlap, applies come before launches. Without overlap, launches come before applies,
        since each apply uses the result of a launch of the same step.
        """
        if not 1 <= step <= self.train_iters:
            raise ValueError(f"inner step {step} is not in 1..{self.train_iters}")
        fragments = range(self.fragment_count)
        sent_at = step - self.overlap_steps
        launches = tuple(Launch(i) for i in fragments if self.launches_at(step, i))
        applies = tuple(Apply(i, sent_at) for i in fragments if self.launches_at(sent_at, i))
        # Every event enters collectives of its replica and of its outer group, so all ranks of all
        # replicas must see one order; it is a function of the step alone. With overlap, applying
        # first ends the old reductions before new ones start: fewer buffers in flight, and a
        # replica that restarts at a launch gets the newest anchor. Without overlap, all launches of
        # the step start before the first wait, so that their transfers overlap each other.
        return applies + launches if self.overlap_steps else launches + applies

    def steps_with_events(self) -> tuple[int, ...]:
        """Return the inner steps that are followed by a launch or an apply, ascending."""
        launches = {
            found.launch(fragment, self.fragment_count)
            for found in self._rounds()
            for fragment in range(self.fragment_count)
        }
        steps = launches | {step + self.overlap_steps for step in launches}
        return tuple(sorted(step for step in steps if step <= self.train_iters))

    def most_in_flight(self) -> int:
        """Return the largest number of fragments that are in flight at once during the run."""
        before, seen, most = 0, set[tuple[int, int]](), 0
        for now in self._rounds():
            # tau is shorter than a round, so a launch stays in flight into the next round at most:
            # the lengths of two consecutive rounds decide, and equal pairs are counted once.
            if (before, now.steps) not in seen:
                seen.add((before, now.steps))
                launches = {now.launch(i, self.fragment_count) for i in range(self.fragment_count)}
                within = [step for step in launches if step <= self.train_iters]
                most = max([most, *(len(self.in_flight(step)) for step in within)])
            before = now.steps
        return most

    def in_flight(self, step: int) -> tuple[Apply, ...]:
        """Return the applies still to come after the events of ``step``, oldest launch first."""
        owed = [
            Apply(i, launched_at)
            for i in range(self.fragment_count)
            if (launched_at := self.last_launch(step, i))
            and launched_at + self.overlap_steps > step
        ]
        return tuple(sorted(owed, key=lambda apply: (apply.launched_at, apply.fragment)))

    def flush_events(self) -> tuple[Apply | Average, ...]:
        """Return the events after the last inner step that leave all replicas with one anchor.

        Fragments in flight are applied. Then every fragment with inner steps after its last launch
        is averaged. With one fragment and ``train_iters`` a multiple of H nothing is averaged.
        """
        end = self.train_iters
        stale = [i for i in range(self.fragment_count) if self.last_launch(end, i) < end]
        return self.in_flight(end) + tuple(Average(i) for i in stale)


# ---- log lines -----------------------------------------------------------------------------------

VALUES_PER_LINE = 4
"""Numbers that a replica sends for one line: loss, gradient norm, skipped steps, time of a step."""


@dataclass(frozen=True, slots=True)
class LineCalendar:
    """Steps at which a log line is due, and the launch that carries each line.

    ``log_interval = 2``, launches after steps 5 and 10::

        step      1   2   3   4   5   6   7   8   9   10
        due           x       x       x       x       x
        launch                    L                   L
        carries                  2,4                6,8,10        3 slots in every launch

    All launches carry the same number of slots, unused ones as zeros: metadata has one size.

    Attributes:
        log_interval: Inner steps between lines.
        schedule: Schedule of outer steps; ``None`` without outer steps.
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
        """Return the steps whose lines are sent with the launches after ``launch_step``.

        These are the due steps since the previous launch of any fragment.
        """
        previous = launch_step - 1
        while previous > 0 and not self.launches(previous):
            previous -= 1
        return tuple(step for step in range(previous + 1, launch_step + 1) if self.due(step))

    def value_count(self) -> int:
        """Return the count of numbers that a replica sends for lines with every launch."""
        return self.slots() * VALUES_PER_LINE

    def slots(self) -> int:
        """Return the number of lines that a launch can carry; the same for every launch."""
        if self.schedule is None:
            return 0
        # A gap of g steps contains at most ceil(g / log_interval) due steps.
        return -(-self.schedule.longest_gap() // self.log_interval)
