"""Configs from published tables and from a study: labels, laws, and the six shipped 15B files."""

import csv
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student

from megatron_muloco.config import load_config
from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling import Observations, fit, prediction_interval, read_table
from megatron_muloco.training.main import main as pretrain
from tools import extrapolate
from tools.scaling.evidence import Published
from tools.scaling.labelled import (
    KINDS,
    Prediction,
    Target,
    Value,
    config_text,
    lr_step,
    power_of_two,
)
from tools.scaling.published import DIRECTORY
from tools.scaling.ready import CONFIGS, model_budget, ready_config, tokens_of
from tools.scaling.study import Study

MODEL_15B = CONFIGS / "models/15b.yaml"


def target(method: str = "muloco", replicas: int = 16, size: float = 15229089792) -> Target:
    """Return a target with 20 tokens per parameter; the paper's own budget at 15B."""
    tokens = 304758128640 if size == 15229089792 else 20 * size
    return Target("size", int(size), tokens, method, replicas)


# ---- the shipped configs ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return extrapolate.all_15b(CONFIGS)


@pytest.mark.parametrize("name", extrapolate.RUNS_15B)
def test_shipped_15b_configs_are_what_the_command_writes(
    name: str, written: dict[str, str]
) -> None:
    shipped = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    assert shipped == written[name], f"write it again: {extrapolate.COMMAND_15B}"


@pytest.mark.parametrize("name", extrapolate.RUNS_15B)
def test_shipped_15b_configs_pass_a_dry_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain(["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run"])
    assert not ended.value.code
    assert "15,229,089,792" in capsys.readouterr().out


