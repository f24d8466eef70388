"""Replicas that fail numerically: `damage` changes masters after chosen inner steps."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

FAR = 1e6  # times the movement since the last outer step


def damage_masters(optimizer: Any, kind: str) -> None:
    """Put a NaN (``nan``) or an infinity (``inf``) into all masters, or move them ``far`` away."""
    masters = optimizer.view.masters
    if kind == "far":
        for name, anchor in optimizer.synchronizer.anchors().items():
            masters[name].copy_(anchor + FAR * (masters[name] - anchor))
    else:
        for master in masters.values():
            master[0] = {"nan": math.nan, "inf": math.inf}[kind]
    optimizer.view.publish()


@contextmanager
def damage(optimizer: Any, kinds: Mapping[int, str]) -> Iterator[None]:
    """Damage masters after the inner steps that ``kinds`` names, while the block runs.

    The kind ``gradient`` makes the gradient norm of its step NaN instead.
    """
    inner_step, clip = optimizer.inner_step, optimizer._distributed.clip_grad_norm

    def damaged_step() -> Any:
        report = inner_step()
        kind = kinds.get(report.step)
        if kind not in (None, "gradient"):
            with torch.no_grad():
                damage_masters(optimizer, kind)
        return report

    def damaged_norm(limit: float) -> float:
        norm = clip(limit)
        return math.nan if kinds.get(optimizer.steps) == "gradient" else norm

    optimizer.inner_step = damaged_step
    optimizer._distributed.clip_grad_norm = damaged_norm
    try:
        yield
    finally:
        del optimizer.inner_step, optimizer._distributed.clip_grad_norm
