"""What inner steps recorded since the last line; tensors stay on their device until read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.registry import metric
from megatron_muloco.monitor.throughput import Speed

__all__ = ["DueLine", "Interval", "Value", "floats"]

Value = Tensor | float
"""A number, or a 0-dim tensor that may be on an accelerator."""


@dataclass(frozen=True, slots=True)
class DueLine:
    """The line of one inner step, before it is known what the other replicas have.

    Attributes:
        step: Inner step.
        values: Tag -> value on this rank.
        skipped: Steps that this replica skipped since the last line.
        speed: Of the steps since the last line.
    """

    step: int
    values: Mapping[str, Value]
    skipped: Value
    speed: Speed

    def shared(self) -> tuple[Value, Value, Value]:
        """Return what is averaged over replicas: loss, gradient norm and skipped steps."""
        return self.values["lm loss"], self.values.get("grad-norm", math.nan), self.skipped


class Interval:
    """Collects per-step metrics by the registry's rule for steps: their mean, or the last value."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, Value] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, Value] = {}
        self._skipped: Value = 0.0

    def add(self, values: Mapping[str, Value]) -> None:
        """Take one inner step's values.

        Raises:
            RuntimeMismatch: A tag is not in the registry, or is not one of inner steps.
        """
        for tag, value in values.items():
            rule = metric(tag).over_steps
            if rule == "event":
                raise RuntimeMismatch(
                    f"metric {tag!r} is written when something happens, not recorded with every "
                    "inner step; use Monitor.scalars for it."
                )
            own = value.detach() if isinstance(value, Tensor) else value
            if rule == "mean":
                self._sums[tag] = self._sums.get(tag, 0.0) + own
                self._counts[tag] = self._counts.get(tag, 0) + 1
            else:
                # A sum is a new tensor; this one might be a buffer that the next step overwrites.
                self._last[tag] = own.clone() if isinstance(own, Tensor) else own
        if "grad-norm" in values:
            self._skipped = self._skipped + _not_finite(values["grad-norm"])

    def take(self) -> tuple[dict[str, Value], Value]:
        """Return the values and the skipped steps since the last call, and start over."""
        values = {tag: total / self._counts[tag] for tag, total in self._sums.items()}
        values |= self._last
        skipped = self._skipped
        self._clear()
        return values, skipped


def _not_finite(value: Value) -> Value:
    if isinstance(value, Tensor):
        return (~torch.isfinite(value.detach())).float()
    return 0.0 if math.isfinite(value) else 1.0


def floats(values: Iterable[Value]) -> list[float]:
    """Return plain numbers; all tensors on one device cross to the host in one transfer."""
    given: Sequence[Value] = list(values)
    tensors = [value for value in given if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in given]
    device = tensors[-1].device
    read = iter(torch.stack([t.detach().to(device).double().reshape(()) for t in tensors]).tolist())
    return [next(read) if isinstance(value, Tensor) else float(value) for value in given]
