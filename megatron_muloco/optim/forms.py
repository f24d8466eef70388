"""The forms in which Newton-Schulz is computed, and their FLOPs. No torch here.

Sources of the counts: `newton_schulz` (plain) and `gram` (the others), where the products are.
"""

from collections.abc import Callable
from typing import Literal

__all__ = ["ChooseForm", "Implementation", "always_plain", "automatic_form", "newton_schulz_flops"]

Implementation = Literal["plain", "triangle", "gram"]
"""``plain``: as published. ``triangle``: half of each symmetric product. ``gram``: pairs of steps
too.
"""

ChooseForm = Callable[[int, int], Implementation]
"""Says which form a matrix of so many rows and columns gets."""


# Measured on CPU, see docs/performance/newton_schulz.md. Below the first, many small products cost
# more than what they save; pairs save FLOPs above a ratio of 1, and time from about the second.
_SMALLEST_TRIANGLE_ROWS = 512
_SMALLEST_GRAM_RATIO = 1.5


def automatic_form(rows: int, columns: int, *, precise: bool, cpu: bool) -> Implementation:
    """Return the form that pays for a matrix of this shape.

    - ``plain`` where the iteration is not in fp32 or fp64 (``precise``): in bf16 a Gram matrix
      loses small singular values. Also on any device but the CPU, where nothing else was measured,
      and below 512 on the smaller side.
    - ``gram`` where the longer side is at least 1.5 times the smaller.
    - ``triangle`` otherwise.

    The batch and the number of threads have no say: a unit gets the same arithmetic in any layout.
    """
    smaller, longer = sorted((rows, columns))
    if not precise or not cpu or smaller < _SMALLEST_TRIANGLE_ROWS:
        return "plain"
    return "gram" if longer >= _SMALLEST_GRAM_RATIO * smaller else "triangle"


def always_plain(rows: int, columns: int) -> Implementation:
    """Return ``plain`` for every shape."""
    return "plain"


def newton_schulz_flops(rows: int, columns: int, steps: int, form: Implementation = "plain") -> int:
    """Return the FLOPs of ``steps`` quintic steps in one form.

    With m the smaller side and n the longer, a wide product takes 2 m^2 n and a small one 2 m^3;
    of a symmetric one, the triangle forms compute half. A plain step has two wide products and a
    small one. A step alone has one wide product and halves of a wide and a small one; a pair of
    steps has five small halves in place of one, and as many wide ones as a step alone.
    """
    m, n = sorted((rows, columns))
    if form == "plain":
        return steps * (4 * m * m * n + 2 * m * m * m)
    alone = 3 * m * m * n + m * m * m
    if form == "triangle" or steps < 2:
        return steps * alone
    pairs, odd = divmod(steps - 1, 2)  # the first step is alone in any case
    return (1 + odd) * alone + pairs * (3 * m * m * n + 5 * m * m * m)
