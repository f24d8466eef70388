"""`Course`: held-out loss of a run over tokens, time and bytes, and what data parallelism sends.

Bytes are those of the rank that sends most. Between replicas they are measured, by the run itself;
inside a replica they are the planner's, `planning.traffic`, as are those of data parallelism.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from megatron_muloco.config import RunConfig, derive
from megatron_muloco.config.derived import batch_schedule, smallest_topology, topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.console import method_name
from megatron_muloco.planning.traffic import traffic_plan
from tools.run_points import TRAINING_TAGS, RunPoints

__all__ = ["HELD_OUT", "Course", "courses_of", "data_parallel", "warnings_of"]

HELD_OUT = "lm loss validation"


def data_parallel(config: RunConfig) -> RunConfig:
    """Return the same run with data parallelism: one replica of all ranks, no outer step."""
    parallel = config.parallel.model_copy(update={"num_replicas": 1})
    return config.model_copy(update={"outer": NoOuter(kind="none"), "parallel": parallel})


@dataclass(frozen=True)
class Course:
    """The course of one run.

    Attributes:
        name: Name in tables and plots; no two courses of a comparison share one.
        run: Points and facts.
        config: Configuration of the run.
        world_size: Ranks of the run.
        compared_world: Ranks on which data parallelism is counted, the most of all compared runs.
    """

    name: str
    run: RunPoints
    config: RunConfig
    world_size: int
    compared_world: int = field(default=0)

    # ---- facts ------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The papers' name of the method."""
        return method_name(self.config)

    @property
    def is_data_parallel(self) -> bool:
        """Whether the run has no outer step."""
        return isinstance(self.config.outer, NoOuter)

    @property
    def ranks(self) -> int:
        """Ranks for which bytes are counted: for data parallelism those of the largest run."""
        return self.compared_world if self.is_data_parallel else self.world_size

    @property
    def last_step(self) -> int:
        """Inner step of the last training point or evaluation."""
        return max(self.run.last_step, self.losses[-1][0] if self.losses else 0)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Held-out loss by inner step."""
        return self.run.points.get(HELD_OUT, [])

    @property
    def training_losses(self) -> list[tuple[int, float]]:
        """Training loss by inner step."""
        return sorted(point for tag in TRAINING_TAGS for point in self.run.points.get(tag, []))

    @property
    def tokens_per_s(self) -> float | None:
        """Median of tokens per second of all replicas; ``None`` if not written."""
        speeds = [value for _, value in self.run.points.get("perf/tokens_per_s", [])]
        return float(np.median(speeds)) if speeds else None

    # ---- axes -------------------------------------------------------------------------------

    def tokens(self, step: float) -> float:
        """Tokens of all replicas up to an inner step."""
        samples = batch_schedule(self.config.training).consumed(int(step))
        return float(samples * self.config.model.seq_length)

    def seconds(self, step: float) -> float:
        """Training time up to an inner step, without evaluation and saving; nan if not written."""
        steps, times = self._clock
        if len(steps) == 1:
            return float("nan")
        if step > steps[-1]:  # the last line is a few steps before the end
            return times[-1] + (step - steps[-1]) * (times[-1] - times[-2]) / (
                steps[-1] - steps[-2]
            )
        return float(np.interp(step, steps, times))

    @cached_property
    def _clock(self) -> tuple[list[int], list[float]]:
        points = self.run.points.get("iteration-time", [])
        steps = [0, *(step for step, _ in points)]
        spent = [after - before for before, after in pairwise(steps)]
        times = [count * each for count, (_, each) in zip(spent, points, strict=True)]
        return steps, list(accumulate(times, initial=0.0))

    def outer_bytes(self, step: float) -> float:
        """Bytes that the writing rank sent to other replicas up to an inner step, as measured."""
        return sum(v for at, v in self.run.points.get("muloco/wire_bytes", []) if at <= step)

    def bytes_sent(self, step: float) -> float:
        """Bytes that a rank sent up to an inner step; nan if its layout cannot be planned."""
        return self.outer_bytes(step) + step * self._inner_bytes

    @cached_property
    def _inner_bytes(self) -> float:
        return _step_bytes(self.config, self.ranks)

    @cached_property
    def data_parallel_bytes(self) -> float:
        """Bytes of a step that data parallelism would send per rank on the same ranks."""
        return _step_bytes(data_parallel(self.config), self.ranks)

    # ---- losses -----------------------------------------------------------------------------

    def loss_at(self, amount: float, axis: Callable[[float], float]) -> float | None:
        """Return the held-out loss where an axis has reached an amount.

        Linear between the two evaluations around it; ``None`` outside of them.
        """
        xs = [axis(step) for step, _ in self.losses]
        if not xs or not xs[0] <= amount <= xs[-1]:
            return None
        return float(np.interp(amount, xs, [loss for _, loss in self.losses]))


def _step_bytes(config: RunConfig, world_size: int) -> float:
    """Return the planned bytes of a rank's inner step; nan where the world does not fit."""
    try:
        return float(traffic_plan(config, topology_of(config, world_size)).inner_step)
    except ConfigError:
        return float("nan")


