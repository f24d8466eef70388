"""Critical batches of curves whose answer is known, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_muloco.checkpoint.layout import STATE_FILE
from megatron_muloco.checkpoint.state import FORMAT, Description
from megatron_muloco.config.load import load_config
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.writers import EventWriter, PointLog
from megatron_muloco.scaling.critical import (
    critical_batch,
    first_reach,
    fit_steps,
    interval,
    largest_below,
    loss_curve,
    pooled_spread,
)
from megatron_muloco.scaling.observations import Observations
from tests.support.byte_runs import byte_config
from tools.critical_batch import main
from tools.scaling import branches, critical_runs

BATCHES = [2.0**k for k in range(12, 20)]


# ---- the largest batch below a limit ------------------------------------------------------------


def test_the_curve_is_read_between_points_along_log2_of_the_batch() -> None:
    found = largest_below([8, 1, 2, 4], [2.0, 1.0, 1.25, 1.0], 1.5)
    assert (found.best, found.grid, found.notes) == (1, 4, ())
    assert found.value == pytest.approx(4 * math.sqrt(2), rel=1e-12)  # halfway in log2


def test_a_curve_that_ends_below_the_limit_gives_a_bound_only() -> None:
    found = largest_below([1, 2, 4], [1.0, 1.2, 1.1], 1.15)
    assert found.beyond
    assert found.grid == 4
    assert "comes back" in found.notes[0]
    assert "beyond the grid" in found.notes[1]


def test_critical_batch_is_the_last_within_one_percent() -> None:
    assert critical_batch([4, 1, 2, 8], [2.01, 2.03, 2.0, 2.05]) == 4
    with pytest.raises(ConfigError, match="lies beyond the grid"):
        critical_batch([1, 2, 4], [2.0, 2.001, 2.002])


@pytest.mark.parametrize("batches", [[1, 2], [1, 2, 2]])
def test_three_different_batches_are_needed(batches: list[float]) -> None:
    with pytest.raises(ConfigError, match="at least 3 different batches"):
        largest_below(batches, [1.0] * len(batches), 2.0)


# ---- loss curves and their interval -------------------------------------------------------------


def runs_of(*rows: tuple[float, float, float]) -> Observations:
    """Return runs of (batch, lr, loss)."""
    batch, lr, loss = np.array(rows).T
    return Observations({"batch": batch, "lr": lr}, loss, "loss")


def test_a_loss_curve_takes_the_rate_with_the_best_mean_over_seeds() -> None:
    runs = runs_of(
        (1, 0.1, 2.0), (1, 0.2, 1.0), (1, 0.2, 2.0), (1, 0.4, 3.0),  # mean 1.5 at 0.2
        (2, 0.1, 2.0), (2, 0.2, 3.0),
    )  # fmt: skip
    curve = loss_curve(runs)
    assert curve.losses.tolist() == [1.5, 2.0]
    assert curve.lrs.tolist() == [0.2, 0.1]
    assert curve.counts.tolist() == [2, 1]
    assert curve.notes == ("the best learning rate is at an end of its grid at batch 2",)


def test_spread_over_seeds_is_pooled_over_settings() -> None:
    a, b = math.exp(0.01), math.exp(-0.01)  # each pair deviates by 0.01: variance 2 * 1e-4 / 1
    runs = runs_of((1, 0.1, a), (1, 0.1, b), (2, 0.1, 5 * a), (2, 0.1, 5 * b), (4, 0.1, 7.0))
    assert pooled_spread([runs]) == pytest.approx(0.01 * math.sqrt(2), rel=1e-9)
    assert pooled_spread([runs_of((1, 0.1, 1.0), (2, 0.1, 1.0))]) is None


def test_the_interval_follows_the_spread() -> None:
    losses = [1.0, 1.0, 1.0, 1.005, 1.015, 1.03]
    curve = loss_curve(runs_of(*((2.0**k, 0.1, loss) for k, loss in enumerate(losses))))
    value = largest_below(curve.batches.tolist(), losses, 1.01).value
    assert value == pytest.approx(2**3.5)
    assert interval(curve, 0.0) == (value, value)
    low, high = interval(curve, 0.001)
    assert low < value < high < 32
    assert interval(curve, 0.02)[1] == math.inf  # some drawn curves end within the limit


# ---- steps to a target --------------------------------------------------------------------------


def test_the_first_step_at_a_target_is_interpolated() -> None:
    assert first_reach([0, 10, 20, 30], [4.0, 3.0, 2.0, 2.5], 2.25) == 17.5
    assert first_reach([10, 0, 20], [math.nan, 4.0, 2.0], 1.0) is None
    with pytest.raises(ConfigError, match="is already at the target"):
        first_reach([0, 10], [2.0, 1.0], 3.0)


@pytest.mark.parametrize("b_noise", [2.0**10, 2.0**16, 2.0**20])
def test_the_noise_batch_of_exact_steps_is_recovered(b_noise: float) -> None:
    law = fit_steps(BATCHES, [150 * (1 + b_noise / batch) for batch in BATCHES])
    # Exact points: what is left is the tolerance of the minimiser.
    assert law.b_noise == pytest.approx(b_noise, rel=1e-6)
    assert law.s_min == pytest.approx(150, rel=1e-6)
    assert law.low == pytest.approx(law.high, rel=1e-4)
    assert law.problem == ""
    critical = law.critical()  # 20 % more tokens than S_min B_noise
    assert law.steps(np.array([critical]))[0] * critical == pytest.approx(1.2 * 150 * b_noise)


def test_the_interval_of_noisy_steps_holds_the_truth() -> None:
    noise = np.random.default_rng(1).normal(0, 0.02, len(BATCHES))
    steps = [150 * (1 + 2.0**16 / b) * math.exp(e) for b, e in zip(BATCHES, noise, strict=True)]
    law = fit_steps(BATCHES, steps)
    assert law.low < 2.0**16 < law.high < 1.5 * law.low


@pytest.mark.parametrize("power", [-1.0, 0.0])
def test_steps_that_show_one_regime_determine_no_noise_batch(power: float) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, len(BATCHES))
    law = fit_steps(BATCHES, np.array(BATCHES) ** power * 1e6 * np.exp(noise))
    assert "not determined" in law.problem


def curves(targets: dict[float, float]) -> list[critical_runs.Curve]:
    """Return curves that fall by 1 a step; each reaches 0 after a number of steps."""
    return [
        critical_runs.Curve(f"b{batch:g}", batch, [0.0, 2 * steps], [1.0, -1.0])
        for batch, steps in targets.items()
    ]


def test_both_critical_batches_of_exact_curves() -> None:
    b_noise, batches = 2.0**16, [2.0**k for k in range(6, 20)]
    found = critical_runs.steps_to_target(
        curves({batch: 100 * (1 + b_noise / batch) for batch in batches}), 0.0, 0.2
    )
    assert found.law.critical(0.2) == pytest.approx(0.2 * b_noise, rel=1e-6)
    # The fewest tokens are at 64, a thousandth above the limit for small batches; straight lines in
    # log2 between batches lie above the convex law by less than 2 % of it here.
    assert found.measured.value == pytest.approx(0.2 * b_noise, rel=0.1)
    assert found.measured.value < 0.2 * b_noise * 1.01


def test_runs_that_miss_the_target_are_named_and_three_must_reach_it() -> None:
    reaching = curves({4.0: 40, 8.0: 25, 16.0: 20})
    missing = critical_runs.Curve("short", 32.0, [0, 1], [1.0, 0.5])
    found = critical_runs.steps_to_target([*reaching, missing], 0.0, 0.2)
    assert "run short never reaches 0; its lowest loss is 0.5000" in found.notes
    with pytest.raises(ConfigError, match=r"(?s)there are 2\..*run short never reaches"):
        critical_runs.steps_to_target([*reaching[:2], missing], 0.0, 0.2)


# ---- the tool -----------------------------------------------------------------------------------

HEADER = "status,size,method,variant,replicas,seed,tokens,batch_tokens,inner.lr,outer.lr,loss"


def study(tmp_path: Path, rows: list[str], header: str = HEADER) -> str:
    path = tmp_path / "study.csv"
    path.write_text("\n".join(["# a study", header, *rows]) + "\n")
    return str(path)


def rows_of(method: str, power: float, variant: str = "") -> list[str]:
    """Return runs whose critical batch is 4096 (tokens / 1e6)^power by the 1 % rule.

    Losses rise by 0.5 % of the best for each doubling of the batch from a quarter of it on.
    """
    rows = []
    for doubling in range(4):
        tokens = 1e6 * 2**doubling
        for k in range(8, 20):
            excess = max(0.0, k - 10 - power * doubling)
            for lr, extra in ((0.01, 0.1), (0.02, 0.0), (0.04, 0.1)):
                loss = 3.0 * (1 + 0.005 * excess) + extra
                rows.append(f"ok,0.1m,{method},{variant},1,1,{tokens},{2**k},{lr},0.7,{loss!r}")
    return rows


def test_a_study_gives_critical_batches_and_their_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*rows_of("muloco", 1.0), *rows_of("muloco", 0.0, "4-bit"), *rows_of("diloco", 0.5)]
    rows.append("diverged,0.1m,muloco,,1,1,1e6,4096,0.64,0.7,nan")
    table, numbers = study(tmp_path, rows), tmp_path / "numbers.json"
    picture = tmp_path / "plots" / "curves.png"
    assert main(["largest", table, "--json", str(numbers), "--plot", str(picture)]) == 0
    found = json.loads(numbers.read_text())
    muloco = [c["critical_batch"] for c in found["cells"] if c["keys"] == {
        "size": "0.1m", "method": "muloco", "replicas": "1",
    }]  # fmt: skip
    assert muloco == pytest.approx([4096 * 2**k for k in range(4)])
    powers = {law["label"]: law["alpha"][0] for law in found["laws"]}
    # Between two tried batches the curve has no kink for whole powers, and one for 0.5.
    assert powers["muloco, 1"] == pytest.approx(1.0, abs=1e-9)
    assert powers["muloco, 4-bit, 1"] == pytest.approx(0.0, abs=1e-9)
    assert powers["diloco, 1"] == pytest.approx(0.5, abs=0.05)
    assert "left out, loss not finite: study.csv:435" in capsys.readouterr().out
    assert picture.stat().st_size > 0


def test_a_critical_batch_beyond_the_grid_enters_no_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [row for row in rows_of("muloco", 1.0) if int(row.split(",")[7]) <= 8192]
    assert main(["largest", study(tmp_path, kept)]) == 0
    said = capsys.readouterr().out
    assert "beyond the grid: 8192, the largest batch, is within the limit" in said
    assert "1 token counts with a critical batch inside the grid, and a law needs 3" in said


def test_unequal_tokens_are_named_or_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {256: 1.00e6, 512: 1.03e6, 1024: 1.04e6, 2048: 1.3e6}
    rows = [f"ok,s,m,,1,1,{d},{b},0.01,0.7,3.0" for b, d in tokens.items()]
    assert main(["largest", study(tmp_path, rows)]) == 0
    said = capsys.readouterr().out
    assert "its runs differ in tokens by up to 4.0%" in said
    assert "left out, 1 of 3 batches: s, m, 1, 1.3e+06 tokens" in said


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([8, 16, 32, 65536], "mixes units"),  # sequences, and tokens
        ([8192, 16384], "no cell has three batches"),
    ],
)
def test_the_tool_refuses(
    batches: list[int], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"ok,s,m,,1,1,1e6,{batch},0.01,0.7,3.0" for batch in batches]
    assert main(["largest", study(tmp_path, rows)]) == 2
    assert reason in capsys.readouterr().err


def test_steps_of_a_table_of_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"b{batch},{batch},{step},{5 - 3 * step / (100 * (1 + 64 / batch))}"
        for batch in (8, 16, 32, 64, 128)
        for step in range(0, 1000, 50)
    ]
    table = study(tmp_path, rows, "run,batch,step,loss")
    options = ["--batch", "batch", "--batch-unit", "sequences"]
    assert main(["steps", table, "--target", "2", *options]) == 2
    assert "Give the sequence length" in capsys.readouterr().err
    assert main(["steps", table, "--target", "2", *options, "--seq-length", "128"]) == 0
    said = capsys.readouterr().out
    assert "steps = 100 (1 + 8192 / batch)" in said  # 64 sequences of 128 tokens
    assert "by the law: 1638" in said


@pytest.mark.parametrize("source", ["log", "event files"])
def test_steps_of_runs(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same curves as in the table, as runs write them."""
    tag, directories = "lm loss validation", []
    for batch in (8, 16, 32, 64, 128):
        directory = tmp_path / f"b{batch}"
        directories.append(str(directory))
        config = {"training": {"global_batch_size": batch}, "model": {"seq_length": 128}}
        writer: PointLog | EventWriter
        if source == "log":
            facts = {"config": config}
            writer = PointLog(str(directory), facts, resumed_step=0, report=pytest.fail)
        else:
            writer = EventWriter(str(directory), resumed_step=0, report=pytest.fail)
            writer.text("run/config", yaml.safe_dump(config))
        for step in range(0, 1000, 50):
            writer.scalars(step, {tag: 5 - 3 * step / (100 * (1 + 64 / batch))})
        writer.close()
    assert main(["steps", "--runs", *directories, "--target", "2"]) == 0
    assert "steps = 100 (1 + 8192 / batch)" in capsys.readouterr().out
    assert main(["steps", "--runs", *directories, "--target", "2", "--tag", "no such"]) == 2
    assert "holds no no such" in capsys.readouterr().err


