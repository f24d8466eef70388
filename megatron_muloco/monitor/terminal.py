"""`TerminalConsole`: a live line at the bottom of a terminal, and text above it.

In a file or a pipe, training lines have Megatron's form (`Console`). On a terminal they would wrap
and scroll away, so there each of them only changes the live line::

     > outer:       nesterov, lr 0.7, momentum 0.6, every 10 steps, fp32 on the wire
     [2026-01-31 12:00:00] step 40: validation loss 5.1312, perplexity 169
     25% ███▌          120/480  loss 4.1234  21.3k tok/s  round 12  wait 3%  0:31 left

Megatron's lines then go to `LOG_FILE` in the directory of the event files.
"""

import os
import re
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from megatron_muloco.monitor.console import COMMAND, Console, EvaluationLine, TrainingLine

__all__ = ["LOG_FILE", "LiveLine", "TerminalConsole", "console_for", "duration"]

LOG_FILE = "console.log"

# The name and the padding of a fact in the banner or the summary: `` > method:      ``.
_FACT = re.compile(r"^ > (\S[^:]*:) +")
_STAMP = re.compile(r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\]")
_TROUBLE = re.compile(
    r"NOT SAVED|STOPPED|FAILED|NO REPLICA|cannot write|have weight 0|skipped|slow"
)
_SMALLEST_WIDTH = 40
_SHORTEST_BAR, _LONGEST_BAR = 6, 40
_REDRAW_SECONDS = 0.1  # as often as an eye can follow

_RESET = "\x1b[0m"
_BOLD, _FAINT, _RED, _GREEN, _CYAN = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 36))
_ERASE_LINE = "\r\x1b[K"


def console_for(train_iters: int, first_step: int, log_dir: str | None = None) -> Console:
    """Return the console for standard output: a live line on a terminal, else whole lines.

    Args:
        train_iters: Inner steps of the run.
        first_step: Inner steps that an earlier start has made.
        log_dir: Directory of the file that gets Megatron's lines while a terminal does not.
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return Console()
    return TerminalConsole(
        sys.stdout,
        train_iters=train_iters,
        first_step=first_step,
        log=None if log_dir is None else _log_in(log_dir),
        coloured=not os.environ.get("NO_COLOR"),
    )


def _log_in(directory: str) -> Console | None:
    """Return a console that appends to `LOG_FILE`; ``None`` where that is not possible."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        # Open until the process ends; every line is flushed.
        return Console(open(Path(directory) / LOG_FILE, "a", encoding="utf-8"))
    except OSError:  # the event files will not be written either, and that is reported
        return None


