"""Extensions that live outside the package: parameter names, an update rule, an outer optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_muloco.params import ParameterNames

__all__ = ["OTHER_NAMES", "FeedForward", "HeavyBall", "SignedMomentum", "with_other_names"]

OTHER_NAMES = ParameterNames(
    layers="decoder.layers",
    embedding="embedding.word_embeddings.weight",
    output="output_layer.weight",
    matrices={
        "self_attention.linear_qkv.weight": "qkv",
        "self_attention.linear_proj.weight": "proj",
        "mlp.gate_and_up.weight": "fc1",
        "mlp.down.weight": "fc2",
    },
)


class FeedForward(MLP):
    """Megatron's MLP, whose matrices have other names."""

    @property
    def linear_fc1(self) -> nn.Module:
        return self.gate_and_up

    @property
    def linear_fc2(self) -> nn.Module:
        return self.down


def with_other_names(model: nn.Module) -> nn.Module:
    """Rename the MLP matrices of a GPTModel in place, so that it starts from the same values."""
    for layer in model.decoder.layers:
        mlp = layer.mlp
        first, second = mlp.linear_fc1, mlp.linear_fc2
        del mlp.linear_fc1, mlp.linear_fc2
        mlp.__class__ = FeedForward
        mlp.gate_and_up, mlp.down = first, second
    return model


class SignedMomentum:
    """A `MatrixUpdate`: the sign of a moving average, divided by the norm of the whole matrix."""

    state_names = ("velocity",)

    def accumulate(
        self, gradients: list[Tensor], state: Mapping[str, list[Tensor]]
    ) -> list[Tensor]:
        for velocity, gradient in zip(state["velocity"], gradients, strict=True):
            velocity.lerp_(gradient, 0.5)
        return [velocity.sign() for velocity in state["velocity"]]

    def update(self, stacked: Tensor) -> Tensor:
        return stacked / torch.linalg.vector_norm(stacked, dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class HeavyBall:
    """An `OuterOptimizer`: ``u <- mu u + D; theta <- theta - eta u``."""

    lr: float
    momentum: float

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor, *, round_index: int) -> None:
        momentum.mul_(self.momentum).add_(mean)
        update = mean.copy_(momentum).mul_(self.lr)
        anchor.sub_(update)
