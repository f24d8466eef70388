"""How a process joins its job on a machine with GPUs, tried with stand-ins for CUDA and NCCL."""

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch

from megatron_muloco.errors import RuntimeMismatch, SyncError
from megatron_muloco.runtime import distributed
from megatron_muloco.runtime.distributed import (
    hide_unwanted_gpus,
    listening_address,
    require_determinism,
    start_distributed,
    use_one_hardware_queue,
)
from megatron_muloco.runtime.ranks import RankInfo
from tests.support.ports import held_port

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
    monkeypatch.setattr(distributed, "_rendezvous", lambda ranks, timeout: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **given: made.update(adopted=given))
    return made


def test_the_job_is_joined_without_binding_a_device(calls: dict[str, Any]) -> None:
    ranks = start_distributed(timeout=MINUTE)
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (5, 3, 8)
    assert (calls["backend"], calls["rank"], calls["world_size"]) == ("nccl", 5, 8)
    assert "device_id" not in calls
    assert calls["adopted"]["dist_backend"] == "nccl"


def at(address: str, *, local: bool) -> RankInfo:
    return RankInfo("launcher", 0, 4, 0, 4 if local else 2, address, 29500)


@pytest.mark.parametrize(
    ("address", "local", "listens"),
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("127.0.0.1", False, "127.0.0.1"),  # a launcher that does not give the local size
        ("node1", True, "127.0.0.1"),
        ("node1", False, ""),  # /etc/hosts of this machine; others see another address
        ("192.0.2.7", False, ""),  # of a router in front of this machine (RFC 5737)
        ("nowhere", False, ""),
    ],
)
def test_the_store_listens_where_all_ranks_find_it(
    monkeypatch: pytest.MonkeyPatch, address: str, local: bool, listens: str
) -> None:
    def resolve(name: str, *args: object, **kwargs: object) -> list[Any]:
        if name == "nowhere":
            raise OSError("no such name")
        return [(0, 0, 0, "", ("127.0.0.1" if name == "node1" else name, 0))]

    monkeypatch.setattr(distributed.socket, "getaddrinfo", resolve)
    assert listening_address(at(address, local=local)) == listens


def test_the_store_of_a_local_run_listens_on_the_loopback_interface_alone() -> None:
    with held_port() as port:
        ranks = RankInfo("launcher", 0, 1, 0, 1, "127.0.0.1", port)
        store = distributed._rendezvous(ranks, MINUTE)
        store.set("key", "value")
        listening = {
            connection.laddr.ip
            for connection in psutil.Process().net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        }
    assert listening == {"127.0.0.1"}


def test_ranks_that_do_not_join_are_named() -> None:
    with held_port() as port:
        ranks = RankInfo("launcher", 0, 3, 0, 3, "127.0.0.1", port)
        with pytest.raises(SyncError, match=r"ranks \[1, 2\] of 3 have not joined the job"):
            distributed._rendezvous(ranks, timedelta(seconds=0.5))


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
