"""When fragments are launched and applied: a pure function of the inner step.

Inner steps are counted from 1. Fragment ``i`` of ``P`` is launched every ``H`` steps at its offset
``floor(H * (i + 1) / P) mod H``, so the last fragment closes the round and the others are spread
evenly before it. Its result is applied ``tau`` steps later. ``H = 6, P = 3, tau = 1``::

    step         1    2    3    4    5    6    7    8    9   ...
    fragment 0        L    A                        L    A
    fragment 1                  L    A                          L
    fragment 2                            L    A
                 '------------ round 1 -----------'--- round 2

No torch here: tests, plans and drawings read the same function as the training loop.
"""

from dataclasses import dataclass

__all__ = ["Apply", "Average", "Launch", "SyncSchedule"]


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


@dataclass(frozen=True, slots=True)
class SyncSchedule:
    """The calendar of outer steps.

    Attributes:
        sync_interval: Inner steps between launches of the same fragment (H).
        train_iters: Inner steps of the whole run.
        fragment_count: Fragments (P).
        overlap_steps: Inner steps from a launch to its apply (tau); 0 blocks.
    """

    sync_interval: int
    train_iters: int
    fragment_count: int = 1
    overlap_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that describe no schedule; the config reports them with more words."""
        if min(self.sync_interval, self.train_iters, self.fragment_count) < 1:
            raise ValueError(
                f"sync_interval, train_iters and fragment_count are at least 1: {self}"
            )
        if not 0 <= self.overlap_steps < self.sync_interval:
            raise ValueError(
                f"overlap_steps {self.overlap_steps} is not in 0..{self.sync_interval - 1}: a "
                "fragment would be launched again before its last result is applied"
            )

    def offset(self, fragment: int) -> int:
        """Return the fragment's place in the interval, in ``[0, sync_interval)``.

        Source: torchft's streaming DiLoCo, which the MuLoCo experiments use; for one fragment it is
        0, so that the sync follows inner steps H, 2H, ....
        """
        return self.sync_interval * (fragment + 1) // self.fragment_count % self.sync_interval

    def round(self, step: int) -> int:
        """Return the round that inner step ``step`` belongs to, counted from 1 (0 for step 0)."""
        return -(-step // self.sync_interval)

    def launches_at(self, step: int, fragment: int) -> bool:
        """Return whether the fragment is launched after inner step ``step``."""
        return step >= 1 and (step - self.offset(fragment)) % self.sync_interval == 0

    def is_full_interval(self, launched_at: int) -> bool:
        """Return whether a launch covers ``sync_interval`` steps; first ones may cover fewer."""
        return launched_at >= self.sync_interval

    def last_launch(self, step: int, fragment: int) -> int:
        """Return the latest step up to ``step`` at which the fragment is launched, 0 if none."""
        latest = step - (step - self.offset(fragment)) % self.sync_interval
        return max(latest, 0)

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
