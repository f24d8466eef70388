"""`Console` and the text it prints: training lines in Megatron's form, start banner and summary.

Everything except `Console` is a pure function from numbers to text.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from megatron_muloco.config.derived import Derived
from megatron_muloco.config.outer import (
    AverageOuter,
    NesterovOuter,
    NoCompression,
    NoOuter,
    interval_words,
    rate_words,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.monitor.throughput import ReplicaTimes
from megatron_muloco.topology import Topology

__all__ = [
    "Console",
    "EvaluationLine",
    "RunSummary",
    "TrainingLine",
    "count",
    "method_name",
    "next_steps",
    "start_banner",
]


class Console:
    """Writes whole lines; errors of the stream are counted, not raised.

    A full disk under a log file must not end a run.

    Args:
        stream: Text stream; by default standard output, looked up at every line.

    Attributes:
        lost_lines: Number of lines that could not be written.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.lost_lines = 0
        self._stream = stream

    def line(self, text: str) -> None:
        """Write ``text`` and a line break, and flush."""
        stream = self._stream or sys.stdout
        try:
            stream.write(text + "\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.lost_lines += 1

    def stamped(self, text: str) -> None:
        """Write a line that begins with a time stamp, as Megatron's do."""
        self.line(self.stamp(text))

    def stamp(self, text: str) -> str:
        """Return ``text`` behind a time stamp in Megatron's form."""
        return f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}"

    def step(self, left: float | None = None) -> None:
        """Note that an inner step was made; a live line shows it, and the seconds left."""

    def training(
        self, line: "TrainingLine", *, tokens_per_s: float, wait: float | None = None
    ) -> None:
        """Write a training line.

        Args:
            line: The line.
            tokens_per_s: Tokens per second of all replicas; a live line shows them.
            wait: Share of the last whole round that training waited for outer steps; a live line
                shows it.
        """
        self.stamped(str(line))

    def evaluation(self, line: "EvaluationLine") -> None:
        """Write the line of an evaluation."""
        self.stamped(str(line))

    def end(self) -> None:
        """End the live part of the display, before the summary."""


