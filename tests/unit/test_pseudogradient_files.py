"""Saved pseudogradients are read back whole, whatever the layout; a full disk costs a file only."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_muloco.config import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.pseudogradients import SavedRounds, build_recorder
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.topology import Coords, Topology
from tests.support.tensors import assert_equal, integer_tensor
from tests.support.tiny_models import MUON, NESTEROV, tiny_config

LAYER = "decoder.layers.0."
FC1, FC2, NORM = (
    LAYER + "mlp.linear_fc1.weight",
    LAYER + "mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
)
HIDDEN, FFN = 32, 48
GATE, UP = f"{FC1}::gate", f"{FC1}::up"


def config_of(directory: Path, **saved: Any) -> RunConfig:
    keys = {"dir": str(directory), "rounds": (1, 3), "interval": 2, **saved}
    return tiny_config(inner=MUON, outer=NESTEROV, monitor={"save_pseudogradients": keys})


def whole(seed: int) -> dict[str, Tensor]:
    return {
        GATE: integer_tensor(FFN * HIDDEN, seed=seed).view(FFN, HIDDEN),
        UP: integer_tensor(FFN * HIDDEN, seed=seed + 1).view(FFN, HIDDEN),
        FC2: integer_tensor(FFN * HIDDEN, seed=seed + 2).view(HIDDEN, FFN),
        NORM: integer_tensor(HIDDEN, seed=seed + 3),
    }


def pieces(tensors: dict[str, Tensor], tp: int, rank: int) -> dict[str, Tensor]:
    """Return what a tensor rank holds: gate and up are fused on each rank."""
    gate, up = tensors[GATE].chunk(tp)[rank], tensors[UP].chunk(tp)[rank]
    fc2 = tensors[FC2].chunk(tp, 1)[rank].contiguous()
    return {FC1: torch.cat([gate, up]), FC2: fc2, NORM: tensors[NORM]}


def ranks(topology: Topology) -> Iterator[tuple[Coords, list[Shard], dict[str, Tensor]]]:
    """Yield each rank's shards and what it would launch; data ranks cut at odd places."""
    dims = {FC1: 0, FC2: 1, NORM: None}
    for rank in range(topology.world_size):
        coords = topology.coords(rank)
        tensors = pieces(whole(10 * coords.replica), topology.tensor, coords.tp)
        shards, launched = [], {}
        for name, tensor in tensors.items():
            if name == NORM and coords.tp:
                continue
            info = ParamInfo.from_name(name, tuple(tensor.shape), dims[name])
            cuts = [0, 7, info.numel] if topology.data == 2 else [0, info.numel]
            shard = Shard(info, cuts[coords.dp], cuts[coords.dp + 1])
            shards.append(shard)
            launched[name] = tensor.flatten()[shard.start : shard.end]
        yield coords, shards, launched


def save(config: RunConfig, topology: Topology, *, steps: int = 2, finite: bool = True) -> None:
    schedule = SyncSchedule(sync_interval=2, train_iters=8, fragment_count=1)
    for coords, shards, launched in ranks(topology):
        recorder = build_recorder(config, shards, schedule, coords, topology)
        assert recorder is not None
        local = {name: torch.zeros_like(tensor) for name, tensor in launched.items()}
        anchors = {name: torch.zeros_like(tensor) for name, tensor in launched.items()}
        for step in range(3 - steps, 3):
            for name, tensor in launched.items():
                local[name] -= step * tensor  # so that the steps add up to 3 times the tensor
            recorder.inner_step(step, local, anchors)
        recorder.launch(2, 0, launched, finite=finite)
        recorder.launch(4, 0, launched, finite=finite)  # round 2 is not saved


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_any_layout_is_read_back_whole(layout: tuple[int, int], tmp_path: Path) -> None:
    topology = Topology(num_replicas=2, tensor=layout[0], pipeline=1, data=layout[1])
    save(config_of(tmp_path, steps=True), topology)
    saved = SavedRounds(tmp_path)
    assert saved.rounds() == [1]
    assert saved.topology == topology
    found = saved.load(1)
    for replica in range(2):
        expected = whole(10 * replica)
        matrices = found.matrices[replica]
        assert set(matrices) == {GATE, UP, f"{FC2}::down"}
        assert_equal(matrices[GATE], expected[GATE])
        assert_equal(matrices[UP], expected[UP])
        assert_equal(matrices[f"{FC2}::down"], expected[FC2])
        assert_equal(found.vectors[replica][NORM], expected[NORM])
        assert_equal(found.steps[replica][UP], torch.stack([expected[UP], 2 * expected[UP]]))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_off_builds_no_recorder() -> None:
    schedule = SyncSchedule(sync_interval=2, train_iters=8, fragment_count=1)
    topology = Topology(num_replicas=1, tensor=1, pipeline=1, data=1)
    assert build_recorder(tiny_config(), [], schedule, Coords(0, 0, 0, 0, 0), topology) is None


def test_steps_of_a_round_that_was_resumed_inside_are_left_out(tmp_path: Path) -> None:
    topology = Topology(num_replicas=1, tensor=1, pipeline=1, data=1)
    save(config_of(tmp_path, steps=True), topology, steps=1)
    found = SavedRounds(tmp_path).load(1)
    assert found.steps == ()
    assert_equal(found.matrices[0][UP], whole(0)[UP])


def test_a_replica_that_is_not_finite_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topology = Topology(num_replicas=2, tensor=1, pipeline=1, data=1)
    config = config_of(tmp_path)
    save(config, topology)
    path = tmp_path / "round_00001" / "replica_001_rank_00_fragment_00.npz"
    path.unlink()
    with pytest.raises(ConfigError, match="0 of 1 files of replica 1"):
        SavedRounds(tmp_path).load(1)
    save(config, topology, finite=False)
    assert "replica 1 is not finite in round 1" in capsys.readouterr().out
    assert not path.exists()


def test_a_disk_that_refuses_costs_the_file_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    save(config_of(tmp_path), Topology(num_replicas=1, tensor=1, pipeline=1, data=1))
    out = capsys.readouterr().out
    assert "monitor.save_pseudogradients: cannot write" in out
    assert "No space left on device. Training goes on" in out
    assert SavedRounds(tmp_path).rounds() == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    topology = Topology(num_replicas=1, tensor=1, pipeline=1, data=1)
    save(config_of(tmp_path), topology)
    save(config_of(tmp_path), topology)  # the same run, started again
    with pytest.raises(ConfigError, match="a run with another configuration"):
        save(config_of(tmp_path, steps=True), topology)


def test_files_of_others_are_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no manifest"):
        SavedRounds(tmp_path)
    topology = Topology(num_replicas=1, tensor=1, pipeline=1, data=1)
    save(config_of(tmp_path), topology)
    path = tmp_path / "round_00001" / "replica_000_rank_00_fragment_00.npz"
    np.savez(path, metadata=np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        SavedRounds(tmp_path).load(1)
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ConfigError, match="cannot be read"):
        SavedRounds(tmp_path).load(1)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ConfigError, match="has format 9"):
        SavedRounds(tmp_path)


def test_a_missing_shard_is_found(tmp_path: Path) -> None:
    topology = Topology(num_replicas=1, tensor=1, pipeline=1, data=2)
    save(config_of(tmp_path), topology)
    first, second = sorted((tmp_path / "round_00001").glob("*.npz"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ConfigError, match="do not cover it once"):
        SavedRounds(tmp_path).load(1)
