"""On a terminal no line wraps, training lines change the live line, text above it stays."""

import fcntl
import io
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import derive, smallest_topology
from megatron_muloco.monitor.console import (
    COMMAND,
    Console,
    EvaluationLine,
    TrainingLine,
    next_steps,
    start_banner,
)
from megatron_muloco.monitor.terminal import (
    LOG_FILE,
    LiveLine,
    TerminalConsole,
    console_for,
    duration,
)
from megatron_muloco.monitor.throughput import ReplicaTimes

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


def drive(screen: Console) -> None:
    """Let a console show the last four steps of a run of six."""
    for step in range(3, 7):
        screen.step(left=1.5 * (6 - step))
        screen.training(training_line(step), tokens_per_s=21_345.0, wait=0.25)
    screen.evaluation(EvaluationLine("validation", 6, 4.5, 90.017))
    screen.stamped("the last text")
    screen.end()


def test_no_line_is_wider_than_the_terminal(
    console: tuple[TerminalConsole, Callable[[], str]], columns: int
) -> None:
    screen, shown = console
    config = load_config("configs/cpu_k2.yaml")
    topology = smallest_topology(config)
    screen.line(start_banner(config, topology, derive(config, topology), device="cpu"))
    drive(screen)
    screen.line("a sentence " * 20)
    screen.line("\u6f22" * 100)  # takes two columns
    screen.line(next_steps(config)(True))
    text = shown()
    lines = re.split(r"[\r\n]+", text)
    assert max(len(each) + each.count("\u6f22") for each in lines) < columns
    assert "step 6: validation loss 4.5000, perplexity 90.02" in " ".join(text.split())
    assert sum("a sentence" in each for each in lines) > 1
    # A command that is broken is still one command for a shell.
    commands = re.sub(r" \\\r?\n +", " ", text.replace("\r\n", "\n"))
    expected = [each for each in next_steps(config)(True).split("\n") if each.startswith(COMMAND)]
    assert len(expected) == 4
    assert all(each in commands for each in expected)


def test_the_bar_begins_where_the_run_resumes_and_ends_with_it(
    console: tuple[TerminalConsole, Callable[[], str]], columns: int
) -> None:
    screen, shown = console
    screen.training(training_line(2), tokens_per_s=1.0)  # before the first step there is no bar
    drive(screen)
    screen.step()  # nothing is drawn below the summary
    text = shown()
    assert "step 2: loss 2.2500" in text
    bars = re.findall(r"(\d+)/6  ", text)
    assert (bars[0], bars[-1]) == ("3", "6")
    if columns >= 80:
        assert text.rstrip().endswith(
            "6/6  loss -1.7500  21.3k tok/s  round 3  wait 25%  0:00 left"
        )


def test_the_live_line_fits_and_drops_what_matters_least() -> None:
    facts = ("loss 4.1234", "21.3k tok/s", "round 12", "wait 3%")
    line = LiveLine(120_000, 480_000, 93_000.0, facts)
    assert len(line.fitted(79)) <= 79
    assert line.fitted(79).endswith("loss 4.1234  21.3k tok/s  round 12  1d 01h left")
    assert line.fitted(88).endswith("wait 3%  1d 01h left")
    for width in range(24, 140):
        shown = line.fitted(width)
        assert len(shown) <= width
        assert "120000/480000" in shown
        assert _ESCAPES.sub("", line.fitted(width, coloured=True)) == shown
        assert line.fitted(width, blocks=False).isascii()
    assert LiveLine(1, 2).fitted(20, blocks=False) == " 50% #####...... 1/2"


def test_durations_have_two_units() -> None:
    shown = [duration(seconds) for seconds in (0, 59.6, 3_599, 3_600, 86_399, 187_200)]
    assert shown == ["0:00", "1:00", "59:59", "1h 00m", "23h 59m", "2d 04h"]


def test_colours_change_no_character_and_trouble_is_red() -> None:
    plain, coloured = io.StringIO(), io.StringIO()
    for stream in (plain, coloured):
        screen = TerminalConsole(
            stream, train_iters=6, first_step=2, coloured=stream is coloured, now=lambda: 0.0
        )
        screen.stamp = lambda text: f" [2026-01-31 12:00:00] {text}"  # type: ignore[method-assign]
        screen.line(" > method:      MuLoCo\nNOT SAVED: the disk is full")
        drive(screen)
    assert _ESCAPES.sub("", coloured.getvalue()) == _ESCAPES.sub("", plain.getvalue())
    assert "\x1b[31mNOT SAVED: the disk is full\x1b[0m" in coloured.getvalue()
    assert not re.search(r"\x1b\[\d*m", plain.getvalue())


def test_a_slow_replica_is_named_once(
    console: tuple[TerminalConsole, Callable[[], str]],
) -> None:
    screen, shown = console
    for step in (3, 4, 5):
        screen.step()
        slow = ReplicaTimes(100.0, 150.0, 1)
        line = TrainingLine(step, 6, 16 * step, 250.0, 0.03, 4.0, 0.5, skipped=step // 5, slow=slow)
        screen.training(line, tokens_per_s=1.0)
    text = " ".join(shown().split())
    assert text.count("replica 1 is slow, 1.50 times the fastest one") == 1
    assert text.count("step 5: 1 skipped steps") == 1


def test_a_terminal_leaves_the_whole_lines_to_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader, terminal = os.openpty()
    with open(terminal, "w", encoding="utf-8") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setenv("TERM", "xterm")
        screen = console_for(6, 2, str(tmp_path))
        assert isinstance(screen, TerminalConsole)
        drive(screen)
    os.close(reader)
    lines = (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert [line.split("] ")[1][:13] for line in lines[:4]] == [
        f"iteration {step}/6" for step in range(3, 7)
    ]
    assert lines[-1].endswith("the last text")


def test_a_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert type(console_for(6, 0)) is Console
