"""Runs that save pseudogradients, and branches, agree with what their replicas trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.monitor.pseudogradients import SavedRounds, whole_matrices
from megatron_muloco.optim.matrices import LayerShape
from megatron_muloco.training.one_process import run_in_one_process, run_replicas
from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import (
    ADAMW,
    MUON,
    NESTEROV,
    build_tiny,
    finish_tiny,
    start_tiny,
    tiny_config,
)
from tools.pseudogradient.analysis import analyse_saved
from tools.pseudogradient.branches import branch, warm_up

REPLICAS = 2


def saving(directory: Path, **sections: Any) -> RunConfig:
    saved = {"dir": str(directory), "rounds": (1, 2), "steps": True}
    sections = {"parallel": {"num_replicas": REPLICAS}, "inner": MUON, **sections}
    return tiny_config(outer=NESTEROV, monitor={"save_pseudogradients": saved}, **sections)


def trained(config: RunConfig) -> list[dict[str, Tensor]]:
    """Return what each replica's first round subtracted from its parameters, by matrix."""

    def body(groups: Groups) -> dict[str, Tensor]:
        run = build_tiny(config, groups)
        before = {name: master.clone() for name, (_, master) in run.masters().items()}
        taken: dict[str, Tensor] = {}
        outer_step = run.optimizer.outer_step

        def spy(line_values: Tensor | None = None) -> Any:
            if run.optimizer.steps == config.outer.sync_interval:
                masters = run.masters()
                taken.update({name: before[name] - masters[name][1] for name in before})
            return outer_step(line_values)

        run.optimizer.outer_step = spy  # type: ignore[method-assign]
        run.train(2 * config.outer.sync_interval)
        infos = run.optimizer.view.infos
        pieces = {
            (name, 0): (infos[name], each.view(infos[name].local_shape))
            for name, each in taken.items()
        }
        return whole_matrices(pieces, LayerShape.from_config(config.model))[0]

    return run_replicas(config, body)


@pytest.mark.parametrize("inner", [MUON, ADAMW], ids=["muon", "adamw"])
def test_files_hold_what_the_replicas_trained(inner: dict[str, Any], tmp_path: Path) -> None:
    (found,) = run_ranks(trained, 1, saving(tmp_path / "saved", inner=inner))
    saved = SavedRounds(tmp_path / "saved")
    assert saved.rounds() == [1, 2]
    first = saved.load(1)
    for replica in range(REPLICAS):
        assert first.matrices[replica].keys() == found[replica].keys()
        for name, matrix in found[replica].items():
            assert_equal(first.matrices[replica][name], matrix, name)
            # a - b + (b - c) is a - c up to two roundings of numbers of the parameters' size.
            total = first.steps[replica][name].sum(0)
            assert torch.allclose(total, matrix, rtol=0, atol=4 * 2**-23)


def _save_on_ranks(directory: Path) -> None:
    config = saving(directory, parallel={"num_replicas": 1, "tensor_model_parallel_size": 2})
    start_tiny(config).train(2)
    finish_tiny()


def _save_on_one_rank(directory: Path) -> None:
    start_tiny(saving(directory, parallel={"num_replicas": 1})).train(2)
    finish_tiny()


@pytest.mark.parametrize("size", [2, 4], ids=["tp2", "tp2-dp2"])
def test_a_sharded_run_saves_the_same_names_and_shapes(size: int, tmp_path: Path) -> None:
    run_ranks(_save_on_ranks, size, tmp_path / "sharded")
    run_ranks(_save_on_one_rank, 1, tmp_path / "whole")
    sharded = SavedRounds(tmp_path / "sharded").load(1)
    whole = SavedRounds(tmp_path / "whole").load(1)
    for ours, theirs in (
        (sharded.matrices[0], whole.matrices[0]),
        (sharded.vectors[0], whole.vectors[0]),
        (sharded.steps[0], whole.steps[0]),
    ):
        assert {name: each.shape for name, each in ours.items()} == {
            name: each.shape for name, each in theirs.items()
        }


def _branch(config: RunConfig) -> Any:
    return branch(config, None, [1, 2], keep_steps=True)


def test_a_branch_trains_as_a_run_does(tmp_path: Path) -> None:
    prefix = byte_dataset(tmp_path)
    saved = {"dir": str(tmp_path / "saved"), "rounds": (1, 2), "steps": True}
    config = byte_config(
        prefix,
        parallel={"num_replicas": REPLICAS},
        inner=MUON,
        outer=NESTEROV,
        monitor={"save_pseudogradients": saved},
    )
    run_ranks(run_in_one_process, 1, config)
    first = SavedRounds(tmp_path / "saved").load(1)
    apart = config.model_copy(
        update={"monitor": config.monitor.model_copy(update={"save_pseudogradients": _off()})}
    )
    (found,) = run_ranks(_branch, 1, apart)
    for replica in range(REPLICAS):
        for name, matrix in found.pseudogradients[2][replica].items():
            assert_equal(first.matrices[replica][name], matrix, name)
            assert_equal(found.steps[replica][0][name], found.pseudogradients[1][replica][name])
    text = analyse_saved(tmp_path / "saved", None, "gate", tmp_path / "out")
    assert "Autocorrelation at lag 1: pseudogradient" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "layers.csv", "rounds.csv", "spectra.png", "momentum.png", "report.md",
    }  # fmt: skip


def _straight_and_warm(config: RunConfig) -> Any:
    return branch(config, None, [3, 5]), branch(config, warm_up(config, 3), [2])


def test_a_warm_branch_goes_on_where_the_warm_up_ended(tmp_path: Path) -> None:
    config = byte_config(byte_dataset(tmp_path), inner=MUON, outer={**NESTEROV, "sync_interval": 7})
    ((straight, resumed),) = run_ranks(_straight_and_warm, 1, config)
    for name, matrix in resumed.pseudogradients[2][0].items():
        # (a - b) - (a - c) against c - b: three roundings of numbers of the parameters' size.
        expected = straight.pseudogradients[5][0][name] - straight.pseudogradients[3][0][name]
        assert torch.allclose(matrix, expected, rtol=0, atol=4 * 2**-23), name


def _off() -> Any:
    from megatron_muloco.config.schema import SavePseudogradientsConfig

    return SavePseudogradientsConfig()
