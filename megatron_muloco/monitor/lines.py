"""When a line is due, and which lines ride with which outer step: pure functions of the inner step.

Between outer steps replicas do not talk, so the losses of the steps at which a line is due wait and
travel together with the next launch. ``log_interval = 2``, launches after steps 5 and 10::

    step      1   2   3   4   5   6   7   8   9   10
    due           x       x       x       x       x
    launch                    L                   L
    carries                  2,4                6,8,10        3 slots in every launch

No torch here.
"""

from dataclasses import dataclass

from megatron_muloco.outer.schedule import SyncSchedule

__all__ = ["RIDERS_PER_LINE", "LineCalendar"]

RIDERS_PER_LINE = 3
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

    def rider_count(self) -> int:
        """Return how many numbers a replica sends along with every launch of the run."""
        return self.slots() * RIDERS_PER_LINE

    def slots(self) -> int:
        """Return how many lines may ride with one launch; the same for every launch of the run."""
        if self.schedule is None:
            return 0
        # A gap of g steps holds at most ceil(g / log_interval) due ones.
        return -(-self.schedule.longest_gap() // self.log_interval)