# ---- reading -------------------------------------------------------------------------------------


def courses_of(runs: Sequence[tuple[Path, RunPoints]]) -> list[Course]:
    """Return the courses of runs that may be compared.

    Args:
        runs: Directory and points of each.

    Raises:
        ConfigError: A run has no held-out loss or no configuration, or two runs have other held-out
            data.
    """
    problems, courses = [], []
    for name, (directory, run) in zip(_names([path for path, _ in runs]), runs, strict=True):
        if HELD_OUT not in run.points:
            problems.append(
                f"{directory}: no `{HELD_OUT}` among its points, so there is nothing to compare. "
                "Set training.eval_interval and data.valid, and train again."
            )
        elif "config" not in run.facts:
            problems.append(
                f"{directory}: its points do not say which configuration they are of. The version "
                "that wrote them is too old to compare; train again."
            )
        else:
            config = RunConfig.model_validate(run.facts["config"])
            world = int(run.facts.get("world_size") or smallest_topology(config).world_size)
            courses.append(Course(name, run, config, world))
    problems += _other_held_out_data(courses)
    if problems:
        raise ConfigError(problems)
    most = max(course.world_size for course in courses)
    return [Course(c.name, c.run, c.config, c.world_size, most) for c in courses]


def _names(directories: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    parts = [_named(path.resolve()).parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("a run is given twice; name each of them once.")


def _named(path: Path) -> Path:
    """Return the directory that is named after the run: ``runs/a`` of ``runs/a/tensorboard``."""
    return path.parent if path.name == "tensorboard" else path


def _other_held_out_data(courses: Sequence[Course]) -> Iterator[str]:
    """Yield a problem for every run whose held-out loss is of other text than the first one's."""
    for course in courses[1:]:
        first = courses[0]
        for what, value in _held_out(course).items():
            before = _held_out(first)[what]
            if None not in (before, value) and before != value:
                yield (
                    f"{first.name} and {course.name} have another {what}, {before} and {value}. "
                    "Losses of different text or tokens cannot be compared; give runs of the same "
                    "data."
                )


def _held_out(course: Course) -> dict[str, object]:
    """Return what a held-out loss is of; ``None`` for what the run did not write."""
    config = course.config
    return {
        "data.valid": ", ".join(Path(source.path).name for source in config.data.valid),
        "data.tokenizer_type": config.data.tokenizer_type,
        "model.vocab_size": config.model.vocab_size,
        "model.seq_length": config.model.seq_length,
        "number of held-out tokens": course.run.facts.get("held_out_tokens"),
    }


def warnings_of(courses: Sequence[Course]) -> Iterator[str]:
    """Yield what makes a comparison less than equal, a sentence each."""
    for course in courses:
        yield from course.run.notes
        if "world_size" not in course.run.facts:
            yield (
                f"{course.name}: event files do not say on how many ranks it ran; its bytes are "
                f"those on {course.world_size}."
            )
        if course.is_data_parallel and course.world_size < course.ranks:
            yield (
                f"{course.name} ran on {course.world_size} of {course.ranks} ranks, so its time is "
                f"that of {course.world_size}, and its bytes are those it would send on "
                f"{course.ranks}."
            )
        wanted = derive(course.config).train_iters
        if course.last_step < wanted:
            yield (
                f"{course.name} ended at step {course.last_step:,} of {wanted:,}, before its "
                "learning rate had decayed."
            )
    yield from _differences(courses)


def _settings(course: Course) -> dict[str, object]:
    """Return what should be equal where methods are compared."""
    config = course.config
    return {
        "model": config.model,
        "data.train": [Path(source.path).name for source in config.data.train],
        "training.global_batch_size": config.training.global_batch_size,
        "number of steps": derive(config).train_iters,
        "training.eval_iters": config.training.eval_iters,
        "device": course.run.facts.get("device"),
    }


def _differences(courses: Sequence[Course]) -> Iterator[str]:
    first = courses[0]
    for what, value in _settings(first).items():
        others = [course.name for course in courses[1:] if _settings(course)[what] != value]
        if others:
            yield (
                f"{', '.join(others)}: another {what} than {first.name}, so the runs differ in "
                "more than the method."
            )
