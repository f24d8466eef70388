"""`Monitor`, which turns the metrics of inner and outer steps into console lines and points.

The training loop uses it like this::

    monitor.record(t, {"lm loss": ..., "learning-rate": ..., "grad-norm": ...})
    report = synchronizer.after_inner_step(t, monitor.line_values(t))
    if report is not None:
        monitor.outer_step(report)

With one replica a line is written when it is due. With more, lines wait for the next launch, which
sends the losses to the other replicas, and are written at its apply with the mean over replicas.
All ranks have a monitor and call the same methods, because every outer group sends line values; one
rank writes.

`Interval` collects the values of the steps between two lines, and `TrainingClock` the time without
evaluation and saving.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muloco.data.sampler import RunLayout
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.console import Console, EvaluationLine, RunSummary, TrainingLine
from megatron_muloco.monitor.diagnostics import peak_memory_gib
from megatron_muloco.monitor.metrics import METRICS, MetricTable
from megatron_muloco.monitor.throughput import ReplicaTimes, Speed, TimeLeft, measure_speed
from megatron_muloco.monitor.writers import PointWriter
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.outer.schedule import VALUES_PER_LINE, LineCalendar

__all__ = [
    "SAMPLE_TAG",
    "DueLine",
    "Interval",
    "Monitor",
    "RunFacts",
    "TrainingClock",
    "Value",
    "floats",
]


# ---- values between two lines --------------------------------------------------------------------

Value = Tensor | float
"""A number, or a 0-dim tensor that may be on an accelerator; read only when a line is written."""


@dataclass(frozen=True, slots=True)
class DueLine:
    """A due line with this replica's values, before those of the other replicas are known.

    Attributes:
        step: Inner step.
        values: Values on this rank by tag.
        skipped: Steps that this replica skipped since the last line.
        speed: Speed since the last line.
    """

    step: int
    values: Mapping[str, Value]
    skipped: Value
    speed: Speed

    def shared(self) -> tuple[Value, Value, Value]:
        """Return the values averaged over replicas: loss, gradient norm and skipped steps."""
        return self.values["lm loss"], self.values.get("grad-norm", math.nan), self.skipped

    def sent(self) -> tuple[Value, ...]:
        """Return the values that are sent to the other replicas, `VALUES_PER_LINE` of them."""
        return *self.shared(), self.values.get("perf/replica_step_ms", math.nan)


class Interval:
    """Collects per-step metrics between two lines: means or last values, as the registry says.

    Args:
        metrics: Table of the metrics.
    """

    def __init__(self, metrics: MetricTable = METRICS) -> None:
        self._metrics = metrics
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Value] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, Value] = {}
        self._skipped: Value = 0.0

    def add(self, values: Mapping[str, Value]) -> None:
        """Add the values of one inner step.

        Raises:
            RuntimeMismatch: A tag is not in the registry, or its metric belongs to events.
        """
        for tag, value in values.items():
            rule = self._metrics[tag].over_steps
            if rule == "event":
                raise RuntimeMismatch(
                    f"metric {tag!r} is written at events, not recorded with every inner step. Use "
                    "Monitor.scalars for it."
                )
            own = value.detach() if isinstance(value, Tensor) else value
            if rule == "mean":
                self._sums[tag] = self._sums.get(tag, 0.0) + own
                self._counts[tag] = self._counts.get(tag, 0) + 1
            else:
                # Cloned, because it may be a buffer that the next step overwrites. A sum is a new
                # tensor anyway.
                self._last[tag] = own.clone() if isinstance(own, Tensor) else own
        if "skipped" in values:
            self._skipped = self._skipped + values["skipped"]
        elif "grad-norm" in values:
            self._skipped = self._skipped + _not_finite(values["grad-norm"])

    def take(self) -> tuple[dict[str, Value], Value]:
        """Return the values and the number of skipped steps since the last call, and reset."""
        values = {tag: total / self._counts[tag] for tag, total in self._sums.items()}
        values |= self._last
        skipped = self._skipped
        self._clear()
        return values, skipped


def _not_finite(value: Value) -> Value:
    if isinstance(value, Tensor):
        return (~torch.isfinite(value.detach())).float()
    return 0.0 if math.isfinite(value) else 1.0


def floats(values: Iterable[Value]) -> list[float]:
    """Return plain numbers, with one transfer to the host for all tensors."""
    given: Sequence[Value] = list(values)
    tensors = [value for value in given if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in given]
    device = tensors[-1].device
    read = iter(torch.stack([t.detach().to(device).double().reshape(()) for t in tensors]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in given]


class TrainingClock:
    """Training time: seconds since construction, without those inside `paused`.

    Args:
        now: Monotonic time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._started = now()
        self._paused_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Training time so far, in seconds."""
        return self._now() - self._started - self._paused_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context; must not be nested."""
        began = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - began


