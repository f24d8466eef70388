"""The time left, on a clock that is stepped: right within 10 % after a tenth of any run."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from megatron_muloco.monitor.throughput import TimeLeft
from megatron_muloco.outer.schedule import SyncSchedule


@dataclass(frozen=True)
class Run:
    """A run whose parts take known times, in seconds."""

    steps: int = 250
    schedule: SyncSchedule | None = None
    inner: float = 1.0
    first: float = 1.0  # the first inner step: kernels are compiled
    outer: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0
    eval_interval: int = 0
    save_interval: int = 0
    ramp_until: int = 0  # steps with half the samples, and half the time

    def samples(self, step: int) -> int:
        return 16 * step - 8 * min(step, self.ramp_until)

    def outer_steps(self) -> Sequence[int]:
        return () if self.schedule is None else self.schedule.steps_with_events()

    def estimates(self) -> tuple[dict[int, float | None], dict[int, float]]:
        """Return the estimate and the truth after every inner step."""
        left = TimeLeft(
            self.steps,
            self.samples,
            outer_steps=self.outer_steps(),
            intervals={"evaluation": self.eval_interval, "save": self.save_interval},
        )
        events = set(self.outer_steps())
        estimates: dict[int, float | None] = {}
        reached: dict[int, float] = {}
        training = wall = 0.0
        if self.eval_interval:
            left.pause("evaluation", self.evaluation)
        for step in range(1, self.steps + 1):
            share = (self.samples(step) - self.samples(step - 1)) / 16
            took = self.first if step == 1 else self.inner * share
            training, wall = training + took, wall + took
            estimates[step], reached[step] = left.step(step, training), wall
            if step in events:
                training, wall = training + self.outer, wall + self.outer
            for kind, interval, seconds in (
                ("evaluation", self.eval_interval, self.evaluation),
                ("save", self.save_interval, self.save),
            ):
                if interval and (step % interval == 0 or step == self.steps):
                    left.pause(kind, seconds)
                    wall += seconds
        return estimates, {step: wall - at for step, at in reached.items()}


RUNS = {
    "steps alone": Run(),
    "a slow first step": Run(first=100.0),
    "outer steps longer than rounds": Run(schedule=SyncSchedule(10, 250), outer=20.0),
    "a tenth inside a round": Run(120, SyncSchedule(8, 120), outer=8.0),
    "every step an outer step": Run(schedule=SyncSchedule(1, 250), outer=3.0),
    "fragments with overlap": Run(
        240, SyncSchedule(24, 240, fragment_count=4, overlap_steps=2), outer=2.0
    ),
    "rare long evaluations": Run(eval_interval=50, evaluation=30.0),
    "evaluations and saves": Run(
        1000, SyncSchedule(30, 1000), outer=4.0, eval_interval=100, evaluation=40.0,
        save_interval=50, save=20.0,
    ),
    "a batch that grows": Run(ramp_until=100, schedule=SyncSchedule(10, 250), outer=5.0),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_right_from_a_tenth_of_the_run_on(name: str) -> None:
    run = RUNS[name]
    estimates, truth = run.estimates()
    for step in range(run.steps // 10, run.steps):
        # Near the end a step and its outer step are a large part of what is left.
        grain = 0.0 if step == run.steps // 10 else run.inner + run.outer
        assert estimates[step] == pytest.approx(truth[step], rel=0.1, abs=grain), step
    assert estimates[1] is None


def test_a_mean_over_all_steps_would_be_wrong() -> None:
    run = RUNS["outer steps longer than rounds"]
    estimates, truth = run.estimates()
    step = run.steps // 10 - 6  # one outer step in nineteen steps
    plain = (step + 20.0) / step * (run.steps - step)
    assert abs(plain - truth[step]) > 0.1 * truth[step]
    assert estimates[step] == pytest.approx(truth[step])


def test_the_estimate_follows_a_change_of_speed() -> None:
    left = TimeLeft(10_000, lambda step: step)
    seconds, estimate = 0.0, None
    for step in range(1, 1_001):
        seconds += 1.0 if step <= 500 else 2.0
        estimate = left.step(step, seconds)
    assert estimate == pytest.approx(2.0 * 9_000)


@pytest.mark.parametrize(
    "schedule",
    [
        SyncSchedule(10, 95),
        SyncSchedule(12, 95, fragment_count=3, overlap_steps=2),
        SyncSchedule(4, 30, fragment_count=8, overlap_steps=1),
        SyncSchedule(lambda round_index: 3 + round_index, 60),
    ],
)
def test_the_steps_with_events_are_those_of_the_schedule(schedule: SyncSchedule) -> None:
    steps = range(1, schedule.train_iters + 1)
    assert schedule.steps_with_events() == tuple(step for step in steps if schedule.events(step))
