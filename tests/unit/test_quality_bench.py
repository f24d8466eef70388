"""The quality bench: its grid can run, its pairs are pairs, its verdicts follow their rules."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megatron_muloco.config import load_config
from megatron_muloco.errors import ConfigError
from tools.bench.quality import __main__ as command
from tools.bench.quality import runs
from tools.bench.quality.drawing import draw
from tools.bench.quality.grid import (
    COMPARISONS,
    INTERVALS,
    PLAIN,
    VARIANTS,
    Rule,
    chosen_variants,
    seeds_of,
)
from tools.bench.quality.page import SWEEPS, page
from tools.bench.quality.statistics import (
    EQUAL_PERCENT,
    Interval,
    does_not_fall,
    interval,
    percent_differences,
    rises_less,
    verdict,
)


def result(variant: str, seed: int, loss: float) -> runs.Result:
    return runs.Result(
        variant=variant,
        seed=seed,
        settings=runs.settings_of(VARIANTS[variant], seed),
        config_digest=runs.config_digest(),
        iterations=480,
        loss=loss,
        initial_loss=8.75,
        bytes_sent=1_000_000,
        seconds=30.0,
        commit="abc",
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_run_that_passes_the_checks(name: str) -> None:
    config = load_config(runs.CONFIG, runs.settings_of(VARIANTS[name], 3))
    assert (config.training.seed, config.data.seed) == (3, 3)
    assert config.training.train_iters % config.outer.sync_interval == 0
    assert config.training.eval_interval == config.training.train_iters
    assert config.parallel.num_replicas == 2  # the page says so


def test_variants_differ_from_their_baseline_in_what_their_name_says() -> None:
    swept = {name for names in SWEEPS.values() for name in names}
    for name, keys in VARIANTS.items():
        base = load_config(runs.CONFIG, VARIANTS["muloco-h30" if name in swept else PLAIN])
        config = load_config(runs.CONFIG, keys)
        assert (config.model, config.training) == (base.model, base.training)
        assert (config.inner == base.inner) == (not name.startswith("diloco"))
        assert (config.outer == base.outer) == (name in (PLAIN, "muloco-h30", "diloco-h30"))


def test_overlap_waits_neither_for_nothing_nor_for_the_next_launch() -> None:
    for name in ("overlap-mix", "overlap-additive", "low-bandwidth"):
        outer = load_config(runs.CONFIG, VARIANTS[name]).outer
        assert outer.fragments.count >= 3
        assert 0 < outer.overlap_steps < outer.sync_interval // outer.fragments.count


def test_comparisons_and_sweeps_are_of_variants() -> None:
    named = {name for pair in COMPARISONS for name in (pair.variant, pair.baseline)}
    named |= {name for names in SWEEPS.values() for name in names}
    assert named <= set(VARIANTS)
    for names in SWEEPS.values():
        lengths = [load_config(runs.CONFIG, VARIANTS[name]).outer.sync_interval for name in names]
        assert tuple(lengths) == INTERVALS


def test_choosing_variants() -> None:
    assert set(chosen_variants([], "")) == set(VARIANTS)
    assert list(chosen_variants(["muloco-h15", "diloco-h15"], "diloco")) == ["diloco-h15"]
    with pytest.raises(ConfigError, match="muloco-h7 unknown"):
        chosen_variants(["muloco-h7"], "")
    with pytest.raises(ConfigError, match="no variant"):
        chosen_variants([], "nonesuch")


def test_the_interval_is_students() -> None:
    of = interval([1.0, 2.0, 3.0])
    # Standard deviation 1; the 97.5 % quantile at two degrees of freedom is 4.30265 in any table.
    assert of.mean == 2
    assert of.half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert math.isnan(interval([1.0]).half_width)


def test_what_all_runs_of_a_seed_share_leaves_no_spread() -> None:
    baseline = {1: 4.0, 2: 8.0, 3: 2.0}
    losses = {"plain": baseline, "other": {seed: 1.25 * loss for seed, loss in baseline.items()}}
    found = percent_differences(losses, "other", "plain")
    assert found == {1: 25, 2: 25, 3: 25}
    assert interval(list(found.values())).half_width == 0


def test_only_seeds_of_both_are_compared() -> None:
    losses = {"a": {1: 2.0, 2: 4.0}, "b": {2: 2.0, 3: 2.0}}
    assert percent_differences(losses, "a", "b") == {2: 100}
    assert percent_differences(losses, "a", "missing") == {}


@pytest.mark.parametrize(
    ("rule", "mean", "half_width", "expected"),
    [
        (Rule.EQUAL, EQUAL_PERCENT, 9, "shown"),
        (Rule.EQUAL, -2 * EQUAL_PERCENT, 0, "not shown"),
        (Rule.EQUAL, 2 * EQUAL_PERCENT, 9, "not shown"),
        (Rule.NO_WORSE, -2 * EQUAL_PERCENT, 0, "shown"),
        (Rule.NO_WORSE, 2 * EQUAL_PERCENT, 9, "not shown"),
        (Rule.BETTER, -2, 1, "shown"),
        (Rule.BETTER, -2, 3, "in the mean only"),
        (Rule.BETTER, -2, math.nan, "in the mean only"),
        (Rule.BETTER, 1, 0, "not shown"),
        (Rule.SHOWN, 1, 0, "-"),
    ],
)
def test_a_verdict_follows_its_rule(
    rule: Rule, mean: float, half_width: float, expected: str
) -> None:
    assert verdict(rule, Interval(mean, half_width, 3)) == expected


def test_a_fall_within_the_rule_is_none() -> None:
    names = ["a", "b", "c"]
    assert does_not_fall({"a": {1: 4.0}, "b": {1: 4.1}, "c": {1: 4.09}}, names) is True
    assert does_not_fall({"a": {1: 4.0}, "b": {1: 4.1}, "c": {1: 4.0}}, names) is False
    assert does_not_fall({"a": {1: 4.0}, "b": {1: 4.1}}, names) is None


def test_rises_are_compared_in_percentage_points() -> None:
    losses = {
        "m15": {1: 4.0, 2: 5.0},
        "m120": {1: 4.4, 2: 5.5},
        "d15": {1: 8.0, 2: 4.0},
        "d120": {1: 10.0, 2: 5.0},
    }
    apart = rises_less(losses, ["m15", "m120"], ["d15", "d120"])
    assert apart is not None
    assert apart.mean == pytest.approx(10 - 25)
    assert rises_less(losses, ["m15", "m120"], ["d15", "missing"]) is None


def pretend(tasks: Sequence[runs.Task], commit: str) -> Iterator[runs.Result]:
    for task in tasks:
        yield dataclasses.replace(result(task.variant, task.seed, 4.5), commit=commit)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that the campaign starts, by name; they end at once, and the program is "now"."""
    names: list[str] = []

    def run_all(
        out: Path, tasks: Sequence[runs.Task], commit: str, workers: int
    ) -> Iterator[runs.Result]:
        for each in pretend(tasks, commit):
            names.append(f"{each.variant} {each.seed}")
            runs._store(each, runs.path_of(out, each.variant, each.seed))
            yield each

    monkeypatch.setattr(command, "run_all", run_all)
    monkeypatch.setattr(runs, "program_commit", lambda: "now")
    return names