# ---- the monitor ---------------------------------------------------------------------------------

SAMPLE_TAG = "run/sample"

# Tags of the values that were not averaged over the replicas, so that no curve mixes the two.
_TAGS_OF_REPLICA_0 = {"lm loss": "lm loss replica 0", "grad-norm": "grad-norm replica 0"}

# Chosen: replicas on equal machines differ by less, and a round takes a quarter longer from here.
_SLOW_RATIO = 1.25

# As in Megatron: without a cap the perplexity of an untrained model would set the chart's scale.
_LARGEST_EXPONENT = 20.0


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Constants of a run that lines and points need.

    Attributes:
        num_replicas: K.
        world_size: Number of ranks.
        train_iters: Inner steps of the run.
        layout: Samples of every step.
        seq_length: Tokens of a sample.
        flops_per_token: Model FLOPs of one token, forward and backward.
        peak_tflops: Peak of one rank's accelerator in TFLOP/s; ``None`` if unknown.
        resumed_step: Inner step that this start continues from, 0 for a new run.
    """

    num_replicas: int
    world_size: int
    train_iters: int
    layout: RunLayout
    seq_length: int
    flops_per_token: float
    peak_tflops: float | None = None
    resumed_step: int = 0

    def tokens(self, first: int, last: int) -> int:
        """Return the tokens of all replicas after step ``first``, up to step ``last``."""
        return (self.layout.consumed(last) - self.layout.consumed(first)) * self.seq_length


class Monitor:
    """Writes lines and points of one start of a run. Construct it just before the first inner step.

    Invariant: a due line is written exactly once, in the order of steps, on the writing rank.

    Args:
        facts: Constants of the run.
        calendar: Steps with a due line, and the launches that carry them.
        device: Device of the line values.
        console: Console; ``None`` on ranks that do not write.
        writer: Writer of points; ``None`` on ranks that do not write, or where nobody reads them.
        metrics: Table of the metrics that may be recorded.
        left: Estimate of the time left; ``None`` where nobody reads it.
        next_steps: What can be done after the run, below the summary; given whether it is done.
        now: Monotonic time in seconds.
    """

    def __init__(
        self,
        facts: RunFacts,
        calendar: LineCalendar,
        *,
        device: torch.device,
        console: Console | None = None,
        writer: PointWriter | None = None,
        metrics: MetricTable = METRICS,
        left: TimeLeft | None = None,
        next_steps: Callable[[bool], str] = lambda done: "",
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._facts, self._calendar, self._device = facts, calendar, device
        self._console, self._writer = console, writer
        self._left, self._next_steps, self._now = left, next_steps, now
        self._clock = TrainingClock(now)
        self._value_count = calendar.value_count() if facts.num_replicas > 1 else 0
        self._interval = Interval(metrics)
        self._waiting: dict[int, DueLine] = {}
        self._exposed: list[tuple[int, float]] = []
        self._exposed_in_round = 0.0
        self._wait: float | None = None  # share of the last whole round
        self._step = facts.resumed_step
        self._last_line = (self._step, 0.0)
        self._round_start = (self._step, 0.0)
        self._printed_peak: float | None = None
        self._wire_bytes = 0
        self._skipped = 0
        self._excluded = 0
        self._evaluations: list[tuple[int, float]] = []
        self._closed = False

    # ---- inner steps ------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Return whether inner step ``step`` ends with a line; costly metrics are for these."""
        return self._calendar.due(step)

    def record(self, step: int, values: Mapping[str, Value]) -> None:
        """Record the metrics of an inner step, before its outer steps.

        Nothing is read from an accelerator unless this call writes a line. Batch size, time,
        throughput, MFU and peak memory are not passed in; the monitor measures them.

        Args:
            step: The inner step just made.
            values: Number or 0-dim tensor by tag. ``lm loss`` (mean of the replica) and
                ``learning-rate`` are required in every step; tags are the same on all ranks at one
                position.

        Raises:
            RuntimeMismatch: The registry has no such tag for inner steps.
        """
        assert step == self._step + 1, f"inner step {step} recorded after {self._step}"
        self._step = step
        self._interval.add(values)
        if self._console is not None:
            left = self._left
            self._console.step(None if left is None else left.step(step, self._clock.seconds))
        if not self.due(step):
            return
        means, skipped = self._interval.take()
        means["perf/peak_memory_gib"] = peak_memory_gib(self._device)
        line = DueLine(step, means, skipped, self._speed_since_last_line(step))
        if self._facts.num_replicas == 1:
            self._write_line(line, line.shared())
        else:
            self._waiting[step] = line

    @contextmanager
    def paused(self, kind: str = "") -> Iterator[None]:
        """Exclude the time inside the context from all times; must not be nested.

        Args:
            kind: ``evaluation`` or ``save`` where the time left counts such pauses.
        """
        began = self._now()
        try:
            with self._clock.paused():
                yield
        finally:
            if self._left is not None and kind:
                self._left.pause(kind, self._now() - began)

    # ---- outer steps ------------------------------------------------------------------------

    def line_values(self, step: int) -> Tensor | None:
        """Return the numbers that this replica sends with the launches of ``step``, 1-D fp32.

        They are the values of the lines since the previous launch, then zeros up to a fixed size;
        ``None`` if nothing is launched, or with one replica.
        """
        if not self._value_count or not self._calendar.launches(step):
            return None
        line_values = torch.zeros(self._value_count, dtype=torch.float32, device=self._device)
        for slot, due_step in enumerate(self._calendar.carried(step)):
            if due_step in self._waiting:  # otherwise recorded by an earlier start
                own = self._waiting[due_step].sent()
                for index, value in enumerate(own):
                    line_values[slot * VALUES_PER_LINE + index] = value
        return line_values

    def receive(self, launched_at: int, line_values: Tensor) -> None:
        """Write the lines whose values were sent with the launches of ``launched_at``.

        Lines that another fragment launched at the same step has brought already, and lines of an
        earlier start, are not written.

        Args:
            launched_at: Inner step of the launch.
            line_values: Line values of every replica, ``[K, n]``, on the host.
        """
        if line_values.size(1) == 0:
            return
        expected = (self._facts.num_replicas, self._value_count)
        assert tuple(line_values.shape) == expected, (
            f"line_values {tuple(line_values.shape)}, not {expected}"
        )
        for slot, due_step in enumerate(self._calendar.carried(launched_at)):
            line = self._waiting.pop(due_step, None)
            if line is not None:
                first = slot * VALUES_PER_LINE
                numbers = line_values[:, first : first + VALUES_PER_LINE].double()
                loss, norm, skipped, _ = numbers.mean(0).tolist()
                self._write_line(
                    line,
                    (loss, norm, round(skipped * self._facts.num_replicas)),
                    times=ReplicaTimes.of(numbers[:, -1].tolist()),
                )

    def outer_step(self, report: OuterReport) -> None:
        """Write the metrics of an outer step or of the flush, and the lines it brought."""
        metrics = report.metrics() if self._console is not None else {}
        if metrics:
            self._exposed.append((report.step, metrics["muloco/exposed_ms"]))
            self._exposed_in_round += metrics["muloco/exposed_ms"]
            self._wire_bytes += int(metrics["muloco/wire_bytes"])
            metrics["muloco/wire_bytes_total"] = float(self._wire_bytes)
        metrics |= self._round_time(report.step)
        for part in report.applied:
            self._excluded += int((part.weights == 0).sum())
            self.receive(part.launched_at, part.line_values)
        if metrics:
            self.scalars(report.step, metrics)

    def _round_time(self, step: int) -> dict[str, float]:
        """Return the time of the round that ends with ``step``; empty if only partly seen."""
        schedule = self._calendar.schedule
        if schedule is None or not schedule.ends_round(step) or step == self._round_start[0]:
            return {}
        began_at, began = self._round_start
        self._round_start = (step, self._clock.seconds)
        exposed_ms, self._exposed_in_round = self._exposed_in_round, 0.0
        if step - began_at != schedule.steps_of_round(schedule.round(step)):
            return {}
        round_ms = (self._round_start[1] - began) * 1e3
        self._wait = exposed_ms / round_ms if round_ms else None
        return {"muloco/round_ms": round_ms}

    # ---- other events -----------------------------------------------------------------------

    def scalars(self, step: int, values: Mapping[str, Value]) -> None:
        """Write points of an event after inner step ``step``."""
        if self._writer is not None:
            self._writer.scalars(step, dict(zip(values, floats(values.values()), strict=True)))

    def evaluation(self, step: int, loss: Value) -> None:
        """Write the held-out loss of the anchor after inner step ``step``."""
        self._held_out("validation", step, loss)

    def test(self, step: int, loss: Value) -> None:
        """Write the loss of the last anchor on ``data.test``."""
        self._held_out("test", step, loss)

    def _held_out(self, split: str, step: int, loss: Value) -> None:
        if self._console is None:
            return
        (number,) = floats([loss])
        # The order matters: min(nan, cap) is nan, min(cap, nan) is the cap.
        perplexity = math.exp(min(number, _LARGEST_EXPONENT))
        if split == "validation":
            self._evaluations.append((step, number))
        self._console.evaluation(EvaluationLine(split, step, number, perplexity))
        self.scalars(step, {f"lm loss {split}": number, f"lm loss {split} ppl": perplexity})

    def say(self, text: str) -> None:
        """Write a line of plain text with a time stamp; nothing if empty or on other ranks."""
        if self._console is not None and text:
            self._console.stamped(text)

    def sample(self, text: str) -> None:
        """Write a text sampled from the anchor."""
        self.say(f"sample from the anchor: {text!r}")
        if self._writer is not None and self._console is not None:
            self._writer.text(SAMPLE_TAG, text)

    def close(self, outcome: str = "done") -> None:
        """Write the lines that no launch has sent, and the summary; only once.

        These lines have replica 0's own values, marked on the console and with tags of their own:
        a mean over replicas would need a collective, and the others may have stopped already.

        Args:
            outcome: Reason of the end.
        """
        if self._closed:
            return
        self._closed = True
        for step in sorted(self._waiting):
            line = self._waiting.pop(step)
            self._write_line(line, line.shared(), alone=True)
        if self._writer is not None:
            self._writer.close()
        if self._console is not None:
            self._console.end()
            self._console.line(str(self.summary(outcome)))
            if next_steps := self._next_steps(outcome == "done"):
                self._console.line(next_steps)

    def summary(self, outcome: str) -> RunSummary:
        """Return the summary of this start so far."""
        steps, seconds = self._step - self._facts.resumed_step, self._clock.seconds
        tokens = self._facts.tokens(self._facts.resumed_step, self._step)
        evaluations = self._evaluations
        return RunSummary(
            outcome=outcome,
            steps=steps,
            last_step=self._step,
            seconds=seconds,
            tokens_per_s=tokens / seconds if tokens and seconds > 0 else None,
            wire_bytes=self._wire_bytes,
            skipped=self._skipped,
            validation=(evaluations[0], evaluations[-1]) if evaluations else None,
            lost_points=self._writer.lost_points if self._writer is not None else 0,
            excluded=self._excluded,
        )

    # ---- lines ------------------------------------------------------------------------------

    def _speed_since_last_line(self, step: int) -> Speed:
        last_step, last_seconds = self._last_line
        self._last_line = (step, self._clock.seconds)
        return measure_speed(
            seconds=max(self._last_line[1] - last_seconds, 1e-9),  # a clock may be coarse
            steps=step - last_step,
            tokens=self._facts.tokens(last_step, step),
            flops_per_token=self._facts.flops_per_token,
            world_size=self._facts.world_size,
            peak=self._facts.peak_tflops,
        )

    def _write_line(
        self,
        line: DueLine,
        shared: tuple[Value, Value, Value],
        *,
        times: ReplicaTimes | None = None,
        alone: bool = False,
    ) -> None:
        """Write one line and its points; ``shared`` replaces this rank's own values.

        ``times`` are those of the replicas, where known. ``alone`` says that ``shared`` are replica
        0's values and not means.
        """
        if self._console is None:
            return
        numbers = floats([*shared, *line.values.values()])
        loss, norm, skipped = numbers[: len(shared)]
        values = dict(zip(line.values, numbers[len(shared) :], strict=True))
        values["lm loss"] = loss
        if "grad-norm" in values:
            values["grad-norm"] = norm
        self._skipped += int(skipped)
        shown = self._training_line(line, values, times, skipped=int(skipped), alone=alone)
        self._console.training(shown, tokens_per_s=line.speed.tokens_per_s, wait=self._wait)
        values |= {} if times is None else times.metrics()
        if alone:
            values = {_TAGS_OF_REPLICA_0.get(tag, tag): value for tag, value in values.items()}
        self.scalars(line.step, values | self._own_points(line.step, line.speed))

    def _own_points(self, step: int, speed: Speed) -> dict[str, float]:
        points = {
            "batch-size": float(self._facts.layout.at(step).global_batch_size),
            "iteration-time": speed.seconds_per_step,
            "throughput": speed.tflops,
            "perf/tokens_per_s": speed.tokens_per_s,
        }
        return points if speed.mfu is None else points | {"perf/mfu": speed.mfu}

    def _training_line(
        self,
        line: DueLine,
        values: Mapping[str, float],
        times: ReplicaTimes | None,
        *,
        skipped: int,
        alone: bool,
    ) -> TrainingLine:
        facts, schedule = self._facts, self._calendar.schedule
        sync_ms = sum(ms for step, ms in self._exposed if step <= line.step)
        self._exposed = [(step, ms) for step, ms in self._exposed if step > line.step]
        return TrainingLine(
            iteration=line.step,
            train_iters=facts.train_iters,
            consumed_samples=facts.layout.consumed(line.step),
            elapsed_ms=line.speed.seconds_per_step * 1e3,
            learning_rate=values["learning-rate"],
            loss=values["lm loss"],
            grad_norm=values.get("grad-norm"),
            skipped=skipped,
            mfu=line.speed.mfu,
            round=None if schedule is None else schedule.round(line.step),
            sync_ms=sync_ms,
            peak_gib=self._grown_peak(values["perf/peak_memory_gib"]),
            slow=times if times is not None and times.ratio >= _SLOW_RATIO else None,
            alone=alone,
        )

    def _grown_peak(self, peak_gib: float) -> float | None:
        """Return the peak memory if a line has not printed it yet, else ``None``."""
        printed, self._printed_peak = self._printed_peak, round(peak_gib, 1)
        return peak_gib if self._printed_peak != printed else None
