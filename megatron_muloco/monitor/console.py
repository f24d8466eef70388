"""What a person reads while a run is on: lines in Megatron's form, a banner and a summary.

Everything but `Console` is a pure function from numbers to text.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TextIO

from typing_extensions import override

__all__ = ["Console", "EvaluationLine", "TrainingLine", "count"]


class Console:
    """Writes whole lines and never raises: a full disk under a log file must not end a run.

    Args:
        stream: Where to; standard output by default, looked up at every line.
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
        """Write a line with Megatron's time stamp before it."""
        self.line(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}")


def _exponent(value: float) -> str:
    """Return a number as Megatron prints losses; 13 characters, also for nan and negatives."""
    return f"{value:13.6E}"


@dataclass(frozen=True, slots=True)
class TrainingLine:
    """One line of training, fields and separators as in Megatron, ours appended.

    Attributes:
        iteration: Inner step.
        train_iters: Inner steps of the run.
        consumed_samples: Sequences so far, over all replicas.
        elapsed_ms: Milliseconds of an inner step.
        tflops: Model TFLOP/s per rank.
        mfu: Over the accelerator's peak; ``None`` prints as n/a.
        learning_rate: Inner learning rate.
        global_batch_size: Sequences of a step over all replicas.
        loss: Mean over the steps since the last line and over replicas.
        grad_norm: ``None`` where none was recorded.
        skipped: Steps since the last line that replicas skipped, summed over replicas.
        tokens_per_s: Of all replicas.
        round: Round and number of rounds; ``None`` without an outer step.
        sync_ms: Time that training waited for outer steps since the last line.
        alone: Whether loss, gradient norm and skipped steps are this replica's alone.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    elapsed_ms: float
    tflops: float
    mfu: float | None
    learning_rate: float
    global_batch_size: int
    loss: float
    grad_norm: float | None
    skipped: int
    tokens_per_s: float
    round: tuple[int, int] | None = None
    sync_ms: float = 0.0
    alone: bool = False

    @override
    def __str__(self) -> str:
        loss_name = "lm loss (this replica)" if self.alone else "lm loss"
        fields = [
            f"iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {self.elapsed_ms:9.1f}",
            f"throughput (TFLOP/s/rank): {self.tflops:8.3f}",
            f"learning rate: {_exponent(self.learning_rate)}",
            f"global batch size: {self.global_batch_size:5d}",
            f"{loss_name}: {_exponent(self.loss)}",
            f"grad norm: {math.nan if self.grad_norm is None else self.grad_norm:8.3f}",
            f"number of skipped iterations: {self.skipped:3d}",
            f"tokens/s: {self.tokens_per_s:9.0f}",
            f"mfu: {'   n/a' if self.mfu is None else f'{self.mfu:6.1%}'}",
        ]
        if self.round is not None:
            fields += [
                f"round: {self.round[0]:5d}/{self.round[1]:5d}",
                f"sync (ms): {self.sync_ms:8.1f}",
            ]
        return " | ".join(fields) + " |"


@dataclass(frozen=True, slots=True)
class EvaluationLine:
    """Held-out loss of the anchor.

    Attributes:
        iteration: Inner steps before the evaluation.
        loss: Nats per token.
        perplexity: As it is written to TensorBoard.
    """

    iteration: int
    loss: float
    perplexity: float

    @override
    def __str__(self) -> str:
        return (
            f"validation loss at iteration {self.iteration:8d} | "
            f"lm loss value: {_exponent(self.loss)} | lm loss PPL: {_exponent(self.perplexity)} |"
        )


_SUFFIXES: Sequence[tuple[float, str]] = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def count(number: float) -> str:
    """Return a large count for people: 15.2B, 3.4M, 4,096."""
    for size, suffix in _SUFFIXES:
        if number >= size:
            return f"{number / size:.4g}{suffix}"
    return f"{number:,.0f}"
