"""`--dry-run` prints the plan of a run, for any world, and refuses what cannot run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_muloco.training import main as program

ROOT = Path(__file__).parents[2]
CPU = ROOT / "configs" / "cpu_k2.yaml"


def dry_run(*arguments: str) -> int:
    """Return the exit code."""
    with pytest.raises(SystemExit) as exit_:
        program.main([*arguments, "--dry-run"])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_the_plan_is_that_of_the_keys_and_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set", "training.micro_batch_size=1", "inner.lr=0.5", "--set", "training.seed=7"]
    assert dry_run("--config", str(CPU), *overrides, "--world-size", "4") == 0
    text = capsys.readouterr().out
    assert "2 replicas x tp 1 x pp 1 x dp 2" in text
    assert re.search(r"learning rate +0\.5 ", text)


def test_a_plan_says_what_is_probably_not_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run("--config", str(CPU), "--set", "inner.kind=adamw") == 0
    assert "warning: inner.lr (" in capsys.readouterr().out
    assert dry_run("--config", str(CPU)) == 0
    assert "warning: inner.lr (" not in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "launch/pretrain.py", "--config", str(CPU), "--dry-run"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--config", str(CPU), "--world-size", "3"], "but there are 3."),
        (["--config", str(CPU), "--world-size", "6"], "dp 3 x micro_batch_size 8 = 48"),
        (["--config", str(CPU), "--set", "inner.lrr=3"], "Did you mean inner.lr?"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(*arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
