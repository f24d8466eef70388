"""The CPU seam: tensors for "cuda" land on the CPU, and nothing else changes."""

import pytest
import torch

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.runtime.accelerator import (
    CpuDeviceMode,
    enable_cpu_backend,
    training_device,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cpu", torch.device("cuda", 1)], ids=str)
def test_factories_and_moves_land_on_the_cpu(device: object) -> None:
    with CpuDeviceMode():
        assert torch.ones(2, device=device).device == CPU
        assert torch.ones(2).to(device).device == CPU
        assert torch.ones(2).to(device=device, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert torch.empty_like(torch.ones(2), device=device).device == CPU


def test_other_devices_and_other_arguments_are_left_alone() -> None:
    with CpuDeviceMode():
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.ones(2).to(torch.float64).dtype is torch.float64


def test_cuda_calls_are_the_tensor_itself() -> None:
    tensor = torch.ones(2)
    with CpuDeviceMode():
        assert tensor.cuda() is tensor


def test_type_names_are_those_that_megatron_asks_for() -> None:
    with CpuDeviceMode():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type(torch.float64).dtype is torch.float64


def test_gradients_flow_through_moved_tensors() -> None:
    weight = torch.ones(3, requires_grad=True)
    with CpuDeviceMode():
        (weight.to("cuda") * torch.arange(3.0, device="cuda")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 1, 2]


def test_it_refuses_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeMismatch, match="machine with a CUDA accelerator"):
        enable_cpu_backend()


def test_the_training_device_is_the_cpu_without_an_accelerator() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has an accelerator")
    assert training_device() == CPU
