"""The outer step: its sign, its formula, and how a replica takes the result."""

import pytest
import torch
from torch import Tensor

from megatron_muloco.outer.optimizer import (
    Additive,
    AnchorState,
    Mix,
    OuterNesterov,
    pin_while_used,
    pseudogradient,
)
from tests.support.tensors import assert_close, assert_equal, integer_tensor


def test_the_pseudogradient_points_uphill() -> None:
    anchor, local = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 5.0])
    out = torch.empty(2)
    assert pseudogradient(anchor, local, out=out) is out
    assert out.tolist() == [2.0, -2.0]
    assert anchor.tolist() == [3.0, 3.0]


def test_the_pseudogradient_of_bf16_parameters_is_computed_in_fp32() -> None:
    anchor, local = torch.tensor([1.0 + 2**-20]), torch.tensor([1.0], dtype=torch.bfloat16)
    assert pseudogradient(anchor, local, out=torch.empty(1)).item() == 2**-20


def test_averaging_puts_the_anchor_onto_the_mean_of_the_replicas() -> None:
    anchor = integer_tensor(9, seed=0)
    replicas = [integer_tensor(9, seed=seed) for seed in (1, 2)]
    deltas = [pseudogradient(anchor, local, out=torch.empty(9)) for local in replicas]
    OuterNesterov(lr=1.0, momentum=0.0).step(
        anchor, torch.zeros(9), (deltas[0] + deltas[1]) / 2, round_index=1
    )
    assert_equal(anchor, (replicas[0] + replicas[1]) / 2)


def sgd_history(start: Tensor, gradients: list[Tensor], lr: float, mu: float) -> list[Tensor]:
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=lr, momentum=mu, nesterov=True)
    history = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        history.append(parameter.detach().clone())
    return history


def our_history(start: Tensor, gradients: list[Tensor], lr: float, mu: float) -> list[Tensor]:
    anchor, momentum = start.clone(), torch.zeros_like(start)
    history = []
    for index, gradient in enumerate(gradients, start=1):
        OuterNesterov(lr, mu).step(anchor, momentum, gradient.clone(), round_index=index)
        history.append(anchor.clone())
    return history


def test_it_is_torch_sgd_with_nesterov_exactly_on_integers() -> None:
    # lr and momentum are powers of two and six steps need 6 extra bits: nothing is ever rounded.
    gradients = [integer_tensor(33, seed=seed) for seed in range(6)]
    start = integer_tensor(33, seed=99)
    ours = our_history(start, gradients, lr=0.5, mu=0.5)
    for step, (mine, theirs) in enumerate(
        zip(ours, sgd_history(start, gradients, lr=0.5, mu=0.5), strict=True)
    ):
        assert_equal(mine, theirs, f"step {step}")


@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (1.0, 0.6), (0.9, 0.8)])
def test_it_is_torch_sgd_with_nesterov_within_rounding(lr: float, mu: float) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(50, generator=generator) for _ in range(4)]
    start = torch.randn(50, generator=generator)
    ours = our_history(start, gradients, lr, mu)
    for mine, theirs in zip(ours, sgd_history(start, gradients, lr, mu), strict=True):
        # Four operations a step, each within half an ulp (6e-8) of numbers below 50, four steps.
        assert_close(mine, theirs, rtol=0.0, atol=4 * 4 * 50 * 6e-8)


def test_lr_and_momentum_may_follow_the_round() -> None:
    anchor, momentum = torch.zeros(1), torch.zeros(1)
    optimizer = OuterNesterov(lr=lambda round_index: 1.0 / round_index, momentum=lambda _: 0.0)
    for round_index in (1, 2):
        optimizer.step(anchor, momentum, torch.ones(1), round_index=round_index)
    assert anchor.item() == -1.5


def test_it_leaves_the_amount_taken_off_the_anchor() -> None:
    anchor, mean = torch.tensor([4.0]), torch.tensor([2.0])
    OuterNesterov(0.5, 0.5).step(anchor, torch.zeros(1), mean, round_index=1)
    assert (mean.item(), anchor.item()) == (1.5, 2.5)


def test_mixing_keeps_a_share_of_the_local_value() -> None:
    local, anchor = torch.tensor([8.0]), torch.tensor([0.0])
    Mix(0.25).merge(local, anchor, local)
    assert local.item() == 2.0


def test_without_mixing_not_even_a_nan_is_kept() -> None:
    local, anchor = torch.tensor([float("nan")]), torch.tensor([1.0])
    Mix().merge(local, anchor, local)
    assert local.item() == 1.0


def test_additive_keeps_the_progress_since_the_launch() -> None:
    local, anchor, at_launch = torch.tensor([7.0]), torch.tensor([10.0]), torch.tensor([5.0])
    Additive().merge(local, anchor, at_launch)
    assert local.item() == 12.0


# ---- the anchor's memory -------------------------------------------------------------------------


def test_the_anchor_state_has_8_bytes_a_value() -> None:
    # Sizes of which none is a power of two: a pinned block for each would be rounded up.
    masters = {
        "a": integer_tensor(1000, seed=1),
        "b": integer_tensor(129, seed=2),
        "c": integer_tensor(7, seed=3),
    }
    state = AnchorState(masters, torch.device("cpu"))
    blocks = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in (*state.anchor.values(), *state.momentum.values())
    }
    assert sum(blocks.values()) == 8 * (1000 + 129 + 7)
    for name, local in masters.items():
        assert_equal(state.anchor[name], local)
        assert_equal(state.momentum[name], torch.zeros_like(local))
    state.anchor["a"].add_(1)
    assert_equal(state.anchor["b"], masters["b"])  # tensors do not overlap
    assert_equal(state.momentum["a"], torch.zeros(1000))
    assert AnchorState({}, torch.device("cpu")).anchor == {}  # a rank without shards


def test_pinned_memory_is_released_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    class Runtime:
        """Replacement for the CUDA runtime, which CPU builds of torch lack."""

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("pin", size))
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unpin", address))
            return 0

    class Owner:
        pass

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    owner, block = Owner(), torch.zeros(2, 1129)
    pin_while_used(owner, block)
    assert calls == [("pin", 2 * 1129 * 4)]
    address = block.data_ptr()
    del block
    del owner
    assert calls[1:] == [("unpin", address)]
