"""On a terminal no line wraps, training lines change the bar, and the text above it stays."""

import fcntl
import io
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator

import pytest

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import derive, smallest_topology
from megatron_muloco.monitor.console import Console, EvaluationLine, TrainingLine, start_banner
from megatron_muloco.monitor.terminal import TerminalConsole, console_for

_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture(params=[60, 80, 132])
def columns(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def console(columns: int) -> Iterator[tuple[TerminalConsole, Callable[[], str]]]:
    """A console of six steps on a terminal of its own, and a function that ends and reads it."""
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    stream = open(terminal, "w", encoding="utf-8")  # noqa: SIM115  # closed below

    def shown() -> str:
        stream.close()
        text = b""
        try:
            while data := os.read(reader, 65_536):
                text += data
        except OSError:  # the other end is closed, and everything was read
            pass
        return _ESCAPES.sub("", text.decode())

    yield TerminalConsole(stream, train_iters=6, first_step=2), shown
    stream.close()
    os.close(reader)


def training_line(step: int) -> TrainingLine:
    return TrainingLine(step, 6, 16 * step, 250.0, 0.03, 4.25 - step, 0.5, round=step // 2)


def test_no_line_is_wider_than_the_terminal(
    console: tuple[TerminalConsole, Callable[[], str]], columns: int
) -> None:
    screen, shown = console
    config = load_config("configs/cpu_k2.yaml")
    topology = smallest_topology(config)
    screen.line(start_banner(config, topology, derive(config, topology), device="cpu"))
    for step in range(3, 7):
        screen.step()
        screen.training(training_line(step), tokens_per_s=21_345.0)
    screen.evaluation(EvaluationLine("validation", 6, 4.5, 90.017))
    screen.end()
    screen.line("a sentence " * 20)
    text = shown()
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) < columns
    assert "step 6: validation loss 4.5000, perplexity 90.02" in " ".join(text.split())
    assert sum("a sentence" in each for each in lines) > 1


def test_the_bar_begins_where_the_run_resumes_and_ends_with_it(
    console: tuple[TerminalConsole, Callable[[], str]], columns: int
) -> None:
    screen, shown = console
    screen.training(training_line(2), tokens_per_s=1.0)  # before the first step there is no bar
    for step in range(3, 7):
        screen.step()
        screen.training(training_line(step), tokens_per_s=21_345.0)
    screen.stamped("the last text")
    screen.end()
    screen.step()  # nothing is drawn below the summary
    text = shown()
    assert "iteration 2/6" in " ".join(text.split())
    bars = re.findall(r"(\d+)/6 \[", text)
    assert (bars[0], bars[-1]) == ("2", "6")
    assert "loss -1.7500, round 3, 21.3k tok/s" in text or columns < 80
    assert text.rstrip().endswith("tok/s") or columns < 80


def test_a_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert type(console_for(6, 0)) is Console
