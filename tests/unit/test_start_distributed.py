"""How a process joins its job on a machine with GPUs, tried with stand-ins for CUDA and NCCL."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.runtime.distributed import (
    hide_unwanted_gpus,
    require_determinism,
    start_distributed,
    use_one_hardware_queue,
)

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


def test_the_number_of_hardware_queues_is_the_users_if_set() -> None:
    for chosen, used in (({}, "1"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")):
        environ = dict(chosen)
        use_one_hardware_queue(environ)
        assert environ == {"CUDA_DEVICE_MAX_CONNECTIONS": used}


def test_a_gpu_that_can_no_longer_be_hidden_is_an_error(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(RuntimeMismatch, match="CUDA_VISIBLE_DEVICES"):
        start_distributed(timeout=MINUTE)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not calls


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Put back what `require_determinism` changes in torch."""
    before = torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic
    filled = filling.fill_uninitialized_memory
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(before)
    filling.fill_uninitialized_memory = filled
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


@pytest.mark.usefixtures("torch_settings")
def test_determinism_is_set_before_cuda_starts(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    seen: dict[str, str] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(os.environ))
    start_distributed(timeout=MINUTE)
    assert "NCCL_ALGO" not in seen
    assert not torch.are_deterministic_algorithms_enabled()
    start_distributed(timeout=MINUTE, deterministic=True)
    assert (seen["CUBLAS_WORKSPACE_CONFIG"], seen["NCCL_ALGO"]) == (":4096:8", "Ring")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.usefixtures("torch_settings")
def test_it_is_an_error_where_cuda_has_started() -> None:
    environ = {"NCCL_ALGO": "Tree"}
    with pytest.raises(RuntimeMismatch, match="Start it with CUBLAS_WORKSPACE_CONFIG=:4096:8"):
        require_determinism(environ, started=True)
    assert environ == {"NCCL_ALGO": "Tree"}
    assert not torch.are_deterministic_algorithms_enabled()
    environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    require_determinism(environ, started=True)
    assert environ == {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    assert torch.are_deterministic_algorithms_enabled()
