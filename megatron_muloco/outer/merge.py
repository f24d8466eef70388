"""How a replica takes the new anchor: two rules, one object each."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Additive", "MergeRule", "Mix"]


class MergeRule(Protocol):
    """Moves local parameters after their fragment's outer step."""

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write the new local parameters into ``local``.

        Args:
            local: theta_k now; written in place.
            anchor: theta after the outer step.
            at_launch: theta_k when the fragment was launched; ``local`` itself without overlap.
        """


@dataclass(frozen=True, slots=True)
class Mix:
    """``theta_k <- (1 - alpha) * theta + alpha * theta_k``.

    Attributes:
        mixing_weight: alpha, the share of the local value that is kept; 0 takes the anchor.

    Source: Streaming DiLoCo (arXiv:2501.18512), where alpha is 0.5 whenever launches overlap steps.
    """

    mixing_weight: float = 0.0

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write the weighted mean of anchor and local parameters."""
        if self.mixing_weight == 0.0:  # not only faster: 0 * NaN would keep a NaN
            local.copy_(anchor)
        else:
            local.mul_(self.mixing_weight).add_(anchor * (1.0 - self.mixing_weight))


@dataclass(frozen=True, slots=True)
class Additive:
    """``theta_k <- theta + (theta_k - theta_k at launch)``: keeps all progress since the launch."""

    def merge(self, local: Tensor, anchor: Tensor, at_launch: Tensor) -> None:
        """Write the anchor plus what the replica did since the launch."""
        if local is at_launch:
            local.copy_(anchor)
        else:
            local.sub_(at_launch).add_(anchor)
