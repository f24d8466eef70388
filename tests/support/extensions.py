"""Extensions that live outside the package; a codec of its own is in `own_codec`.

Parameter names, two update rules for matrices, an outer optimizer, and a metric with its reducer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from megatron_muloco import ReplicaOptimizer, wrap_optimizer
from megatron_muloco.monitor.metrics import Chart, Metric
from megatron_muloco.outer.reducer import Measurement, Reduced, Reducer, Residuals, Sizes
from megatron_muloco.params import ParameterNames

__all__ = [
    "OTHER_NAMES",
    "ZERO_SHARE",
    "FeedForward",
    "HeavyBall",
    "SignedMomentum",
    "ZeroShare",
    "polar_factor",
    "with_other_names",
    "wrap_with_own_parts",
]

# ---- a metric ------------------------------------------------------------------------------------

ZERO_SHARE = Metric(
    "lab/zero_share",
    unit="1",
    over_steps="event",
    over_ranks="the same everywhere",
    when="an outer step",
    meaning="Share of the mean pseudogradient that is exactly 0.",
    chart=Chart("Lab", "share of zeros"),
)


class ZeroShare:
    """A `Reducer` that measures `ZERO_SHARE` of what another reducer returns."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self.residual_names = reducer.residual_names
        self.returns_views = reducer.returns_views

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        return self._reducer.memory(sizes, metadata_count)

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> Any:
        return self._reducer.launch(fragment, tensors, weight, metadata, round_index=round_index)

    def advance(self, handle: Any) -> None:
        self._reducer.advance(handle)

    def wait(self, handle: Any) -> Reduced:
        reduced = self._reducer.wait(handle)
        counts = [torch.stack([(t == 0).sum(), (t != 0).sum()]) for t in reduced.mean.values()]
        numbers = sum(counts) if counts else torch.zeros(2)  # a rank without shards adds nothing
        own = {ZERO_SHARE.tag: Measurement(numbers.double(), zero_share, over_ranks=True)}
        measurements = {**reduced.stats.measurements, **own}
        return replace(reduced, stats=replace(reduced.stats, measurements=measurements))

    def forget_residual(self) -> None:
        self._reducer.forget_residual()

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        return self._reducer.residuals(fragments)

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        self._reducer.load_residuals(residuals, fragments)


def zero_share(zeros: float, others: float) -> float | None:
    return zeros / (zeros + others) if zeros + others else None


# ---- an architecture -----------------------------------------------------------------------------

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


# ---- optimizers ----------------------------------------------------------------------------------


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


def polar_factor(matrices: Tensor) -> Tensor:
    """Return the exact orthogonal factors ``U V^T`` of a batch of matrices, fp32."""
    U, _, Vt = torch.linalg.svd(matrices.float(), full_matrices=False)
    return U @ Vt


@dataclass(frozen=True)
class HeavyBall:
    """An `OuterOptimizer`: ``u <- mu u + D; theta <- theta - eta u``."""

    lr: float
    momentum: float

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor, *, round_index: int) -> None:
        momentum.mul_(self.momentum).add_(mean)
        update = mean.copy_(momentum).mul_(self.lr)
        anchor.sub_(update)


def wrap_with_own_parts(optimizer: Any, model: Any, config: Any, groups: Any) -> ReplicaOptimizer:
    return wrap_optimizer(
        optimizer,
        model,
        config,
        groups,
        names=OTHER_NAMES,
        matrix_update=SignedMomentum(),
        outer_optimizer=HeavyBall(lr=0.7, momentum=0.6),
    )
