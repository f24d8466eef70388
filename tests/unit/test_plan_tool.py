"""`tools/plan.py`: what it prints and refuses; the planner against published numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_muloco.config.outer import NoOuter
from megatron_muloco.monitor.writers import POINTS_FILE
from megatron_muloco.planning.timing import LINKS
from tools import plan as tool
from tools.plan_check import Check
from tools.planning.measured import Log, calibrated, read_log
from tools.planning.published import PARAMETERS, Parameters, bandwidth_cells, within
from tools.planning.text import Plan, as_json, as_text

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/416m_muloco_k8.yaml")
CPU = str(ROOT / "configs/cpu_k2.yaml")


def made(*words: str) -> Plan:
    """Return the plan that the command line asks for."""
    return tool.make_plan(tool._parser().parse_args(list(words)))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return made("--config", CONFIG, "--world-size", "16", "--link", "1Gbit")


# ---- the plan ---------------------------------------------------------------------------------


def test_every_assumption_is_printed_with_its_origin(plan: Plan) -> None:
    text = as_text(plan)
    for rate in (plan.base.rates.mfu, plan.base.rates.writing, plan.base.rates.mtbf):
        assert rate.origin in text
    assert plan.base.rates.link.origin == "given"
    assert plan.base.rates.mfu.origin == "assumed"


def test_methods_stand_side_by_side(plan: Plan) -> None:
    found = {method.name: method.estimate for method in plan.methods}
    flat, two_levels = found["Muon data parallel"], found["Muon DP, hierarchical"]
    assert flat
    assert two_levels
    assert two_levels.exchange_bits < flat.exchange_bits
    assert two_levels.share > flat.share
    own = found[f"MuLoCo, H = {plan.base.interval}"]
    assert own
    assert own.share == plan.base.share
    assert own.memory == plan.base.memory
    streaming = next(e for name, e in found.items() if name.startswith("streaming"))
    assert streaming
    assert streaming.share >= own.share
    for estimate in filter(None, found.values()):
        assert estimate.derived.train_tokens == plan.base.derived.train_tokens


def test_bandwidth_for_a_share_has_that_share(plan: Plan) -> None:
    rates = [plan.base.rate_for(share) for share in (0.5, 0.9, 0.99)]
    assert rates == sorted(rates, key=lambda rate: rate or 0)
    for share, rate in zip((0.5, 0.9, 0.99), rates, strict=True):
        assert rate is not None
        assert share <= plan.base.share_at(rate) < share + 1e-3


def test_the_best_exchange_is_within_its_limits(plan: Plan) -> None:
    assert plan.allowed
    assert plan.choice is not None
    assert plan.choice.share >= 0.95
    assert plan.choice.penalty <= 1.0
    slow = made("--config", CONFIG, "--world-size", "16", "--link", "100kbit")
    assert not slow.allowed
    assert "no exchange has" in as_text(slow)


def test_json_has_the_numbers_of_the_text(plan: Plan) -> None:
    values = json.loads(json.dumps(as_json(plan)))
    assert values["utilisation"] == plan.base.share
    assert values["rates"]["mfu"] == {"value": 0.4, "origin": "assumed"}
    assert f"{values['utilisation']:.1%}" in as_text(plan)
    assert set(values["methods"]) == {method.name for method in plan.methods}


def test_a_plot_is_written(plan: Plan, tmp_path: Path) -> None:
    tool.draw(replace(plan, methods=plan.methods[-1:]), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_data_parallelism_in_one_site_needs_no_link() -> None:
    none = ("parallel.num_replicas=1", "outer.kind=none", "outer.lr=null", "outer.momentum=null",
            "outer.sync_interval=null")  # fmt: skip
    words = ("--config", CONFIG, "--world-size", "16", "--set", *none)
    one = made(*words)
    assert isinstance(one.base.config.outer, NoOuter)
    assert (one.base.share, one.base.exchange_bits, one.choice) == (1.0, 0.0, None)
    two = made(*words, "--sites", "2")
    assert two.base.share < 1


def test_warnings_name_what_is_not_meant() -> None:
    plain = ("--config", CONFIG, "--world-size", "16")
    assert not made(*plain).warnings
    of_k1 = made(*plain, "--set", "outer.lr=0.7", "outer.momentum=0.6").warnings
    assert any("K = 1;" in text for text in of_k1)
    cut = made(*plain, "--set", "training.train_iters=1010", "training.train_tokens=null").warnings
    assert any("33 rounds are few" in text for text in cut)
    assert any("20 inner steps follow the last round" in text for text in cut)
    rare = made(*plain, "--set", "checkpoint.save_interval=8000", "--mtbf", "20").warnings
    assert any("checkpoint.save_interval" in text for text in rare)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--gpu", "abacus"), "NVIDIA H100 80GB HBM3"),
        (("--link", "string"), ", ".join(LINKS)),
        (("--mfu", "40"), "--mfu 40 is not above 0 and up to 1"),
        (("--step-seconds", "1", "--measured", "runs"), "give one"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--config", CONFIG, "--world-size", "16", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_cpu_needs_a_measured_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--config", CPU]) == 2
    assert "--step-seconds" in capsys.readouterr().err
    assert tool.main(["--config", CPU, "--step-seconds", "0.25", "--link", "10Mbit"]) == 0
    assert "given" in capsys.readouterr().out


# ---- calibration ------------------------------------------------------------------------------


def test_a_log_gives_the_step_and_the_link(tmp_path: Path) -> None:
    # The first fifth of the points is left out: it is ten times as slow here.
    lines = [
        {"step": step, "values": {"perf/replica_step_ms": slow * 250.0,
                                  "muloco/exposed_ms": slow * 2000.0}}
        for step in range(1, 11)
        for slow in (10 if step <= 2 else 1,)
    ]  # fmt: skip
    (tmp_path / POINTS_FILE).write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    log = read_log(tmp_path)
    assert log == Log(tmp_path, 0.25, 2.0)
    base = made("--config", CPU, "--step-seconds", "1", "--link", "10Mbit").base
    rates = calibrated(base, log)
    found = made("--config", CPU, "--measured", str(tmp_path)).base
    assert found.rates == rates
    assert found.step.seconds == pytest.approx(0.25, rel=1e-12)
    assert found.exchange_seconds == pytest.approx(2.0, rel=1e-12)


def test_overlap_does_not_tell_the_link() -> None:
    words = ("--config", CPU, "--step-seconds", "1", "--set", "outer.overlap_steps=2")
    base = made(*words).base
    rates = calibrated(base, Log(Path("log"), 0.25, 0.001))
    assert rates.step is not None
    assert rates.link == base.rates.link


def test_a_directory_without_points_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--config", CPU, "--measured", str(tmp_path)]) == 2
    assert "no points" in capsys.readouterr().err


# ---- published and measured numbers -------------------------------------------------------------


@pytest.fixture(scope="module")
def check() -> Check:
    return Check()


def test_every_bar_holds(check: Check) -> None:
    assert [bar.words for bar in check.bars() if not bar.holds] == []


def test_both_bandwidth_tables_have_all_their_cells(check: Check) -> None:
    assert [len(cells) for _, cells in check.tables()] == [75, 75]
    assert len(check.measured) == 48
    assert len(check.hours) == 12


def test_the_fitted_number_is_better_than_its_neighbours() -> None:
    ours, less, more = (
        within(bandwidth_cells(Parameters(sent)), 0) for sent in (PARAMETERS.sent, 0.6, 1.0)
    )
    assert ours > max(less, more)


def test_the_page_is_what_the_command_writes(check: Check) -> None:
    written = (ROOT / "docs/performance/planner.md").read_text(encoding="utf-8")
    for bar in check.bars():
        assert f"| {bar.words} | {bar.found} | {bar.limit} | holds |" in written
