"""`tools.gpu_check` without a GPU: what it says, and how a check that dies is reported."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.gpu import runs
from tools.gpu.findings import Finding


def test_without_a_gpu_it_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    said = capsys.readouterr().out
    assert all(check.name in said for check in gpu_check.CHECKS)


@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.name)
def test_every_check_exists(check: gpu_check.Check) -> None:
    module, function = check.where.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_check_that_dies_is_a_failed_finding() -> None:
    missing = gpu_check.Check("missing", "nowhere:nothing", 60)
    options = argparse.Namespace(rehearse=True, logs=None)
    (found,) = gpu_check._run(missing, options)
    assert found.passed is False
    assert "invalid choice" in found.result


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_tells_whether_something_failed(
    passed: bool | None, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = Finding("a thing", "a result", passed)
    monkeypatch.setattr(gpu_check, "_run", lambda check, options: [finding])
    written = tmp_path / "found.json"
    assert gpu_check.main(["--rehearse", "--only", "codecs", "--json", str(written)]) == code
    rows = json.loads(written.read_text())
    assert rows == {"codecs": [{"what": "a thing", "result": "a result", "passed": passed}]}


def test_configs_of_the_checks_are_accepted(tmp_path: Path) -> None:
    from megatron_muloco.config import load_config
    from megatron_muloco.config.derived import topology_of
    from megatron_muloco.config.rules import check

    seen = []

    class Planned(runs.Program):
        def run(self, config: Path, **_: object) -> runs.Run:  # type: ignore[override]
            loaded = load_config(str(config), ())
            check(loaded, topology_of(loaded, loaded.parallel.num_replicas))
            seen.append(config.parent.name)
            return runs.Run(0, "", {})

    program = Planned(tmp_path, on_gpu=True)
    for each in (runs.train_and_resume, runs.parity, runs.start_up, runs.variants, runs.speed):
        each(program)
    assert len(seen) == 6 + 2 + 2 + len(runs.VARIANTS) + len(runs.SPEED)


def test_differences_of_losses() -> None:
    assert runs.largest_difference([2.0, 3.0], [2.0, 4.0]) == 0.25
    assert runs.largest_difference([1.0], [1.0, 2.0]) == float("inf")
    assert runs.largest_difference([], []) == float("inf")