def labels(text: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the first words of the label of each value of a file."""
    for line in text.splitlines():
        if match := re.match(r"\s+(\w+): [^#]*#\s(.*)", line):
            yield match[1], match[2]


@pytest.mark.parametrize("name", extrapolate.RUNS_15B)
def test_every_value_of_the_15b_configs_has_a_kind_of_label(
    name: str, written: dict[str, str]
) -> None:
    found = dict(labels(written[name]))
    assert all(label.partition(":")[0] in KINDS for label in found.values())
    needed = {"global_batch_size", "lr", "lr_warmup_iters", "weight_decay_base"}
    needed |= {"momentum", "sync_interval"} if "dp" not in name else set()
    assert needed <= set(found)
    assert {"train_iters", "train_tokens"} & set(found)


def test_the_command_writes_its_files_to_any_directory(
    tmp_path: Path, written: dict[str, str]
) -> None:
    assert extrapolate.main(["published", "--all-15b", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.yaml")} == set(written)
    for name in written:
        here, there = (load_config(each / f"{name}.yaml") for each in (tmp_path, CONFIGS))
        assert here.model_dump() == there.model_dump()


# ---- published evidence -------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "replicas"), extrapolate.RUNS_15B.values())
def test_the_batch_law_is_within_a_step_of_what_the_paper_ran_at_15b(
    method: str, replicas: int
) -> None:
    # The law never sees 15B; the paper's batches there are on a grid of powers of two.
    run = target(method, replicas)
    published = Published()
    law = power_of_two(published.best_batch(run).value / run.seq_length)
    assert abs(math.log2(law / published.batch(run).value)) <= 1


@pytest.mark.parametrize(("method", "replicas"), extrapolate.RUNS_15B.values())
def test_batches_of_15b_are_below_the_critical_batch(method: str, replicas: int) -> None:
    run = target(method, replicas)
    assert Published().batch(run).value * run.seq_length < Published().critical(run).value


def test_muons_lr_at_15b_is_the_one_that_is_known() -> None:
    # Without the known value itself, the law is a step of the grid away at most.
    published = Published()
    run = target("dp_muon", 1)
    points = published.muon_lr_fit.points
    others = points.where(points.variables["params"] < run.params)
    alone = lr_step(float(fit("power", others).predict({"params": [run.params]})[0]))
    known = published.inner_lr(run)
    assert known.label.startswith("paper")
    assert abs(math.log2(alone / known.value)) <= 0.5 + 1e-3


def test_a_value_between_the_tables_is_the_laws() -> None:
    run = target("muloco", 8, 1.759e9)
    law, value = Published().lr_law(run), Published().inner_lr(run)
    assert value.value == lr_step(law.value)
    assert law.low < law.value < law.high
    assert f"{law.value:.4g}" in value.label
    assert value.label.startswith("fitted")


@pytest.mark.parametrize(("method", "replicas"), [("diloco", 1), ("diloco", 16), ("dp_adamw", 1)])
def test_two_points_give_no_interval(method: str, replicas: int) -> None:
    law = Published().lr_law(target(method, replicas))
    assert math.isnan(law.low)
    assert math.isnan(law.high)
    assert "interval unknown" in Published().inner_lr(target(method, replicas)).label


def test_tuned_settings_are_taken_as_they_are() -> None:
    run = Target("416M", 416900000, 8.56e9, "muloco", 8)
    assert Published().batch(run).value == 512
    assert Published().inner_lr(run).value == 0.0625
    assert Published().inner_lr(run).label.startswith("paper")


@pytest.mark.parametrize("method", ["muloco", "diloco"])
@pytest.mark.parametrize("replicas", [1, 2, 4, 8, 16])
def test_outer_values_are_those_of_the_shipped_methods(
    tmp_path: Path, method: str, replicas: int
) -> None:
    run = tmp_path / "run.yaml"
    parents = f"[{MODEL_15B}, {CONFIGS}/methods/{method}_k{replicas}.yaml]"
    run.write_text(f"extends: {parents}\ncheckpoint: {{dir: runs/x}}\n")
    outer = load_config(run).outer
    found = {value.key: value.value for value in Published().outer(target(method, replicas))}
    assert found["outer.lr"] == pytest.approx(outer.lr)
    assert found["outer.momentum"] == pytest.approx(outer.momentum)
    assert found["outer.sync_interval"] == outer.sync_interval


def test_outer_values_do_not_fall_with_replicas() -> None:
    outer = [
        [value.value for value in Published().outer(target("muloco", k))[:2]]
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 64)
    ]
    for lower, higher in pairwise(outer):
        assert lower[0] <= higher[0]
        assert lower[1] <= higher[1]


def test_more_tokens_never_give_a_smaller_batch() -> None:
    for method, replicas in [("muloco", 4), ("diloco", 4), ("dp_adamw", 1)]:
        batches = [
            Published().batch(Target("x", 1_000_000_000, tokens, method, replicas)).value
            for tokens in np.geomspace(2e9, 1e12, 12)
        ]
        assert batches == sorted(batches)


def test_data_parallelism_with_replicas_is_refused() -> None:
    with pytest.raises(ConfigError, match="no outer step"):
        target("dp_muon", 4)


def test_one_config_of_another_size_passes(capsys: pytest.CaptureFixture[str]) -> None:
    words = "published --model 914m --method diloco --replicas 3 --tokens 30e9"
    assert extrapolate.main(words.split()) == 0
    text = capsys.readouterr().out
    assert "num_replicas: 3" in text
    assert "interval unknown" in text


# ---- tokens and numbers -------------------------------------------------------------------------


def test_token_budgets_are_read() -> None:
    assert model_budget(MODEL_15B).train_tokens == 304758128640
    assert tokens_of("20x", 1000) == 20_000
    assert tokens_of("30B", 1000) == tokens_of("30e9", 1000) == 30e9


@pytest.mark.parametrize("text", ["x", "many", "-3e9", "0", "nan", "20 x y", "inf", ""])
def test_no_token_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="token budget"):
        tokens_of(text, 1000)


def test_snapping_goes_to_the_nearest_step() -> None:
    assert [power_of_two(x) for x in (0.3, 1, 90.5, 90.6, 512)] == [1, 1, 64, 128, 512]
    assert [lr_step(x) for x in (0.0625, 0.05, 0.011, 0.000691)] == [
        0.0625,
        0.044194,
        0.011049,
        0.000691,
    ]


def test_a_config_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    values = [
        Value("training.global_batch_size", 64, "chosen: " + "long words " * 30),
        Value("inner.weight_decay_base", 5e-5, "rule: x"),
        Value("outer.fragments.count", 3, "rule: x"),
        Value("outer.fragments.pattern", "strided", "rule: x"),
        Value("outer.lr", 1.0, "rule: x"),
        Value("checkpoint.dir", "runs/x"),
    ]
    parents = [MODEL_15B, CONFIGS / "methods/muloco_k2.yaml"]
    path = tmp_path / "run.yaml"
    path.write_text(config_text(["A title."], parents, values))
    config = load_config(path)
    assert config.training.global_batch_size == 64
    assert config.inner.weight_decay_base == 5e-5
    assert config.outer.fragments.count == 3
    assert config.outer.lr == 1.0
    assert max(map(len, path.read_text().splitlines()[2:])) <= 100


def test_a_label_has_a_kind() -> None:
    with pytest.raises(ValueError, match="no kind"):
        Value("inner.lr", 1.0, "somewhere")


def test_an_unknown_interval_is_said() -> None:
    assert "interval unknown" in Prediction(1.0, "law").words
    assert "95 % 0.5 to 2" in Prediction(1.0, "law", 0.5, 2.0).words


def test_a_prediction_interval_is_that_of_a_regression() -> None:
    x, y = np.array([1.0, 2.0, 4.0, 16.0]), np.array([3.0, 5.5, 13.0, 40.0])
    found = fit("power", Observations({"n": x}, y))
    low, high = prediction_interval(found, {"n": 64.0})
    logs = np.log(x)
    # The textbook's: s² (1 + 1/n + (x - mean)² / Sxx), Student's t with n - 2 degrees of freedom.
    leverage = 1 / 4 + (np.log(64) - logs.mean()) ** 2 / ((logs - logs.mean()) ** 2).sum()
    reach = student.ppf(0.975, 2) * found.sigma * np.sqrt(1 + leverage)
    centre = np.log(found.predict({"n": [64.0]})[0])
    assert np.log([low, high]) == pytest.approx([centre - reach, centre + reach], rel=1e-9)


# ---- a study ------------------------------------------------------------------------------------


def study(
    tmp_path: Path, sizes: tuple[float, ...] = (1e6, 4e6, 1.6e7), shift: float = 0.0, **extra: str
) -> Path:
    """Write a study with best inner lr 0.08 (N / 1e6)^-0.5 and best batch 8192 (N / 1e6)^0.5.

    ``shift`` moves the grid of learning rates by powers of 2, so that optima lie at its end.
    """
    rows = []
    for size in sizes:
        best_lr, best_batch = 0.08 * (size / 1e6) ** -0.5, 8192 * (size / 1e6) ** 0.5
        for lr in 0.04 * 2.0 ** (np.arange(-3, 3) + shift):
            for batch in 2.0 ** np.arange(11, 19):
                tokens = 20 * size * (1 + 0.01 * (batch > 30_000))  # whole steps, as in a sweep
                for seed in (1, 2):
                    bowl = np.log2(lr / best_lr) ** 2 + 0.5 * np.log2(batch / best_batch) ** 2
                    loss = 3 * (size / 1e6) ** -0.05 + 0.01 * bowl + 0.001 * (seed - 1.5)
                    rows.append(
                        {
                            "run": f"r{len(rows)}", "status": "ok", "method": "muloco",
                            "replicas": "4", "seed": seed, "params_total": size,
                            "tokens": tokens, "batch_tokens": batch, "seq_length": 256,
                            "inner.lr": lr, "outer.lr": 0.7 if lr < best_lr else 0.9,
                            "outer.momentum": "0.6", "training.global_batch_size": batch / 256,
                            "loss": loss, **extra,
                        }
                    )  # fmt: skip
    rows.append(rows[0] | {"run": "d", "status": "diverged", "loss": "nan"})
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        file.write("# a study\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def of(path: Path) -> Study:
    return Study(read_table(path), Published())


def test_a_study_continues_its_laws(tmp_path: Path) -> None:
    evidence = of(study(tmp_path))
    run = Target("big", int(6.4e7), 20 * 6.4e7, "muloco", 4)
    lr, batch = evidence.inner_lr(run), evidence.batch(run)
    # The bowls are parabolas in log2, so the optima are exact and so are the laws through them.
    assert lr.value == lr_step(0.08 * 64**-0.5)
    assert batch.value == power_of_two(8192 * 64**0.5 / 2048)
    for value in (lr, batch):
        assert value.label.startswith("fitted")
        assert "3 optima of the study" in value.label
        assert "extrapolated by 4x" in value.label


def test_a_study_at_its_own_size_is_measured(tmp_path: Path) -> None:
    evidence = of(study(tmp_path))
    run = Target("here", int(4e6), 8e7, "muloco", 4)
    lr = evidence.inner_lr(run)
    assert lr.label.startswith("measured: 0.04 is the best of")
    assert lr.value == 0.04


def test_two_sizes_give_a_trend_without_an_interval(tmp_path: Path) -> None:
    evidence = of(study(tmp_path, sizes=(1e6, 4e6)))
    lr = evidence.inner_lr(Target("big", int(1.6e7), 3.2e8, "muloco", 4))
    assert lr.value == lr_step(0.08 * 16**-0.5)
    assert "interval unknown" in lr.label


def test_optima_at_the_end_of_a_grid_are_named(tmp_path: Path) -> None:
    evidence = of(study(tmp_path, shift=-3.0))
    lr = evidence.inner_lr(Target("big", int(6.4e7), 1.28e9, "muloco", 4))
    assert "end of a grid" in lr.label
    assert "the largest that was tried" in lr.label


def test_what_a_study_does_not_vary_comes_from_the_paper(tmp_path: Path) -> None:
    evidence = of(study(tmp_path))
    run = Target("big", int(6.4e7), 1.28e9, "muloco", 4)
    outer = {value.key: value for value in evidence.outer(run)}
    assert outer["outer.lr"].label.startswith("fitted: as the best run of K = 4")
    published = {value.key: value for value in Published().outer(run)}
    assert outer["outer.momentum"] == published["outer.momentum"]
    assert evidence.weight_decay(run) == Published().weight_decay(run)


def test_the_nearest_number_of_replicas_is_used_and_named(tmp_path: Path) -> None:
    evidence = of(study(tmp_path))
    outer = evidence.outer(Target("here", int(1.6e7), 3.2e8, "muloco", 16))
    assert "K = 4" in outer[0].label
    assert outer[0].label.startswith("fitted")


def test_a_study_writes_a_config_that_passes(tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    words = ["study", str(study(tmp_path)), "--model", "150m", "--method", "muloco"]
    assert extrapolate.main([*words, "--replicas", "4", "--output", str(out)]) == 0
    assert load_config(out).parallel.num_replicas == 4


def test_a_study_of_other_methods_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run of diloco; it has muloco"):
        of(study(tmp_path)).inner_lr(Target("x", 10**7, 1e9, "diloco", 4))


def test_a_table_that_is_no_study_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no column status"):
        of(DIRECTORY / "muloco_losses.csv").batch(target())


def test_a_study_without_finished_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run has status ok"):
        of(study(tmp_path, status="diverged")).batch(target())


def test_a_missing_model_names_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert extrapolate.main(["published", "--model", "7b"]) == 2
    assert "15b" in capsys.readouterr().err
    assert extrapolate.main(["published"]) == 2


def test_a_config_is_ready_for_every_method_of_a_size() -> None:
    model = CONFIGS / "models/1.76b.yaml"
    budget = model_budget(model)
    for method, replicas in [("muloco", 5), ("diloco", 2), ("dp_muon", 1), ("dp_adamw", 1)]:
        run = Target("x", budget.parameters.total, budget.train_tokens, method, replicas)
        ready = ready_config(run, Published(), model, "runs/x")
        keys = [value.key for value in ready.values]
        assert len(set(keys)) == len(keys)
        assert ("outer.lr" in keys) == run.has_outer_step
