"""`tools/compare.py`: equal tokens, time and bytes by hand, the page in a browser, bad input."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_muloco.config import RunConfig, derive, load_config, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.build import run_facts
from megatron_muloco.monitor.writers import PointLog
from megatron_muloco.planning import traffic_plan
from tools import demo_summary
from tools.compare import comparison_of, main
from tools.comparing.courses import data_parallel, warnings_of
from tools.run_points import read_run

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = 4096  # of a step of the CPU runs
ROUND = 1000  # bytes of an outer step below; H is 5


def refuse(message):
    raise AssertionError(message)


def write(directory, name, losses, *overrides, world=2, seconds=0.1, steps=None):
    """Write the points of a run with evaluations at some steps, a line every ten steps."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    topology = topology_of(config, world)
    facts = run_facts(config, topology, derive(config, topology), device="cpu")
    log = PointLog(str(directory), facts, resumed_step=0, report=refuse)
    steps = steps or max(losses)
    for step in range(10, steps + 1, 10):
        log.scalars(step, {"lm loss": 9.0, "iteration-time": seconds, "perf/tokens_per_s": 5.0})
    if config.outer.kind != "none":
        for step in range(config.outer.sync_interval, steps + 1, config.outer.sync_interval):
            log.scalars(step, {"muloco/wire_bytes": ROUND})
    for step, loss in losses.items():
        log.scalars(step, {"lm loss validation": loss})
    log.close()
    return directory


@pytest.fixture
def runs(tmp_path):
    """Two runs: MuLoCo, slower, evaluated to step 100; Muon data parallelism, to step 200."""
    return [
        write(tmp_path / "muloco", "cpu_muloco", {0: 8.0, 50: 6.0, 100: 5.0}, seconds=0.4),
        write(tmp_path / "muon", "cpu_dp_muon", {0: 8.0, 100: 4.0, 200: 3.0}),
    ]


def row(comparison, name):
    """Return the cells of a row by what its name begins with."""
    (cells,) = [cells for label, cells in comparison.rows() if label.strip().startswith(name)]
    return cells


def test_losses_are_compared_at_what_every_run_has_reached(runs):
    comparison = comparison_of(runs)
    assert comparison.tokens == 100 * TOKENS
    assert row(comparison, f"held-out loss at {100 * TOKENS / 1e3:.4g}k tokens") == [
        "5.0000",
        "4.0000",
    ]
    assert row(comparison, "above its data-parallel run") == ["+25.00 %", "-"]
    # Data parallelism took 20 s for 200 steps, and MuLoCo is at step 50 then.
    assert comparison.seconds == pytest.approx(20.0)
    assert row(comparison, "held-out loss at 20.0 s") == ["6.0000", "3.0000"]
    assert row(comparison, "last held-out loss") == ["5.0000", "3.0000"]
    assert row(comparison, "training time") == ["40.0 s", "20.0 s"]
    assert row(comparison, "ranks") == ["2", "2"]
    assert row(comparison, "steps of a round") == ["5", "-"]


def test_between_evaluations_the_loss_is_on_a_line(tmp_path, runs):
    other = write(tmp_path / "other", "cpu_muloco", {0: 8.0, 150: 2.0})
    comparison = comparison_of([runs[0], other])
    assert comparison.courses[1].loss_at(100 * TOKENS, comparison.courses[1].tokens) == 4.0
    late = write(tmp_path / "late", "cpu_muloco", {120: 2.0})
    assert row(comparison_of([runs[0], late]), "held-out loss at 409.6k")[1] == "n/a"


def test_bytes_are_measured_between_replicas_and_planned_inside(runs):
    muloco, muon = comparison_of(runs).courses
    step = traffic_plan(muon.config, topology_of(muon.config, 2)).inner_step
    assert step > 0
    assert muon.bytes_sent(200) == 200 * step
    assert muloco.bytes_sent(100) == 20 * ROUND  # a replica is one rank
    # What data parallelism would have sent is what the other run, which is it, has sent.
    assert muloco.data_parallel_bytes == step
    assert muon.data_parallel_bytes == step
    comparison = comparison_of(runs)
    assert comparison.bytes == 20 * ROUND
    at_bytes = 8.0 + (4.0 - 8.0) * 20 * ROUND / (100 * step)
    assert row(comparison, "held-out loss at 20 kB") == ["5.0000", f"{at_bytes:.4f}"]
    assert row(comparison, "times as much") == [f"{100 * step / (20 * ROUND):.1f}", "1.0"]


def test_data_parallelism_on_fewer_ranks_has_the_bytes_of_as_many(tmp_path, runs):
    alone = write(tmp_path / "alone", "cpu_dp_muon", {0: 8.0, 100: 4.0}, world=1)
    comparison = comparison_of([runs[0], alone])
    assert comparison.courses[1].bytes_sent(100) == comparison_of(runs).courses[1].bytes_sent(100)
    (warning,) = [text for text in warnings_of(comparison.courses) if "of 2 ranks" in text]
    assert warning.startswith("alone ran on 1 of 2 ranks")


def test_runs_of_one_rank_that_sent_nothing_have_no_loss_at_equal_bytes(tmp_path):
    names = ("cpu_dp_muon", "cpu_dp_adamw")
    runs = [write(tmp_path / name, name, {0: 8.0, 50: 4.0}, world=1) for name in names]
    comparison = comparison_of(runs)
    assert row(comparison, "held-out loss at n/a") == ["n/a", "n/a"]
    assert row(comparison, "times as much") == ["n/a", "n/a"]