@dataclass(frozen=True, slots=True)
class TrainingLine:
    """One line of training, ``| key: value`` with Megatron's keys where Megatron has the field.

    A line has about 200 characters. Left out is what is constant over the run (the batch size is in
    the start banner), unknown or zero, and what follows from another field (tokens/s from the time
    of an iteration). TensorBoard has all of it.

    Attributes:
        iteration: Inner step.
        train_iters: Inner steps of the run.
        consumed_samples: Sequences so far, over all replicas.
        elapsed_ms: Milliseconds of an inner step.
        learning_rate: Inner learning rate.
        loss: Mean over the steps since the last line and over replicas.
        grad_norm: Gradient norm before clipping; ``None`` if none was recorded.
        skipped: Skipped steps since the last line, summed over replicas; printed if not 0.
        mfu: Model FLOPs utilization; ``None`` without a known peak.
        round: Round of the step; ``None`` without outer steps.
        sync_ms: Time that training waited for outer steps since the last line; printed if not 0.
        peak_gib: Peak memory of the writing rank; ``None`` if it is that of the last line.
        slow: Times of the replicas, if one of them is much slower than another.
        alone: Whether loss, gradient norm and skipped steps are those of replica 0 only; their keys
            then end in ``(replica 0)``.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    elapsed_ms: float
    learning_rate: float
    loss: float
    grad_norm: float | None
    skipped: int = 0
    mfu: float | None = None
    round: int | None = None
    sync_ms: float = 0.0
    peak_gib: float | None = None
    slow: ReplicaTimes | None = None
    alone: bool = False

    @override
    def __str__(self) -> str:
        width = len(str(self.train_iters))
        whose = " (replica 0)" if self.alone else ""
        fields = [
            f"iteration {self.iteration:{width}d}/{self.train_iters}",
            f"consumed samples: {self.consumed_samples}",
            f"elapsed time per iteration (ms): {self.elapsed_ms:.1f}",
            f"learning rate: {self.learning_rate:.3E}",
            f"lm loss{whose}: {self.loss:.4f}",
        ]
        if self.grad_norm is not None:
            fields.append(f"grad norm{whose}: {self.grad_norm:.3f}")
        if self.skipped:
            fields.append(f"number of skipped iterations{whose}: {self.skipped}")
        if self.mfu is not None:
            fields.append(f"mfu: {self.mfu:.1%}")
        if self.round is not None:
            fields.append(f"round: {self.round}")
        if self.sync_ms:
            fields.append(f"sync (ms): {self.sync_ms:.1f}")
        if self.peak_gib is not None:
            fields.append(f"peak GiB: {self.peak_gib:.1f}")
        if self.slow is not None:
            fields.append(f"slowest replica: {self.slow.slowest} ({self.slow.ratio:.2f}x)")
        return " | ".join(fields) + " |"


@dataclass(frozen=True, slots=True)
class EvaluationLine:
    """Line of an evaluation: held-out loss of the anchor.

    Attributes:
        split: ``validation`` or ``test``.
        iteration: Inner steps before the evaluation.
        loss: Held-out loss in nats per token.
        perplexity: Perplexity as written to TensorBoard.
    """

    split: str
    iteration: int
    loss: float
    perplexity: float

    @override
    def __str__(self) -> str:
        return (
            f"{self.split} loss at iteration {self.iteration:8d} | "
            f"lm loss value: {_exponent(self.loss)} | lm loss PPL: {_exponent(self.perplexity)} |"
        )


def _exponent(value: float) -> str:
    """Return a number as Megatron prints losses; 13 characters, also for nan and negatives."""
    return f"{value:13.6E}"


_SUFFIXES: Sequence[tuple[float, str]] = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def count(number: float) -> str:
    """Return a large count in short form: 15.2B, 3.4M, 4,096."""
    for size, suffix in _SUFFIXES:
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:,.0f}"


# ---- start banner and summary --------------------------------------------------------------------


def method_name(config: RunConfig) -> str:
    """Return the papers' name for the method of a configuration."""
    muon = config.inner.kind == "muon"
    if isinstance(config.outer, NoOuter):
        return f"{'Muon' if muon else 'AdamW'} data parallelism"
    return f"{'MuLoCo' if muon else 'DiLoCo'}, K = {config.parallel.num_replicas}"


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _outer_words(outer: NesterovOuter | AverageOuter) -> str:
    rule = "plain mean"
    if isinstance(outer, NesterovOuter):
        rule = f"nesterov, lr {rate_words(outer.lr)}, momentum {rate_words(outer.momentum)}"
    words = [rule, f"every {interval_words(outer.sync_interval, 'step')}"]
    if outer.fragments.count > 1:
        words.append(f"{outer.fragments.count} fragments ({outer.fragments.pattern})")
    if outer.overlap_steps:
        words.append(f"overlapped by {_counted(outer.overlap_steps, 'step')}")
    compression = outer.compression
    words.append(f"{compression.short_name} on the wire")
    if not isinstance(compression, NoCompression) and compression.error_feedback:
        words.append("error feedback")
    return ", ".join(words)


