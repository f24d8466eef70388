"""Searches: they find the best point, whatever the order in which runs finish."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_muloco.errors import ConfigError
from tests.support.byte_runs import byte_config, byte_dataset
from tools.sweeps.runs import Run, Runs
from tools.sweeps.search import Search
from tools.sweeps.study import read_study

MOMENTA = [0.0, 0.2, 0.4, 0.6, 0.8]
LADDER = [2.0**-i for i in range(10, -1, -1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config file of a tiny run on real data."""
    directory = tmp_path_factory.mktemp("base")
    inner = {"kind": "muon", "lr": 0.02, "lr_warmup_iters": 1, "weight_decay": 0.0}
    config = byte_config(byte_dataset(directory), inner=inner)
    path = directory / "base.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"outer"})))
    return path


def search_of(base: Path, slices: dict[str, Any], directory: Path) -> Search:
    values = {
        "base": str(base),
        "table": "table.csv",
        "tokens_per_parameter": 0.1,
        "sizes": {"s": {}},
        "methods": {
            "dp": {"outer.kind": "none"},
            "muloco": {
                "outer.kind": "nesterov",
                "outer.sync_interval": 2,
                "outer.lr": 0.7,
                "outer.momentum": 0.4,
            },
        },
        "slices": slices,
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    study = read_study(path)
    return Search(study, Runs(study))


def lr_axis(start: float = 2.0**-5, **limits: Any) -> dict[str, Any]:
    return {"start": [start], "factor": 2, "limits": [2.0**-10, 1.0], **limits}


def bowl(lr: float, momentum: float = 0.0) -> Callable[[Run], float]:
    """Return a loss that is lowest at these values, with seeds a little apart."""

    def loss(run: Run) -> float:
        x = math.log2(run.settings["inner.lr"] / lr)
        y = run.settings.get("outer.momentum", momentum) - momentum
        return 2 + x * x + 3 * y * y + 0.1 * x * y + 1e-3 * run.seed

    return loss


def finish(search: Search, loss: Callable[[Run], float], order: random.Random | None) -> list[str]:
    """Run everything and return the keys in the order in which runs ended."""
    losses: dict[str, float] = {}
    while missing := search.missing(losses):
        run = order.choice(missing) if order else missing[0]
        assert run.key not in losses, "a run twice"
        losses[run.key] = loss(run)
    return list(losses)


@pytest.mark.parametrize("best", [2.0**-8, 2.0**-5, 2.0**-2])
def test_a_grid_extends_itself_until_the_optimum_is_interior(
    base: Path, tmp_path: Path, best: float
):
    search = search_of(base, {"lr": {"methods": ["dp"], "grid": {"inner.lr": lr_axis()}}}, tmp_path)
    losses: dict[str, float] = {}
    while missing := search.missing(losses):
        losses |= {run.key: bowl(best)(run) for run in missing}
    (state,) = search.states(losses)
    assert dict(state.best or ()) == {"inner.lr": best}
    tried = {dict(point)["inner.lr"] for point in state.runs}
    assert {best / 2, best, best * 2} <= tried
    assert not state.at_limit
    # From the start to one step beyond the best value, and no further.
    assert len(tried) == 3 + abs(math.log2(best / 2.0**-5))


def test_a_search_stops_at_the_stated_limit_and_says_so(base: Path, tmp_path: Path):
    axis = lr_axis(limits=[2.0**-6, 1.0])
    search = search_of(base, {"lr": {"methods": ["dp"], "grid": {"inner.lr": axis}}}, tmp_path)
    losses: dict[str, float] = {}
    while missing := search.missing(losses):
        losses |= {run.key: bowl(2.0**-9)(run) for run in missing}
    (state,) = search.states(losses)
    assert dict(state.best or ()) == {"inner.lr": 2.0**-6}
    assert state.at_limit == ("inner.lr",)


TWO = {
    "baseline": {"methods": ["dp"], "grid": {"inner.lr": lr_axis()}, "report_seeds": [1, 2]},
    "outer": {
        "methods": ["muloco"],
        "replicas": [1, 2],
        "use": [{"slice": "baseline", "methods_as": {"muloco": "dp"}, "replicas_as": {2: 1}}],
        "grid": {"outer.momentum": {"start": [0.2], "values": MOMENTA}, "inner.lr": lr_axis(0.25)},
    },
    "length": {
        "methods": ["muloco"],
        "replicas": [2],
        "use": ["outer"],
        "over": {"outer.sync_interval": [1, 2, 4]},
    },
}


def test_the_runs_do_not_depend_on_the_order_in_which_they_finish(base: Path, tmp_path: Path):
    """Hence not on interruptions either: a killed sweep goes on from the same losses."""
    search = search_of(base, TWO, tmp_path)
    loss = bowl(2.0**-3, 0.6)
    expected = finish(search, loss, None)
    for seed in range(5):
        assert sorted(finish(search, loss, random.Random(seed))) == sorted(expected)


def test_later_slices_take_the_best_values_of_earlier_ones(base: Path, tmp_path: Path):
    search = search_of(base, TWO, tmp_path)
    loss = bowl(2.0**-3, 0.6)
    losses: dict[str, float] = {}
    while missing := search.missing(losses):
        losses |= {run.key: loss(run) for run in missing}
    states = {state.cell.name: state for state in search.states(losses)}
    lengths = [state for name, state in states.items() if name.startswith("length")]
    assert len(lengths) == 3
    for state in lengths:
        (run,) = state.runs.values()
        assert run.settings["outer.momentum"] == 0.6
        assert run.settings["inner.lr"] == 2.0**-3
    # The H of the methods is one of the three, so that run is shared with the search.
    outer = states["outer s muloco K=2"]
    shared = {run.key for state in lengths for run in state.runs.values()}
    assert len(shared & {run.key for run in outer.runs.values()}) == 1


def test_reports_are_the_best_point_with_other_seeds(base: Path, tmp_path: Path):
    search = search_of(base, {"baseline": TWO["baseline"]}, tmp_path)
    losses: dict[str, float] = {}
    while missing := search.missing(losses):
        losses |= {run.key: bowl(2.0**-4)(run) for run in missing}
    (state,) = search.states(losses)
    assert [run.seed for run in state.reports] == [1, 2]
    assert state.reports[0].key == state.runs[state.best or ()].key
    assert {run.settings["inner.lr"] for run in state.reports} == {2.0**-4}


def test_tokens_are_the_same_for_every_batch(base: Path, tmp_path: Path):
    slices = {"b": {"methods": ["dp"], "over": {"training.global_batch_size": [2, 4, 8]}}}
    search = search_of(base, slices, tmp_path)
    runs = search.missing({})
    assert len({run.steps for run in runs}) == 3
    # Whole steps: at most half a step of the largest batch.
    assert max(abs(run.tokens - runs[0].tokens) for run in runs) <= max(
        r.batch_tokens for r in runs
    )


def test_a_cell_in_which_everything_diverges_is_an_error(base: Path, tmp_path: Path):
    search = search_of(base, {"lr": {"methods": ["dp"], "grid": {"inner.lr": lr_axis()}}}, tmp_path)
    losses = {run.key: math.inf for run in search.missing({})}
    with pytest.raises(ConfigError, match="every run diverged"):
        search.missing(losses)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"over": {"inner.lrr": [1]}}, "inner.lrr"),
        ({"set": {"inner.lr": -1}}, "inner.lr"),
        (
            {"methods": ["muloco"], "replicas": [3], "set": {"training.global_batch_size": 4}},
            "cannot share evenly",
        ),
    ],
)
def test_refused_configs_are_found_before_anything_runs(
    base: Path, tmp_path: Path, part: dict[str, Any], message: str
):
    """Also those of cells that wait for others."""
    first = {
        "methods": ["dp", "muloco"],
        "replicas": [1, 3],
        "set": {"training.global_batch_size": 3},
    }
    waiting = {"use": [{"slice": "first"}], **part}
    search = search_of(
        base, {"first": {**first, "grid": {"inner.lr": lr_axis()}}, "w": waiting}, tmp_path
    )
    with pytest.raises(ConfigError) as caught:
        search.check()
    assert any("slice w" in text and message in text for text in caught.value.problems)