def test_published_curves_give_the_published_critical_batches() -> None:
    cells, laws = critical_runs.published()
    on_grid = {cell.label: cell.found.grid for cell in cells}
    for law in laws:
        assert on_grid[law.label] == law.law.points.values[-1]
        assert law.parameters[1].low < law.printed < law.parameters[1].high
    assert all(cell.found.grid <= cell.found.value for cell in cells)


# ---- branches -----------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint after 5 of 20 steps, as far as plans read it."""
    config = byte_config(
        str(tmp_path / "bytes"),
        training={"train_iters": 20, "global_batch_size": 4, "eval_iters": 3},
        inner={"kind": "adamw", "lr": 0.01, "lr_warmup_iters": 10, "weight_decay": 0.0},
    )
    text = Description(
        format=FORMAT,
        step=5,
        topology={"num_replicas": 1},
        anchor_digest="0" * 16,
        versions={},
        has_masters=False,
        scalars={"consumed_samples": 20},
        replicas=[{"digests": {}, "inner_step": 5, "synchronizer": None}],
        config=config.model_dump(mode="json"),
        index_digest="0" * 64,
    ).to_json()
    directory = tmp_path / "iter_0000005"
    directory.mkdir()
    (directory / STATE_FILE).write_text(text)
    return directory


def test_branches_see_equal_tokens_and_equal_held_out_samples(
    checkpoint: Path, tmp_path: Path
) -> None:
    base = json.loads((checkpoint / STATE_FILE).read_text())["config"]
    sequence = base["model"]["seq_length"]
    found = branches.plan(
        checkpoint, tmp_path / "out", factors=[4, 1, 2], tokens=70 * sequence, lr_rule="sqrt"
    )
    configs = [load_config(branch.config) for branch in found]
    assert [branch.steps for branch in found] == [16, 8, 4]  # of 4, 8 and 16 sequences
    assert {branch.tokens for branch in found} == {64 * sequence}
    assert [config.training.train_iters for config in configs] == [21, 13, 9]
    evaluated = {c.training.eval_iters * c.training.global_batch_size for c in configs}
    assert evaluated == {16}  # 3 batches of 4, raised to what all can divide
    # Step 6 of a warm-up of 10 steps to 0.01; constant in the branch.
    assert [branch.lr for branch in found] == pytest.approx([0.006, 0.006 * 2**0.5, 0.012])
    assert {c.inner.lr_decay_style for c in configs} == {"constant"}
    assert {c.checkpoint.resume for c in configs} == {str(checkpoint)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"factors": [2, 4]}, "1, the batch of the run, must be among them"),
        ({"tokens": 10}, "is less than one step that all factors divide"),
    ],
)
def test_a_plan_is_refused(
    changes: dict[str, object], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    options = {"factors": [1, 2], "tokens": 1e6, "lr_rule": "none", **changes}
    with pytest.raises(ConfigError, match=reason):
        branches.plan(checkpoint, tmp_path / "out", **options)


def test_the_verdict_is_the_largest_batch_within_the_tolerance(
    checkpoint: Path, tmp_path: Path
) -> None:
    planned = branches.plan(
        checkpoint, tmp_path / "out", factors=[1, 2, 4], tokens=1e5, lr_rule="none"
    )
    losses = (3.0, 3.005, 3.025)
    done = [
        branches.Branch(**{**vars(branch), "loss": loss})
        for branch, loss in zip(planned, losses, strict=True)
    ]
    found = branches.verdict(done, 0.015)
    assert found.grid == done[1].batch
    assert found.value == pytest.approx(done[1].batch * 2**0.5)  # halfway in log2 to k = 4
    assert branches.verdict(done, 0.1).beyond
