"""Five quick trials of the chaos suite, and its own parts; `make chaos` makes as many as wanted."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.damage import DamageTrials, kind_of
from tests.chaos.faults import ACTS, CLOCK, FILE, POINTS, Fault, given, to_environment
from tests.chaos.interrupts import MOMENTS, InterruptTrials, draw_interrupt
from tests.chaos.points import _ACTS
from tests.chaos.trial import KillTrials, draw_trial

# Chosen: the quickest of the first 1500 seeds, one rank and two.
KILL_SEEDS = (438, 579, 608)
DAMAGE_SEEDS = (29, 42)
INTERRUPT_SEEDS = (0, 7)  # at the start, and in an outer step of two replicas

Trials = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return KillTrials(tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def damages(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return DamageTrials(tmp_path_factory.mktemp("damages"))


@pytest.mark.e2e
@pytest.mark.parametrize("seed", KILL_SEEDS)
def test_a_disturbed_run_ends_in_the_undisturbed_state(seed: int, kills: Trials) -> None:
    row = kills(seed)
    assert row["held"] == "yes", row
    assert "yes" in row["fired"], "the point was not reached; take another seed"


@pytest.mark.e2e
@pytest.mark.parametrize("seed", DAMAGE_SEEDS)
def test_a_damaged_file_is_refused_or_harmless(seed: int, damages: Trials) -> None:
    row = damages(seed)
    assert row["held"] == "yes", row


@pytest.mark.e2e
@pytest.mark.parametrize("seed", INTERRUPT_SEEDS)
def test_ctrl_c_saves_and_the_resumed_run_ends_in_the_undisturbed_state(
    seed: int, tmp_path: Path
) -> None:
    row = InterruptTrials(tmp_path)(seed)
    assert row["held"] == "yes", row
    assert row["pressed"] == "yes", "the point was not reached; take another seed"


def test_five_seeds_in_a_row_have_all_moments() -> None:
    drawn = [draw_interrupt(seed, "data/none") for seed in range(5, 10)]
    assert [moment for _, moment, _ in drawn] == [*MOMENTS]
    assert drawn == [draw_interrupt(seed, "data/none") for seed in range(5, 10)]


@pytest.mark.parametrize("point", POINTS)
def test_every_point_exists(point: str) -> None:
    module, owner, name = POINTS[point]
    holder: Any = importlib.import_module(module)
    assert callable(getattr(getattr(holder, owner) if owner else holder, name))


def test_a_seed_draws_the_same_trial_again() -> None:
    for seed in range(200):
        trial = draw_trial(seed, "data/none")
        assert trial == draw_trial(seed, "data/none")
        assert 1 <= len(trial.faults) <= 3
        for fault in trial.faults:
            assert fault.rank < trial.run.world <= 4
            assert fault.point in (*POINTS, CLOCK, FILE)
            assert fault.act in ACTS
    assert ACTS.keys() == _ACTS.keys()


def test_faults_reach_a_rank_through_its_environment() -> None:
    faults = [Fault("kill rank", 1, "publish", number=2, seconds=0.5)]
    assert given(to_environment(faults)) == faults
    assert given({}) == []


def test_files_have_kinds() -> None:
    kinds = {
        "saved/iter_0000004/__0_0.distcp": "distcp (tensors)",
        "saved/iter_0000004/muloco.json": "muloco.json",
        "saved/iter_0000004/metadata.json": "metadata.json",
        "data/train.json": "data .json",
        "data/index_cache/12ab/34cd-GPTDataset-train-shuffle_index.npy": (
            "index cache shuffle_index.npy"
        ),
    }
    assert {name: kind_of(Path(name)) for name in kinds} == kinds


def test_the_page_counts_faults_files_and_failures(tmp_path: Path) -> None:
    run, damage = tmp_path / "run.csv", tmp_path / "damage.csv"
    run.write_text(
        "seed,drawn,faults,acts,points,fired,codes,result,held,commit\n"
        "0,K2,x,kill rank / pause,save / step,yes no,1 0,equal,yes,abc\n"
        "1,K1,y,kill rank,save,yes,1 0,DIFFERENT STATE in anchor_digest,no,abc\n"
        "4,K1,z,pause,clock,yes,0,start0 left 2 processes,no,abd\n"
    )
    damage.write_text(
        "seed,kind,file,action,where,result,said,held,commit\n"
        "0,.metadata,a/.metadata,deleted,,refused,no,yes,abc\n"
        "1,.metadata,a/.metadata,flipped bit,1,SILENT,a | b,no,abc\n"
    )
    text = report.page(run, damage)
    assert "- trials: 3, seeds 0 to 1, 4\n- starts of the real command: 5\n" in text
    assert "- faults that happened: 3\n- trials that held: 1\n" in text
    assert "- trials that ended in the undisturbed run's state: 2\n" in text
    assert "| kill rank | 2 | 2 | 1 |" in text
    assert "| pause | 2 | 1 | 1 |" in text
    assert "| kind | trials | harmless | refused | RAN CODE | SILENT |" in text
    assert "| .metadata | 2 | 0 | 1 | 0 | 1 |" in text
    assert "| 1 | a/.metadata | flipped bit | 1 | SILENT | a / b |" in text
    assert "python -m tests.chaos run --first-seed 1 --work build/chaos" in text
