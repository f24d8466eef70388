"""The page of metrics is up to date; the summary of a run reads its event files."""

import importlib.util
from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from megatron_muloco.config import load_config
from megatron_muloco.data.prepare import PrepareOptions, prepare
from tools.run_points import read_points

REPOSITORY = Path(__file__).resolve().parents[2]


def tool(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_up_to_date():
    page = REPOSITORY / "docs/reference/metrics.md"
    assert page.read_text() == tool("metrics_reference").render(), (
        "run python tools/metrics_reference.py"
    )


def test_the_page_tool_writes_and_checks(tmp_path, monkeypatch, capsys):
    reference = tool("metrics_reference")
    monkeypatch.setattr(reference, "_PAGE", tmp_path / "reference" / "metrics.md")
    assert reference.main(["--check"]) == 1
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A config file of a run with byte-level data, and the directory that its events go to."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"train": "aab", "valid": "ab"}.items():
        Path(f"{name}.txt").write_text(text)
        options = PrepareOptions(tokenizer_type="byte-level", append_eod=False, workers=1)
        prepare([f"{name}.txt"], f"data/{name}", options)
    values = {
        "extends": str(REPOSITORY / "configs/cpu_k2.yaml"),
        "data": {
            "train": [{"path": "data/train"}],
            "valid": [{"path": "data/valid"}],
            "tokenizer_type": "byte-level",
            "tokenizer_model": None,
        },
        "monitor": {"dir": "events"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def write(points):
    with SummaryWriter("events") as writer:
        for tag, values in points.items():
            for step, value in values:
                writer.add_scalar(tag, value, step)


def test_the_summary_says_what_was_learned(run, capsys):
    summary = tool("demo_summary")
    write(
        {
            "lm loss validation": [(0, 8.5), (50, 6.0), (250, 4.25)],
            "perf/tokens_per_s": [(10, 1000.0), (20, 9000.0), (30, 5000.0)],
            "muloco/wire_bytes": [(10, 1000.0), (20, 24.0)],
        }
    )
    with SummaryWriter("events") as writer:
        writer.add_text("run/sample", "what the anchor wrote", 250)
    assert summary.main(["--config", "run.yaml"]) == 0
    printed = capsys.readouterr().out
    for fact in ("iteration 0 ", "8.5000", "iteration 250", "4.2500", "5,000", "1,024",
                 "what the anchor wrote", "tensorboard --logdir events"):  # fmt: skip
        assert fact in printed
    learned = summary.learned(load_config("run.yaml"), read_points("events"))
    assert f"{learned.unigram - 4.25:8.4f}" in printed


@pytest.mark.parametrize(
    ("points", "problem"),
    [(None, "events does not exist"), ({"lm loss": [(1, 1.0)]}, "hold no `lm loss validation`")],
)
def test_a_run_without_a_summary_is_bad_input(run, capsys, points, problem):
    if points:
        write(points)
    assert tool("demo_summary").main(["--config", "run.yaml"]) == 2
    assert problem in capsys.readouterr().err


def test_a_config_that_does_not_exist_is_bad_input(run, capsys):
    assert tool("demo_summary").main(["--config", "no.yaml"]) == 2
    assert "no.yaml" in capsys.readouterr().err
