"""The learning rate as a pure function of the inner step, so that resuming needs no state."""

import math

from megatron_muloco.config.inner import InnerConfig

__all__ = ["learning_rate"]


def learning_rate(inner: InnerConfig, train_iters: int, step: int) -> float:
    """Return the learning rate of inner step ``step`` (1-based, counted over all rounds).

    Linear from lr/warmup at step 1 to lr at step ``lr_warmup_iters``, then the chosen decay, down
    to ``min_lr_ratio * lr`` at step ``train_iters`` and after it.

    Source: MuLoCo research code (500 steps of linear warm-up, cosine to 0.1 of the peak over the
    rest); steps are counted from 1, so that the first step already moves.
    """
    if step < 1:
        raise ValueError(f"inner steps are counted from 1, got {step}")
    warmup = inner.lr_warmup_iters
    if step <= warmup:
        return inner.lr * step / warmup
    if inner.lr_decay_style == "constant":
        return inner.lr
    progress = min(1.0, (step - warmup) / (train_iters - warmup))
    remaining = (
        0.5 * (1.0 + math.cos(math.pi * progress))
        if inner.lr_decay_style == "cosine"
        else 1.0 - progress
    )
    floor = inner.lr * inner.min_lr_ratio
    return floor + (inner.lr - floor) * remaining