def start_banner(
    config: RunConfig,
    topology: Topology,
    derived: Derived,
    *,
    device: str,
    resumed_step: int = 0,
) -> str:
    """Return the banner of a run: method, ranks, model, optimizers, batch and length, one per line.

    Args:
        config: Configuration of the run.
        topology: Arrangement of the ranks.
        derived: Numbers derived from the configuration and the topology.
        device: Name of the accelerator, or ``cpu``.
        resumed_step: Inner step that the run continues from, 0 for a new run.
    """
    parameters, training = derived.parameters, config.training
    begin = f"from iteration {resumed_step}" if resumed_step else "from the beginning"
    facts = {
        "method": method_name(config),
        "ranks": f"{topology} on {device}, {training.precision}",
        "model": f"{count(parameters.total)} parameters: {count(parameters.matrices)} in matrices, "
        f"{count(parameters.vectors)} in embedding, output head and norms",
        "inner": f"{config.inner.kind}, lr {config.inner.lr:g}, "
        f"warm-up {config.inner.lr_warmup_iters} steps, weight decay {derived.weight_decay:g}",
        "outer": "none" if isinstance(config.outer, NoOuter) else _outer_words(config.outer),
        "batch": f"{training.global_batch_size} sequences of {config.model.seq_length} tokens, "
        f"{derived.replica_batch_size} per replica in "
        f"{_counted(derived.num_microbatches, 'microbatch', 'microbatches')}"
        + ("" if training.rampup_batch_size is None else f", from {training.rampup_batch_size[0]}"),
        "length": f"{derived.train_iters} steps, {count(derived.train_tokens)} tokens"
        + (f", {_counted(derived.rounds, 'round')}" if derived.rounds else "")
        + f", {begin}",
        "tensorboard": f"tensorboard --logdir {config.monitor.dir}"
        if config.monitor.dir
        else "off",
        "checkpoints": config.checkpoint.dir or "off",
    }
    return "\n".join(f" > {name + ':':13s}{fact}" for name, fact in facts.items())


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Summary of one start of a run, printed at its end.

    Attributes:
        outcome: Reason of the end, ``done`` or a sentence.
        steps: Inner steps of this start.
        last_step: Inner step reached.
        seconds: Training time of this start, without evaluation and saving.
        tokens_per_s: Tokens per second of all replicas over this start; ``None`` if unknown.
        wire_bytes: Bytes sent by the writing rank in outer steps.
        skipped: Skipped steps of all replicas in the lines written so far.
        validation: First and last evaluation, ``(step, loss)``; ``None`` without evaluations.
        lost_points: Points that could not be written.
        excluded: Weights 0 in outer steps, over replicas and fragments.
    """

    outcome: str
    steps: int
    last_step: int
    seconds: float
    tokens_per_s: float | None
    wire_bytes: int
    skipped: int
    validation: tuple[tuple[int, float], tuple[int, float]] | None
    lost_points: int
    excluded: int = 0

    @override
    def __str__(self) -> str:
        speed = "n/a" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f} tokens/s"
        facts = {
            "outcome": f"{self.outcome}, at iteration {self.last_step}",
            "training": f"{self.steps} steps in {self.seconds:,.1f} s, {speed}",
            "outer bytes": f"{self.wire_bytes:,} sent by this rank",
        }
        if self.skipped:
            facts["skipped"] = (
                f"{self.skipped} steps (summed over replicas), gradient not finite or a spike"
            )
        if self.excluded:
            facts["excluded"] = f"{self.excluded} times a replica had weight 0 in an outer step"
        if self.validation is not None:
            (first, before), (last, after) = self.validation
            facts["held-out"] = (
                f"{before:.4f} at iteration {first}, {after:.4f} at iteration {last}"
            )
        if self.lost_points:
            facts["monitor"] = f"{self.lost_points} points could not be written"
        return "\n".join(f" > {name + ':':13s}{fact}" for name, fact in facts.items())


COMMAND = "   $ "
"""Begins a line that is a command for a shell."""


def next_steps(config: RunConfig) -> Callable[[bool], str]:
    """Return what can be done after a run, as a function of whether it is done."""
    run = shlex.quote(config.checkpoint.dir or "")
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    python = f"{COMMAND}{programs / 'python'} -m"
    lines = []
    if config.monitor.dir:
        directory = shlex.quote(config.monitor.dir)
        lines.append(f"{COMMAND}{programs / 'tensorboard'} --logdir {directory}")
    used = [f"{python} tools.generate {run} --prompt {shlex.quote(config.monitor.sample_prompt)}"]
    if config.data.valid:
        used.append(f"{python} tools.evaluate {run}")
    used.append(f"{python} tools.export {run} --format hf --to exported")

    def after(done: bool) -> str:
        if not run.strip("'"):
            words = "nothing was saved (checkpoint.dir is not set)"
        elif done:
            words = "use the model; for more steps raise training.train_iters, start it again"
        else:
            return ""  # the last line is the command that goes on, or the error and its remedy
        commands = [*lines, *(used if done and config.checkpoint.dir else ())]
        return "\n".join([f" > {'next:':13s}{words}", *commands])

    return after