def test_a_run_is_stored_once_and_found_again(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--variants", "low-bandwidth", "--seeds", "1", "2"]
    for _ in range(2):
        assert command.main(arguments) == 0
    assert started == ["low-bandwidth 1", "low-bandwidth 2"]
    assert "low-bandwidth" in capsys.readouterr().out


def test_a_campaign_needs_a_commit(
    tmp_path: Path,
    started: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runs, "program_commit", lambda: "now+")
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "differs from commit now," in capsys.readouterr().err
    assert not started


def test_rows_of_another_commit_are_replaced_only_when_told_so(
    tmp_path: Path, started: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--variants", PLAIN, "--seeds", "1"]
    old = result("linear-4", 2, 4.4)
    runs._store(old, runs.path_of(tmp_path, old.variant, old.seed))
    assert command.main(arguments) == 2
    assert "1 of abc, and the program is now" in capsys.readouterr().err
    assert not started
    assert command.main([*arguments, "--fresh"]) == 0
    assert "removed linear-4, seed 2, of abc" in capsys.readouterr().out
    assert started == ["plain 1"]
    runs._store(old, runs.path_of(tmp_path, old.variant, old.seed))
    assert command.main(["--out", str(tmp_path), "--report-only"]) == 2
    assert "1 of abc, 1 of now" in capsys.readouterr().err


def test_comparisons_find_their_seeds_on_both_sides() -> None:
    for pair in COMPARISONS:
        for name in (pair.variant, pair.baseline):
            assert set(range(1, pair.seeds + 1)) <= set(seeds_of(name))
        two_bits = "-2" in pair.variant + pair.baseline or pair.variant == "low-bandwidth"
        assert pair.seeds == (8 if two_bits else 3)
    assert len(seeds_of("muloco-h15")) == 3


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    other = {**vars(result(PLAIN, 1, 4.5)), "settings": ["outer.lr=0.1"]}
    runs.path_of(tmp_path, PLAIN, 1).write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ConfigError, match="other settings"):
        runs.read_result(tmp_path, PLAIN, 1, VARIANTS[PLAIN])
    assert runs.read_result(tmp_path, PLAIN, 2, VARIANTS[PLAIN]) is None


def test_a_failed_run_is_named_and_others_are_stored(tmp_path: Path) -> None:
    """In real workers; the settings are refused before the program is loaded."""
    task = runs.Task(PLAIN, 1, ("outer.no_such_key=1",))
    with pytest.raises(ConfigError, match=r"plain, seed 1: the run failed.*no_such_key"):
        list(runs.run_all(tmp_path, [task], "now", workers=1))
    assert not list(tmp_path.glob("*.json"))


def test_the_page_says_what_was_not_run_and_draws_the_rest(tmp_path: Path) -> None:
    results = [
        result(name, seed, 4 + length / 1000 + seed)
        for names in SWEEPS.values()
        for name, length in zip(names, INTERVALS, strict=True)
        for seed in (1, 2)
    ] + [result("fragments-3", 1, 5.1), result(PLAIN, 1, 5.0)]
    text = page(results, "the command", "quality.png")
    assert "| linear-4 | plain |  | not run |" in text
    assert (
        "| fragments-3 | plain | +2.00 | +2.00 | one seed | equal | not shown; 1 of 3 seeds |"
        in text
    )
    assert "+0.00 percentage points" in text
    assert max(map(len, text.splitlines())) <= 125
    draw(results, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--report-only"]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_comments_make_no_other_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, text = runs.config_digest(), runs.CONFIG.read_text(encoding="utf-8")
    monkeypatch.setattr(runs, "CONFIG", tmp_path / "small.yaml")
    runs.CONFIG.write_text(f"# A remark.\n{text}", encoding="utf-8")
    assert runs.config_digest() == before
    runs.CONFIG.write_text(text.replace("hidden_size: 64", "hidden_size: 32"), encoding="utf-8")
    assert runs.config_digest() != before
