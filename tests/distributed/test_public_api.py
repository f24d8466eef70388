"""Relation 12: a bare Megatron loop with the two public calls is `pretrain.py`, bit for bit."""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_muloco.config import RunConfig
from megatron_muloco.data.prepare import PrepareOptions, prepare
from megatron_muloco.training.build import build_run
from megatron_muloco.training.loop import train
from megatron_muloco.training.stopping import StopRequest
from tests.support import bare_loop
from tests.support.faults import count_calls
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, finish_tiny, tiny_config

ROOT = Path(__file__).parents[2]
STEPS = 5  # two rounds of two steps, and one that only the flush brings together
INNER = {"adamw": ADAMW, "muon": MUON}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the prefix of a small indexed dataset."""
    directory = tmp_path_factory.mktemp("data")
    texts = (f"document {i}: " + "some words of no great length. " * (i % 7) for i in range(60))
    source = directory / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(source)], str(directory / "text"), PrepareOptions("byte-level", workers=1))
    return str(directory / "text")


def config_of(dataset: str, inner: str, **sections: Any) -> RunConfig:
    return tiny_config(
        inner=INNER[inner],
        model={"vocab_size": 512},
        data={"train": ({"path": dataset},)},
        parallel={"num_replicas": 2, **sections.pop("parallel", {})},
        training={"train_iters": STEPS, "global_batch_size": 8, "micro_batch_size": 2}
        | sections.pop("training", {}),
        **sections,
    )


def _tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    found = {f"master {name}": t.clone() for name, t in optimizer.view.masters.items()}
    found |= {f"anchor {name}": t.clone() for name, t in optimizer.synchronizer.anchors().items()}
    return found


Trajectory = tuple[list[float], list[float], dict[str, torch.Tensor]]


def _with_pretrain(config: RunConfig) -> Trajectory:
    context = build_run(config)
    with count_calls(context.monitor, "record") as records:
        train(context, StopRequest())
    losses = [float(metrics["lm loss"]) for _, metrics in records]
    norms = [float(metrics["grad-norm"]) for _, metrics in records]
    tensors = _tensors(context.optimizer)
    finish_tiny()
    return losses, norms, tensors


def _with_a_bare_loop(config: RunConfig) -> Trajectory:
    run = bare_loop.train(config, partial(bare_loop.text_batches, config), STEPS)
    tensors = _tensors(run.optimizer)
    finish_tiny()
    return run.losses, run.grad_norms, tensors


def _without_launcher(config: RunConfig) -> Trajectory:
    """Train where the caller initialised torch.distributed without any launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        del os.environ[name]
    deepspeed_comm: Any = sys.modules["deepspeed.comm.comm"]
    deepspeed_comm.cdb = None
    return _with_a_bare_loop(config)


def _stopped_and_resumed(config: RunConfig, directory: Path) -> Trajectory:
    losses, norms = [], []
    for steps in (3, STEPS):  # the first one stops in the middle of a round
        run = bare_loop.train(config, partial(bare_loop.text_batches, config), steps, directory)
        losses += run.losses
        norms += run.grad_norms
        tensors = _tensors(run.optimizer)
        finish_tiny()
    return losses, norms, tensors


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "tp1": ({}, 2),
    "tp2": ({"parallel": {"tensor_model_parallel_size": 2}}, 4),
}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("case", CASES)
def test_a_bare_loop_with_two_calls_is_pretrain(case: str, inner: str, dataset: str) -> None:
    sections, world = CASES[case]
    config = config_of(dataset, inner, **sections)
    check_equal(
        run_ranks(_with_a_bare_loop, world, config), run_ranks(_with_pretrain, world, config)
    )


def test_pipeline_stages_bf16_and_data_parallelism_too(dataset: str) -> None:
    pipeline = {"parallel": {"pipeline_model_parallel_size": 2}, "training": {"precision": "bf16"}}
    for sections in (pipeline, {}):
        config = config_of(dataset, "muon", **sections)
        bare, ours = (run_ranks(fn, 4, config) for fn in (_with_a_bare_loop, _with_pretrain))
        check_equal(bare, ours, every_rank_has_the_loss=False)


def test_a_bare_loop_stopped_and_resumed_was_never_stopped(dataset: str, tmp_path: Path) -> None:
    config = config_of(dataset, "muon")
    check_equal(
        run_ranks(_stopped_and_resumed, 2, config, tmp_path),
        run_ranks(_with_a_bare_loop, 2, config),
    )


def _with_the_script(arguments: list[str]) -> None:
    bare_loop.main(arguments)
    finish_tiny()


def test_the_loop_is_a_whole_script(dataset: str, tmp_path: Path) -> None:
    """It reads a config and data, writes one point a step, and goes on from its checkpoint."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"extends: {ROOT}/configs/cpu_k2.yaml\n"
        "model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 1,\n"
        "        seq_length: 32, vocab_size: 512}\n"
        f"data: {{train: {dataset}, valid: [],\n"
        "       tokenizer_type: byte-level, tokenizer_model: null}\n"
        "training: {global_batch_size: 4, micro_batch_size: 2, eval_interval: 0}\n"
        "inner: {lr_warmup_iters: 1}\n"
        "outer: {sync_interval: 2}\n"
        f"checkpoint: {{dir: {tmp_path}/saved}}\n"
        f"monitor: {{dir: {tmp_path}/events}}\n"
    )
    for steps in (3, 5):
        given = ["--config", str(file), "--set", f"training.train_iters={steps}"]
        run_ranks(_with_the_script, 2, given)
    points = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("lm loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]


def test_a_world_that_the_caller_initialised(dataset: str) -> None:
    config = config_of(dataset, "adamw")
    check_equal(run_ranks(_without_launcher, 2, config), run_ranks(_with_pretrain, 2, config))


def check_equal(
    bare: list[Trajectory], ours: list[Trajectory], *, every_rank_has_the_loss: bool = True
) -> None:
    """Losses, norms, masters and anchors of every rank are the same bits."""
    for one, other in zip(bare, ours, strict=True):
        if every_rank_has_the_loss:
            assert len(one[0]) == STEPS
            assert one[0] == other[0]
        assert one[1] == other[1]
        assert one[2].keys() == other[2].keys()
        assert any(name.startswith("anchor") for name in one[2])
        for name, tensor in one[2].items():
            assert_equal(tensor, other[2][name], name)
