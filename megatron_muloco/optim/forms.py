"""The forms in which Newton-Schulz is computed, and their FLOPs. No torch here.

Sources of the counts: `newton_schulz` (plain) and `gram` (the others), where the products are.
"""

from collections.abc import Callable
from typing import Literal

__all__ = ["ChooseForm", "Implementation", "always_plain", "newton_schulz_flops"]

Implementation = Literal["plain", "triangle", "gram", "library"]
"""``plain``: as published. ``triangle``: half of each symmetric product. ``gram``: pairs of steps
too. ``library``: kernels for CUDA, which ``auto`` does not choose as long as nobody has run them.
"""

ChooseForm = Callable[[int, int], Implementation]
"""Says which form a matrix of so many rows and columns gets."""


def always_plain(rows: int, columns: int) -> Implementation:
    """Return ``plain`` for every shape."""
    return "plain"


def newton_schulz_flops(rows: int, columns: int, steps: int, form: Implementation = "plain") -> int:
    """Return the FLOPs of ``steps`` quintic steps in one form; ``library`` counts as ``plain``.

    With m the smaller side and n the longer, a wide product takes 2 m^2 n and a small one 2 m^3;
    of a symmetric one, the triangle forms compute half. A plain step has two wide products and a
    small one. A step alone has one wide product and halves of a wide and a small one; a pair of
    steps has five small halves in place of one, and as many wide ones as a step alone.
    """
    m, n = sorted((rows, columns))
    if form in ("plain", "library"):
        return steps * (4 * m * m * n + 2 * m * m * m)
    alone = 3 * m * m * n + m * m * m
    if form == "triangle" or steps < 2:
        return steps * alone
    pairs, odd = divmod(steps - 1, 2)  # the first step is alone in any case
    return (1 + odd) * alone + pairs * (3 * m * m * n + 5 * m * m * m)