def test_a_ramp_of_the_batch_counts_its_own_tokens(tmp_path):
    ramp = "training.rampup_batch_size=[16, 16, 160]"  # ten steps of 16 sequences, then 32
    small = "training.micro_batch_size=8"
    run = write(tmp_path / "ramp", "cpu_dp_muon", {0: 8.0, 50: 4.0}, ramp, small)
    (course,) = comparison_of([run]).courses
    assert course.tokens(50) == (10 * 16 + 40 * 32) * 128


def test_what_makes_runs_unequal_is_said(tmp_path, runs):
    other = write(tmp_path / "other", "cpu_muloco", {0: 8.0, 500: 4.0}, "model.num_layers=3")
    texts = list(warnings_of(comparison_of([*runs, other]).courses))
    assert any(text.startswith("other: another model than muloco") for text in texts)
    assert any(text.startswith("muloco ended at step 100 of 500") for text in texts)
    assert not any(text.startswith("other ended") for text in texts)
    same = write(tmp_path / "same", "cpu_muloco", {500: 4.0})
    assert list(warnings_of(comparison_of([same]).courses)) == []


def test_all_bad_runs_are_refused_at_once(tmp_path, runs, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(runs[0]), str(empty), str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: {empty}: neither points.jsonl nor event files" in said.err
    assert f"error: {tmp_path / 'nowhere'}: no such directory" in said.err


def test_losses_that_cannot_be_compared_are_refused(tmp_path, runs):
    no_evaluation = write(tmp_path / "none", "cpu_muloco", {}, steps=10)
    with pytest.raises(ConfigError, match="none: no `lm loss validation` among its points"):
        comparison_of([runs[0], no_evaluation])
    other = write(tmp_path / "other", "cpu_k2", {0: 8.0, 50: 4.0})
    with pytest.raises(ConfigError, match=r"another model\.vocab_size, 512 and 4096"):
        comparison_of([runs[0], other])
    with pytest.raises(ConfigError, match="a run is given twice"):
        comparison_of([runs[0], runs[0]])


def test_names_are_as_long_as_they_must_be(tmp_path):
    losses = {0: 8.0, 50: 4.0}
    runs = [write(tmp_path / k / "tensorboard", "cpu_muloco", losses) for k in ("a", "b")]
    for given in (runs, [tmp_path / "a", tmp_path / "b"]):
        assert [course.name for course in comparison_of(given).courses] == ["a", "b"]
    deep = write(tmp_path / "deep" / "a", "cpu_muloco", losses)
    names = [course.name for course in comparison_of([runs[0], deep]).courses]
    assert names == [f"{tmp_path.name}/a", "deep/a"]


# ---- the demo ------------------------------------------------------------------------------------


def test_the_demo_is_compared_with_a_baseline_or_says_why_not(tmp_path, runs):
    text = demo_summary.comparison(str(runs[0]), runs[1])
    assert str(comparison_of(runs)) in text
    assert "note: muloco ended at step 100 of 500" in text
    other = write(tmp_path / "other", "cpu_k2", {0: 8.0, 50: 4.0})
    text = demo_summary.comparison(str(runs[0]), other)
    assert text.startswith(f"No comparison with {other}: muloco and other have another model.vocab")


def test_the_committed_baseline_is_the_demo_with_data_parallelism():
    baseline = read_run(demo_summary.BASELINE)
    config = RunConfig.model_validate(baseline.facts["config"])
    demo = data_parallel(load_config(CONFIGS / "cpu_k2.yaml"))
    places = {"checkpoint", "monitor"}
    assert config.model_dump(exclude=places) == demo.model_dump(exclude=places)
    assert baseline.last_step > 0


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_equal_runs_give_equal_pages(tmp_path, runs, capsys):
    pages = [tmp_path / "new" / "page.html", tmp_path / "again.html"]
    for page in pages:
        assert main([*map(str, runs), "--html", str(page)]) == 0
    text = pages[0].read_text()
    assert text == pages[1].read_text()
    # Names of XML namespaces are not loaded.
    assert not re.search(r'(src|(?<!xlink:)href)="(?!#)', text)
    assert "<script" not in text
    assert "@import" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert f"page: {pages[0]}" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_bad_input(tmp_path, runs, capsys):
    assert main([str(runs[0]), "--html", str(tmp_path)]) == 2
    assert f"--html {tmp_path}: cannot be written" in capsys.readouterr().err


def test_a_browser_shows_the_table_and_the_plots(tmp_path, runs):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    page = tmp_path / "page.html"
    assert main([*map(str, runs), "--html", str(page)]) == 0
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    dom = done.stdout
    table = dom[dom.index('<table id="comparison"') : dom.index("</table>")]
    shown = [
        [html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall("<t[hd]>.*?</t[hd]>", r)]
        for r in re.findall("<tr>.*?</tr>", table, re.DOTALL)
    ]
    comparison = comparison_of(runs)
    assert shown == [["", "muloco", "muon"], *([name, *cells] for name, cells in comparison.rows())]
    plots = re.findall('<figure id="[a-z]+">.*?</figure>', dom, re.DOTALL)
    assert len(plots) == 4
    for plot in plots:
        for label in ("muloco: MuLoCo, K = 2", "muon: Muon data parallelism", "nats per token"):
            assert label in plot
        for colour in ("#1f77b4", "#ff7f0e"):  # one a run: a line and its entry in the legend
            assert len(re.findall(f"stroke: {colour}", plot)) >= 2
