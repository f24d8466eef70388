"""`SpikeWatch`: which inner steps a replica skips, and when it goes back to the anchor.

::

    gradient norm of a step  >  max_norm_ratio x median of the last steps  ->  skip the step
    loss of `patience` steps >  max_loss_ratio x median of the last steps  ->  back to the anchor

Both medians are over the last `window` steps of this replica, and nothing is compared before so
many are known. All finite values enter them, also those of steps that were skipped or lost. A
lasting change, such as harder data, is therefore accepted after half a window, and no replica skips
for ever.

The numbers compared are sums over the replica, equal on all its ranks, so all of them decide alike.
Other replicas are not asked. The windows are part of a checkpoint: a resumed run skips the steps
that an undisturbed one skips.

`SkipLimit` counts skipped steps in a row.
"""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median_low
from typing import Any

from megatron_muloco.config.schema import SpikesConfig

__all__ = ["RunningMedian", "SkipLimit", "SpikeWatch"]


class RunningMedian:
    """Median of the last values; the lower one of two.

    Args:
        window: Number of values, at least 1.
    """

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    @property
    def values(self) -> list[float]:
        """The last values, oldest first."""
        return list(self._values)

    def restore(self, values: list[float]) -> None:
        """Replace all values; of more than the window the last ones count."""
        self._values.clear()
        self._values.extend(float(value) for value in values)

    def exceeded_by(self, value: float, ratio: float) -> bool:
        """Whether ``value`` is above ``ratio`` times the median of the values before it.

        A value that is not finite always is. Below a full window no other value is.
        """
        if not math.isfinite(value):
            return True
        if len(self._values) < (self._values.maxlen or 0):
            return False
        return value > ratio * median_low(self._values)

    def add(self, value: float) -> None:
        """Add a value; one that is not finite is left out."""
        if math.isfinite(value):
            self._values.append(value)


class SpikeWatch:
    """Judges the gradient norms and the losses of one replica.

    Args:
        config: The section ``training.spikes``. A ratio of 0 judges and keeps nothing.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self._config = config
        self._norms, self._losses = RunningMedian(config.window), RunningMedian(config.window)
        self._high_losses = 0

    @property
    def watches_losses(self) -> bool:
        """Whether a replica may go back to the anchor because of its loss."""
        return self._config.max_loss_ratio > 0.0

    def is_spike(self, grad_norm: float) -> bool:
        """Judge the gradient norm of a step, and count it. Called once in every inner step.

        A norm that is not finite is no spike here: such a step is skipped in any case.

        Args:
            grad_norm: Norm over the whole replica before clipping, equal on all its ranks.
        """
        ratio = self._config.max_norm_ratio
        if not ratio or not math.isfinite(grad_norm):
            return False
        spike = self._norms.exceeded_by(grad_norm, ratio)
        self._norms.add(grad_norm)
        return spike

    def asks_for_anchor(self, loss: float) -> bool:
        """Judge the loss of a step, and count it. Called once in every inner step.

        After True the count of high losses begins again. The losses stay in the window: were they
        dropped, a replica whose data have become harder would be set back for ever.

        Args:
            loss: Mean loss of the step over the replica, equal on all its ranks.
        """
        if not self.watches_losses:
            return False
        high = self._losses.exceeded_by(loss, self._config.max_loss_ratio)
        self._losses.add(loss)
        self._high_losses = self._high_losses + 1 if high else 0
        if self._high_losses < self._config.patience:
            return False
        self._high_losses = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return windows and count as plain numbers, for JSON; exact."""
        return {
            "norms": self._norms.values,
            "losses": self._losses.values,
            "high_losses": self._high_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; from an empty mapping, begin with empty windows."""
        self._norms.restore(state.get("norms", []))
        self._losses.restore(state.get("losses", []))
        self._high_losses = int(state.get("high_losses", 0))


class SkipLimit:
    """Skipped inner steps of a replica in a row.

    Args:
        limit: Number at which the run has to stop; 0 is no limit.

    Attributes:
        in_a_row: Steps skipped in a row, up to now.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.in_a_row = 0

    def count(self, *, skipped: bool) -> None:
        """Count an inner step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    @property
    def reached(self) -> bool:
        """Whether the limit is reached."""
        return 0 < self._limit <= self.in_a_row
