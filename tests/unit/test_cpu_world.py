"""One process on a machine without accelerators: what it starts, what it refuses, and how."""

from pathlib import Path
from typing import NoReturn

import pytest

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.errors import TopologyError
from megatron_muloco.planning import memory_plan
from megatron_muloco.runtime.ranks import RankInfo, discover_ranks
from megatron_muloco.training import launch
from megatron_muloco.training import main as program
from megatron_muloco.training.launch import machine_memory, why_not_on_cpus
from megatron_muloco.training.stopping import StopRequest

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = CONFIGS / "cpu_k2.yaml"


def replicas(number: int) -> RunConfig:
    batch = f"training.global_batch_size={8 * number}"
    return load_config(CPU, [f"parallel.num_replicas={number}", batch])


def alone() -> RankInfo:
    return discover_ranks({})


def test_a_small_world_is_started() -> None:
    for number in (2, 8):
        assert why_not_on_cpus(replicas(number), machine_memory()) == ""


def test_a_large_world_is_not_started() -> None:
    assert why_not_on_cpus(replicas(9), 10**15).startswith("9 ranks are more than the 8 ")
    assert why_not_on_cpus(load_config(CONFIGS / "15b_k16.yaml"), 10**15).startswith("128 ranks")


def test_a_world_that_needs_more_memory_than_there_is_is_not_started() -> None:
    config = replicas(4)
    plan = memory_plan(config, smallest_topology(config))
    needed = 4 * (plan.allocated + plan.host)
    assert why_not_on_cpus(config, needed) == ""
    assert "this machine has" in why_not_on_cpus(config, needed - 1)
    # what lives in host memory counts as well: here it is all one memory
    on_host = config.model_copy(
        update={"outer": config.outer.model_copy(update={"state_device": "cpu"})}
    )
    assert "this machine has" in why_not_on_cpus(on_host, needed - 1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of ranks that are started instead of this process."""
    numbers: list[int] = []

    def remember(ranks: int, *_: object) -> NoReturn:
        numbers.append(ranks)
        raise SystemExit(0)

    monkeypatch.setattr(launch, "relaunch", remember)
    monkeypatch.setattr(program, "_accelerators", lambda: 0)
    return numbers


def test_missing_ranks_are_started(started: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program._fit_world(replicas(2), alone(), ["--config", str(CPU)], str(CPU), StopRequest())
    assert started == [2]
    assert "so 2 CPU ranks are started now" in capsys.readouterr().out


def test_a_cluster_run_is_refused_with_plan_and_command(started: list[int]) -> None:
    path = str(CONFIGS / "15b_k16.yaml")
    arguments = ["--config", path, "--set", "checkpoint.dir=a b"]
    with pytest.raises(TopologyError) as caught:
        program._fit_world(load_config(path), alone(), arguments, path, StopRequest())
    message = str(caught.value)
    for words in (
        "128·d ranks, but there are 1.",
        "128 ranks are more than the 8",
        "memory per rank",
        "128 or a multiple of 128 accelerators",
        f"deepspeed --hostfile hosts launch/pretrain.py --config {path} --set 'checkpoint.dir=a b'",
    ):
        assert words in message
    assert started == []


def test_on_accelerators_nothing_is_started(
    started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_accelerators", lambda: 1)
    with pytest.raises(TopologyError, match=r"deepspeed --num_gpus 2 launch/pretrain.py --config"):
        program._fit_world(replicas(2), alone(), ["--config", str(CPU)], str(CPU), StopRequest())
    assert started == []


def test_a_dry_run_warns_of_missing_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(CONFIGS / "15b_k16.yaml")
    with pytest.raises(SystemExit) as exit_:
        program.main(["--config", path, "--dry-run"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    plan, _, data = text.partition("\ndata\n")
    assert "memory per rank" in plan
    assert "a run would be refused" in data
    assert "exit code is 0" in data
    assert "data.tokenizer_model: " in data
    assert f"{CONFIGS}/" in data  # where the key is written
