"""Study files: what they say, and what is refused with file and line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_muloco.errors import ConfigError
from tools.sweeps.study import Study, read_study

LR = {"start": [0.25], "factor": 2, "limits": [0.05, 1.0]}


def study_file(directory: Path, **changes: Any) -> Path:
    """Write a small study, with some keys replaced."""
    values = {
        "base": "base.yaml",
        "table": "table.csv",
        "sizes": {"small": {}, "large": {"model.num_layers": 4}},
        "methods": {"dp": {"outer.kind": "none"}, "muloco": {"outer.kind": "nesterov"}},
        "slices": {
            "first": {"sizes": ["small"], "replicas": [1, 2], "grid": {"inner.lr": LR}},
            "second": {
                "use": ["first"],
                "replicas": [1, 2],
                "over": {"outer.sync_interval": [5, 10]},
            },
        },
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


def read(directory: Path, **changes: Any) -> Study:
    return read_study(study_file(directory, **changes))


def test_cells_are_the_product_and_methods_without_an_outer_step_have_one_replica(tmp_path: Path):
    study = read(tmp_path)
    cells = study.cells(study.slices["second"])
    assert len(cells) == 2 * 2 * (1 + 2)  # sizes, H, and dp once beside muloco with K = 1, 2
    assert {cell.replicas for cell in cells if cell.method == "dp"} == {1}
    assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("anchor", [0.25, 0.5])
def test_a_ladder_has_all_steps_within_its_limits(tmp_path: Path, anchor: float):
    grid = {"inner.lr": {**LR, "start": [anchor]}}
    study = read(tmp_path, slices={"s": {"grid": grid}})
    assert study.slices["s"].axes[0].ladder == (0.0625, 0.125, 0.25, 0.5, 1.0)


def test_slices_share_the_values_of_a_root_two_ladder(tmp_path: Path):
    root = {"start": [0.0625], "factor": 1.4142135623730951, "limits": [0.01, 0.2]}
    near = {**root, "limits": [0.04, 0.1]}
    slices = {"a": {"grid": {"inner.lr": root}}, "b": {"grid": {"inner.lr": near}}}
    study = read(tmp_path, slices=slices)
    long, short = (set(study.slices[name].axes[0].ladder) for name in "ab")
    assert short < long


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"s": {"grids": {}}}, "slices.s.grids: unknown"),
        ({"s": {"sizes": ["huge"]}}, "slices.s.sizes: huge unknown; there are small, large"),
        ({"s": {"use": ["t"]}}, "slices.s.use: t is no slice above"),
        ({"s": {"grid": {"inner.lr": {"start": [0.1]}}}}, "inner.lr.factor: None"),
        ({"s": {"grid": {"inner.lr": {**LR, "factor": 1}}}}, "inner.lr.factor: 1"),
        ({"s": {"grid": {"inner.lr": {**LR, "limits": [2]}}}}, "inner.lr.limits"),
        ({"s": {"grid": {"inner.lr": {**LR, "start": [0.25, 0.3]}}}}, "0.3 not on the ladder"),
        ({"s": {"grid": {"inner.lr": {**LR, "start": {"dp": [0.25]}}}}}, "no values for muloco"),
        ({"s": {"replicas": [0]}}, "slices.s.replicas"),
        ({"s": {"over": {"outer.sync_interval": 5}}}, "slices.s.over"),
        (
            {"a": {"grid": {"inner.lr": LR}}, "b": {"replicas": [1, 4], "use": ["a"]}},
            "a has no K = 4",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, slices: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, slices=slices)
    assert any(message in problem for problem in caught.value.problems)
    assert all("study.yaml" in problem for problem in caught.value.problems)


def test_all_mistakes_are_reported_together(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, tokens_per_parameter=-1, slices={"s": {"sizes": ["huge"], "use": ["t"]}})
    assert len(caught.value.problems) == 3
