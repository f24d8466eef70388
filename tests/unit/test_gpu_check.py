"""`tools.gpu_check` without a GPU: what it says, and how a check that dies is reported."""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import gpu_check
from tools.gpu import inside, measure, parts, runs, several
from tools.gpu.findings import ENTRIES, Finding, not_run, page_table, report


def test_without_a_gpu_it_says_what_is_left_out_of_every_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(check: gpu_check.Check, options: argparse.Namespace) -> list[Finding]:
        ran.append(check.name)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "_run", run)
    assert gpu_check.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("LEFT OUT") == len(ENTRIES)
    assert set(ran) == {check.name for check in gpu_check.CHECKS if check.without_gpu}
    trains = {check.name for check in gpu_check.CHECKS if check.trains}
    assert "ranks" in ran
    assert not trains & set(ran)


def test_every_id_has_a_check() -> None:
    covered = {key for check in gpu_check.CHECKS for key in check.keys}
    assert covered == {entry.key for entry in ENTRIES}


def test_the_page_has_the_table_of_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs/performance/gpu_check.md"
    assert page_table() in page.read_text(encoding="utf-8")
    assert gpu_check.main(["--list"]) == 0
    assert f"Never run on a GPU: {', '.join(not_run())}." in capsys.readouterr().out


def test_the_report_is_grouped_by_id() -> None:
    found = [Finding("B3", "z", "9"), Finding("T1", "y", "8", False), Finding("B3", "x", "7", True)]
    lines = report(found, {"T2": "why"}).splitlines()
    place = {line.strip(): index for index, line in enumerate(lines)}
    assert place["DIFFERS y: 8"] < place["LEFT OUT: why"] < place["-       z: 9"]
    assert place["ok      x: 7"] == place["-       z: 9"] + 1


def test_after_ten_minutes_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "_has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "BUDGET", 0)
    monkeypatch.setattr(gpu_check, "_run", lambda check, options: [Finding("T1", check.name, "")])
    assert gpu_check.main(["--only", "codecs", "outer_parts", "devices"]) == 0
    said = capsys.readouterr().out
    assert "outer_parts" in said
    assert "codecs: no time left after 0 s" in said
    assert "devices (T12): 1 findings" in said  # several GPUs have time of their own


def _rank(loss: float, digest: str = "a") -> dict[str, Any]:
    return {"losses": [9.0, loss], "digest": digest}


@pytest.mark.parametrize(
    ("found", "bound", "passed"),
    [
        ([_rank(3.0), _rank(3.0)], 0.0, True),
        ([_rank(3.0), _rank(3.1)], 0.0, False),
        ([_rank(3.0), _rank(3.1)], 0.1, True),
        ([_rank(3.0), _rank(3.0, "b")], 0.1, False),
        ([_rank(3.0, "b"), _rank(3.0, "b")], 0.0, False),
        ("rank 1 failed", 1.0, False),
    ],
    ids=["equal", "other loss", "within the bound", "two anchors", "another anchor", "failed"],
)
def test_ranks_are_compared_with_the_reference(found: Any, bound: float, passed: bool) -> None:
    results = found if isinstance(found, str) else {"tp 2": found}
    reference = {"tp 2": [_rank(3.0), _rank(3.0)]}
    finding = several._compared("T10", "x", "tp 2", results, reference, bound)
    assert finding.passed is passed


def test_distance_in_units_of_the_last_place() -> None:
    one = torch.tensor([1.0, -1.0, 0.0])
    following = torch.nextafter(one, torch.tensor(2.0))
    assert parts.ulps(one, one.clone()) == 0
    assert parts.ulps(following, one) == 1
    assert parts.ulps(torch.tensor([-0.0]), torch.tensor([0.0])) == 0


@pytest.mark.parametrize("check", gpu_check.CHECKS, ids=lambda check: check.name)
def test_every_check_exists(check: gpu_check.Check) -> None:
    module, function = check.where.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_check_that_dies_is_a_failed_finding() -> None:
    missing = gpu_check.Check("missing", ("T3",), "nowhere:nothing", 60)
    options = argparse.Namespace(rehearse=True, on_cpu=True, logs=None)
    (found,) = gpu_check._run(missing, options)
    assert (found.key, found.passed) == ("T3", False)
    assert "invalid choice" in found.result


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (None, 0), (False, 1)])
def test_the_exit_code_tells_whether_something_failed(
    passed: bool | None, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = Finding("T1", "a thing", "a result", passed)
    monkeypatch.setattr(gpu_check, "_run", lambda check, options: [finding])
    written = tmp_path / "found.json"
    assert gpu_check.main(["--rehearse", "--only", "codecs", "--json", str(written)]) == code
    found = json.loads(written.read_text())["findings"]
    assert found == [{"key": "T1", "what": "a thing", "result": "a result", "passed": passed}]


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
    for each in (runs.train_and_resume, runs.parity, runs.start_up, runs.variants, measure.speed):
        each(program)
    assert len(seen) == 6 + 2 + 2 + len(runs.VARIANTS) + len(measure.SPEED)


@pytest.mark.parametrize(
    ("size", "layouts"),
    [(4, several.FOUR_RANKS), (2, several.TWO_RANKS)],
    ids=["four ranks", "two ranks"],
)
def test_layouts_of_several_ranks_are_accepted(
    size: int, layouts: Sequence[several.Layout], tmp_path: Path
) -> None:
    from megatron_muloco.config.derived import topology_of
    from megatron_muloco.config.rules import check

    for layout in layouts:
        config = inside.run_config(str(tmp_path / "none"), layout.sections)
        topology = topology_of(config, size)
        check(config, topology)
        assert topology.world_size == size


@pytest.mark.parametrize("switch", measure.SWITCHES)
def test_the_layer_of_the_15b_model_is_that_of_a_rank_of_tp_4(switch: str, tmp_path: Path) -> None:
    base = ("models/15b.yaml", "methods/muloco_k1.yaml")
    prefix = str(tmp_path / "none")
    unsaved = {"checkpoint": {"save_interval": 0}}
    whole = inside.run_config(prefix, unsaved, base=base).model
    sections = inside.merged(measure.ALONE, {"model": measure.LAYER}, measure.SWITCHES[switch])
    config = inside.run_config(prefix, sections, base=base)
    part = config.model
    assert (part.num_layers, part.hidden_size) == (1, whole.hidden_size)
    assert part.num_attention_heads * 4 == whole.num_attention_heads
    assert part.ffn_hidden_size * 4 == whole.ffn_hidden_size


def test_differences_of_losses() -> None:
    assert runs.largest_difference([2.0, 3.0], [2.0, 4.0]) == 0.25
    assert runs.largest_difference([1.0], [1.0, 2.0]) == float("inf")
    assert runs.largest_difference([], []) == float("inf")
