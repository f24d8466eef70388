"""`TerminalConsole`: a progress bar in the last line of a terminal, and text above it.

In a file or a pipe, training lines have Megatron's form (`Console`). On a terminal they would wrap
and scroll away, so there each of them only changes the bar::

     > outer:       nesterov, lr 0.7, momentum 0.6, every 10 steps, fp32 on the wire
     [2026-01-31 12:00:00] step 40: validation loss 5.1312, perplexity 169
     25%|█████▌                | 120/480 [00:31 left] loss 4.1234, round 12, 21.3k tok/s
"""

import os
import re
import sys
import textwrap
from typing import Any, TextIO

from tqdm import tqdm
from typing_extensions import override

from megatron_muloco.monitor.console import Console, EvaluationLine, TrainingLine

__all__ = ["TerminalConsole", "console_for"]

_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left]{postfix}"
# The name and the padding of a fact in the banner or the summary: `` > method:      ``.
_FACT = re.compile(r"^ > \S[^:]*: +")
_SMALLEST_WIDTH = 40
# Weight of the newest speed in the time left. Chosen: an evaluation shows for a few seconds only.
_SMOOTHING = 0.1


def console_for(train_iters: int, first_step: int) -> Console:
    """Return the console for standard output: a bar on a terminal, else whole lines.

    Args:
        train_iters: Inner steps of the run.
        first_step: Inner steps that an earlier start has made.
    """
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return TerminalConsole(sys.stdout, train_iters=train_iters, first_step=first_step)
    return Console()


class TerminalConsole(Console):
    """Console with a progress bar; text is wrapped at the width of the terminal.

    Args:
        stream: The terminal.
        train_iters: Inner steps of the run.
        first_step: Inner steps that an earlier start has made.
    """

    def __init__(self, stream: TextIO, *, train_iters: int, first_step: int) -> None:
        super().__init__(stream)
        self._terminal = stream
        self._train_iters, self._first_step = train_iters, first_step
        self._bar: Any = None  # a tqdm bar from the first step on, below the banner
        self._ended = False

    @override
    def line(self, text: str) -> None:
        """Write ``text`` above the bar, and flush."""
        if self._bar is not None:
            self._bar.clear()
        width = self._width()
        super().line("\n".join(_wrapped(each, width) for each in text.split("\n")))
        if self._bar is not None:
            self._bar.refresh()

    @override
    def step(self) -> None:
        """Move the bar by one inner step."""
        if self._ended:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._train_iters,
                initial=self._first_step,
                file=self._terminal,
                bar_format=_BAR,
                dynamic_ncols=True,
                smoothing=_SMOOTHING,
                colour=None if os.environ.get("NO_COLOR") else "green",
            )
        self._bar.update()

    @override
    def training(self, line: TrainingLine, *, tokens_per_s: float) -> None:
        """Show a training line beside the bar."""
        if self._bar is None:
            return super().training(line, tokens_per_s=tokens_per_s)
        facts = [f"loss {line.loss:.4f}"]
        if line.round is not None:
            facts.append(f"round {line.round}")
        facts.append(f"{tqdm.format_sizeof(tokens_per_s)} tok/s")
        if line.skipped:
            facts.append(f"{line.skipped} skipped")
        if line.slow is not None:
            facts.append(f"replica {line.slow.slowest} is slow")
        self._bar.set_postfix_str(", ".join(facts), refresh=False)

    @override
    def evaluation(self, line: EvaluationLine) -> None:
        """Write a held-out loss in short form."""
        self.stamped(
            f"step {line.iteration}: {line.split} loss {line.loss:.4f}, "
            f"perplexity {line.perplexity:.4g}"
        )

    @override
    def end(self) -> None:
        """Leave the bar as it is, above the summary."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._ended = None, True

    def _width(self) -> int:
        try:
            columns = os.get_terminal_size(self._terminal.fileno()).columns
        except OSError:  # the terminal has gone
            columns = 0
        return max(_SMALLEST_WIDTH, columns or 80)


def _wrapped(text: str, width: int) -> str:
    """Return one line, broken before ``width`` characters; what is said of a fact stays aligned."""
    if len(text) < width:
        return text
    fact = _FACT.match(text)
    return "\n".join(
        textwrap.wrap(
            text,
            width - 1,  # some terminals break a line that fills the last column
            subsequent_indent=" " * (fact.end() if fact else 4),
            drop_whitespace=True,
            replace_whitespace=False,
            break_on_hyphens=False,
        )
    )
