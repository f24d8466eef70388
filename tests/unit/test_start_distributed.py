"""How a process joins its job on a machine with GPUs, tried with stand-ins for CUDA and NCCL."""

import os
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.runtime.distributed import hide_unwanted_gpus, start_distributed

MINUTE = timedelta(minutes=1)
TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29511",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Calls that a process makes while it joins as local rank 3 of a SLURM job with GPUs."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # restored after the test, whatever the code writes
        monkeypatch.delenv(name)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    made: dict[str, Any] = {}
    import deepspeed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.update(device=device))
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **given: made.update(given, backend=backend),
    )
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: made.update(adopted=given))
    return made


def test_the_job_is_joined_without_binding_a_device(calls: dict[str, Any]) -> None:
    ranks = start_distributed(timeout=MINUTE)
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (5, 3, 8)
    assert (calls["backend"], calls["rank"], calls["world_size"]) == ("nccl", 5, 8)
    assert "device_id" not in calls
    assert calls["adopted"]["dist_backend"] == "nccl"


@pytest.mark.parametrize(("visible", "device"), [(1, 0), (4, 3)])
def test_a_task_takes_the_only_visible_gpu_or_that_of_its_local_rank(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, visible: int, device: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    start_distributed(timeout=MINUTE)
    assert calls["device"] == device


def test_gpus_are_hidden_where_deepspeed_uses_the_cpu() -> None:
    for chosen, left in (("cpu", ""), ("cuda", "0,1"), (None, "0,1")):
        environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
        if chosen is not None:
            environ["DS_ACCELERATOR"] = chosen
        hide_unwanted_gpus(environ)
        assert environ["CUDA_VISIBLE_DEVICES"] == left, chosen


def test_a_gpu_that_can_no_longer_be_hidden_is_an_error(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(RuntimeMismatch, match="CUDA_VISIBLE_DEVICES"):
        start_distributed(timeout=MINUTE)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not calls
