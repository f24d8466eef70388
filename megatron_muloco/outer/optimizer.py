"""The outer optimizer: one Nesterov step on the anchor, a shard at a time."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["OuterNesterov", "RoundSchedule"]

RoundSchedule = Callable[[int], float]
"""A hyperparameter as a function of the round, which is counted from 1."""


@dataclass(frozen=True, slots=True)
class OuterNesterov:
    """SGD with Nesterov momentum on the mean pseudogradient.

    ::

        u  <-  mu * u + D
        theta  <-  theta - eta * (D + mu * u)

    Attributes:
        lr: Outer learning rate (eta). It enters here and nowhere else, also with error feedback.
        momentum: Outer momentum (mu).

    Source: DiLoCo (arXiv:2311.08105), in the form of ``torch.optim.SGD(nesterov=True)``,
    whose momentum does not contain the learning rate, so that a schedule of ``lr`` acts at once.
    """

    lr: float | RoundSchedule
    momentum: float | RoundSchedule

    def step(self, anchor: Tensor, momentum: Tensor, mean: Tensor, *, round_index: int) -> None:
        """Update ``anchor`` and ``momentum`` in place.

        Args:
            anchor: theta, fp32.
            momentum: u, same shape; zeros before the first step.
            mean: D, the mean pseudogradient; overwritten with the amount taken off the anchor.
            round_index: Round for schedules.

        Dtypes: every product is rounded before it is added (no fused multiply-add), so the result
        does not depend on where a shard starts, and equals torch's SGD within one rounding.
        """
        lr, mu = _at(self.lr, round_index), _at(self.momentum, round_index)
        momentum.mul_(mu).add_(mean)
        update = mean.add_(momentum * mu).mul_(lr)
        anchor.sub_(update)


def _at(value: float | RoundSchedule, round_index: int) -> float:
    return value(round_index) if callable(value) else value
