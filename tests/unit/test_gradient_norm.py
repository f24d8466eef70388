"""`norm_of_all` against Megatron's function, and where it replaces it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_muloco.runtime.megatron import keep_statistics_inside, norm_of_all


def megatron_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the result of Megatron's function, which names the device cuda."""
    original = torch.tensor

    def on_cpu(values: Any, **options: Any) -> torch.Tensor:
        return original(values, dtype=options.get("dtype"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", on_cpu)
        result: torch.Tensor = local_multi_tensor_l2_norm(0, None, [tensors], False)[0]
    return result


@pytest.mark.parametrize("count", [1, 2, 7, 33, 112])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_norm_has_the_bits_of_megatrons(count: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [
        torch.randn(1 + (37 * i) % 1009, generator=generator).mul_(scale) for i in range(count)
    ]
    norm, per_tensor = norm_of_all(0, torch.zeros(1), [tensors], False)
    assert per_tensor is None
    assert norm.shape == (1,)
    assert torch.equal(norm, megatron_norm(tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_stays_so(bad: float) -> None:
    """The step is skipped where the norm is not finite."""
    norm, _ = norm_of_all(0, torch.zeros(1), [[torch.ones(3), torch.tensor([1.0, bad])]], False)
    assert not norm.isfinite()


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("theirs", [local_multi_tensor_l2_norm, len], ids=["local", "apex"])
def test_only_megatrons_slow_function_is_replaced(
    on_gpu: bool, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", theirs)
    optimizer: Any = SimpleNamespace()
    groups: Any = SimpleNamespace(pg=SimpleNamespace(intra_dist_opt="replica", tp="tp"))
    keep_statistics_inside(optimizer, groups)
    assert optimizer.grad_stats_parallel_group == "replica"
    replaced = on_gpu and theirs is local_multi_tensor_l2_norm
    assert clip_grads.l2_norm_impl is (norm_of_all if replaced else theirs)