def duration(seconds: float) -> str:
    """Return a time in two units: ``0:31``, ``12:05``, ``3h 20m``, ``2d 04h``."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}:{whole % 60:02d}"


@dataclass(frozen=True, slots=True)
class LiveLine:
    """What the live line shows.

    Attributes:
        step: Inner step.
        train_iters: Inner steps of the run.
        left: Seconds left; ``None`` if unknown.
        facts: Loss, speed and so on, the most important ones first.
    """

    step: int
    train_iters: int
    left: float | None = None
    facts: tuple[str, ...] = ()

    def fitted(self, width: int, *, blocks: bool = True, coloured: bool = False) -> str:
        """Return the line with at most ``width`` visible characters; it drops the last facts first.

        Args:
            width: Columns.
            blocks: Whether the terminal has block characters; otherwise the bar is ASCII.
            coloured: Whether to colour bar and loss.
        """
        share = self.step / max(1, self.train_iters)
        head, steps = f"{int(100 * share):3d}% ", f" {self.step}/{self.train_iters}"
        tail = [] if self.left is None else [f"{duration(self.left)} left"]
        facts = list(self.facts)

        def rest() -> int:
            texts = "".join(f"  {text}" for text in (*facts, *tail))
            return width - len(head) - len(steps) - len(texts)

        while rest() < _SHORTEST_BAR and (facts or tail):
            (facts or tail).pop()
        bar = _bar(share, min(_LONGEST_BAR, max(0, rest())), blocks=blocks)
        if coloured:
            bar = f"{_GREEN}{bar}{_RESET}"
            facts = [f"{_BOLD}{text}{_RESET}" if not i else text for i, text in enumerate(facts)]
        return head + bar + steps + "".join(f"  {text}" for text in (*facts, *tail))


def _bar(share: float, cells: int, *, blocks: bool) -> str:
    parts = int(8 * cells * min(1.0, share))
    full, eighths = divmod(parts, 8)
    if not blocks:
        return ("#" * full).ljust(cells, ".")
    # U+2588 is a full block, U+258F an eighth of one.
    return ("\u2588" * full + (chr(0x2590 - eighths) if eighths else "")).ljust(cells)


class TerminalConsole(Console):
    """Console with a live line; text is wrapped at the width of the terminal.

    Args:
        stream: The terminal.
        train_iters: Inner steps of the run.
        first_step: Inner steps that an earlier start has made.
        log: Console that gets everything in Megatron's form; ``None`` for none.
        coloured: Whether the terminal shows colours.
        now: Monotonic time in seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        train_iters: int,
        first_step: int,
        log: Console | None = None,
        coloured: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream)
        self._terminal, self._log, self._coloured, self._now = stream, log, coloured, now
        self._blocks = "utf" in (stream.encoding or "").lower()
        self._step, self._train_iters = first_step, train_iters
        self._left: float | None = None
        self._facts: tuple[str, ...] = ()
        self._slow: int | None = None  # replica that was named as slow last
        self._drawn_at: float | None = None  # when the live line was drawn; None without one
        self._ended = False

    @override
    def line(self, text: str) -> None:
        """Write ``text`` above the live line, and flush."""
        if self._log is not None:
            self._log.line(text)
        self._above(text)

    @override
    def step(self, left: float | None = None) -> None:
        """Move the bar by one inner step."""
        if self._ended:
            return
        self._step += 1
        self._left = left
        if (
            self._drawn_at is None
            or self._now() - self._drawn_at >= _REDRAW_SECONDS
            or self._step == self._train_iters
        ):
            self._draw()

    @override
    def training(
        self, line: TrainingLine, *, tokens_per_s: float, wait: float | None = None
    ) -> None:
        """Show a training line in the live line; say in a line of its own what is unusual."""
        if self._log is not None:
            self._log.training(line, tokens_per_s=tokens_per_s)
        facts = [f"loss {line.loss:.4f}", f"{_short(tokens_per_s)} tok/s"]
        if line.round is not None:
            facts.append(f"round {line.round}")
        if wait is not None:
            facts.append(f"wait {wait:.0%}")
        self._facts = tuple(facts)
        if line.skipped:
            self._above_stamped(f"step {line.iteration}: {line.skipped} skipped steps")
        slowest = None if line.slow is None else line.slow.slowest
        if line.slow is not None and slowest != self._slow:
            self._above_stamped(
                f"step {line.iteration}: replica {slowest} is slow, {line.slow.ratio:.2f} times "
                "the fastest one"
            )
        self._slow = slowest
        if self._drawn_at is None and not self._ended:  # resumed just before the end, or a test
            self._above_stamped(f"step {line.iteration}: {', '.join(facts)}")
        elif not self._ended:
            self._draw()

    @override
    def evaluation(self, line: EvaluationLine) -> None:
        """Write a held-out loss in short form."""
        if self._log is not None:
            self._log.evaluation(line)
        self._above_stamped(
            f"step {line.iteration}: {line.split} loss {line.loss:.4f}, "
            f"perplexity {line.perplexity:.4g}"
        )

    @override
    def end(self) -> None:
        """Leave the live line as it is, above the summary."""
        if self._drawn_at is not None:
            self._draw()
            self._write("\n")
        self._drawn_at, self._ended = None, True

    # ---- drawing ----------------------------------------------------------------------------

    def _above_stamped(self, text: str) -> None:
        self._above(self.stamp(text))

    def _above(self, text: str) -> None:
        width, erase = self._width(), _ERASE_LINE if self._drawn_at is not None else ""
        lines = [
            each
            for paragraph in text.split("\n")
            for each in self._paint(paragraph, _wrapped(paragraph, width))
        ]
        self._write(erase + "\n".join(lines) + "\n")
        if self._drawn_at is not None:
            self._draw()

    def _draw(self) -> None:
        shown = LiveLine(self._step, self._train_iters, self._left, self._facts)
        # Some terminals break a line that fills the last column.
        line = shown.fitted(self._width() - 1, blocks=self._blocks, coloured=self._coloured)
        self._write(_ERASE_LINE + line)
        self._drawn_at = self._now()

    def _write(self, text: str) -> None:
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except (OSError, ValueError):  # the terminal has gone
            self.lost_lines += 1

    def _paint(self, paragraph: str, lines: list[str]) -> list[str]:
        """Return the lines of a paragraph in colours: trouble red, names and time stamps faint."""
        if not self._coloured:
            return lines
        if _TROUBLE.search(paragraph):
            return [f"{_RED}{each}{_RESET}" for each in lines]
        if fact := _FACT.match(lines[0]):
            first, last = fact.span(1)
            head = f"{lines[0][:first]}{_CYAN}{lines[0][first:last]}{_RESET}{lines[0][last:]}"
            return [head, *lines[1:]]
        if stamp := _STAMP.match(lines[0]):
            end = stamp.end()
            return [f"{_FAINT}{lines[0][:end]}{_RESET}{lines[0][end:]}", *lines[1:]]
        return lines

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self._terminal.fileno()).columns
        except (OSError, ValueError):  # the terminal has gone
            columns = 0
        return max(_SMALLEST_WIDTH, columns or 80)


def _short(number: float) -> str:
    """Return a number in three digits: 950, 21.3k, 1.20M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{suffix}"
    return f"{number:.0f}"


def _wrapped(text: str, width: int) -> list[str]:
    """Return one line, broken before ``width`` columns; what is said of a fact stays aligned."""
    if any(unicodedata.east_asian_width(each) in "WF" for each in text):
        width //= 2  # such a character takes two columns
    if len(text) < width:
        return [text]
    if text.startswith(COMMAND):  # stays a command where it is broken
        broken = textwrap.wrap(text, width - 3, subsequent_indent=" " * 8, break_on_hyphens=False)
        return [*(f"{part} \\" for part in broken[:-1]), broken[-1]]
    fact = _FACT.match(text)
    indent = fact.end() if fact and fact.end() < width // 2 else 4
    return textwrap.wrap(
        text,
        width - 1,  # some terminals break a line that fills the last column
        subsequent_indent=" " * indent,
        drop_whitespace=True,
        replace_whitespace=False,
        break_on_hyphens=False,
    )
