#!/usr/bin/env python
"""Balance of the Newton-Schulz work over the ranks of a stage, against the exact optimum.

Pure arithmetic: the matrices of one pipeline stage of a config, assigned as in training, for
several layouts. With at most two different costs the optimum is exact; with more, a lower bound.

    python tools/bench/muon_balance.py [--write docs/performance/muon_balance.md]
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.planning.layout import stage_matrices
from megatron_muloco.topology import Topology

LAYOUTS = ((4, 16, 1, 1.06), (4, 8, 2, 1.06), (4, 16, 2, 1.17), (4, 8, 1, None), (1, 8, 1, None))
"""Tensor, data and pipeline sizes, and the largest balance allowed (none where not set)."""

LARGEST_GAP = 1.05
"""Largest load over the optimum's that is allowed."""


@dataclass(frozen=True)
class Row:
    """One layout's result.

    Attributes:
        layout: Layout in words.
        matrices: Muon matrices of a stage.
        ranks: Ranks of a stage.
        balance: Largest over mean load as assigned.
        optimum: Largest over mean load of the best assignment, or a lower bound of it.
        exact: Whether the optimum is exact.
        allowed: Largest balance allowed.
    """

    layout: str
    matrices: int
    ranks: int
    balance: float
    optimum: float
    exact: bool
    allowed: float | None

    @property
    def passed(self) -> bool:
        """Whether the assignment is as good as asked for."""
        near = self.balance <= LARGEST_GAP * self.optimum
        return near and (self.allowed is None or self.balance <= self.allowed)


def main() -> int:
    """Print the table, and write the result page if asked; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/15b_k16.yaml", help="model and optimizer")
    parser.add_argument("--write", type=Path, help="result page to write")
    options = parser.parse_args()
    config = load_config(options.config)
    rows = [measure(config, *layout) for layout in LAYOUTS]
    page = report(rows, options.config)
    print(page)
    if options.write:
        options.write.write_text(page + "\n", encoding="utf-8")
    return 0 if all(row.passed for row in rows) else 1


def measure(config: RunConfig, tensor: int, data: int, pipeline: int, allowed: float | None) -> Row:
    """Return how one layout is balanced and how it could be."""
    topology = Topology(1, tensor, pipeline, data)
    matrices = stage_matrices(config, topology, stage=0, accelerator=True)
    assignment = assign(matrices, tensor * data)
    best, exact = optimum([matrix.cost for matrix in matrices], tensor * data)
    return Row(
        layout=f"tp {tensor} · dp {data} · pp {pipeline}",
        matrices=len(matrices),
        ranks=tensor * data,
        balance=assignment.balance,
        optimum=best * tensor * data / sum(assignment.loads),
        exact=exact,
        allowed=allowed,
    )


def optimum(costs: Sequence[int], ranks: int) -> tuple[int, bool]:
    """Return the smallest possible largest load and whether it is exact, else a lower bound."""
    kinds = sorted(Counter(costs).items(), reverse=True)
    bound = max(-(-sum(costs) // ranks), max(costs))
    if len(kinds) > 2:
        return bound, False
    (large, many), (small, few) = kinds[0], kinds[1] if len(kinds) == 2 else (1, 0)
    sums = {a * large + b * small for a in range(many + 1) for b in range(few + 1)}
    # A larger limit never makes a feasible case infeasible, so the limits can be bisected.
    limits = sorted(load for load in sums if load >= bound)
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(limits[middle], large, many, small, few, ranks):
            high = middle
        else:
            low = middle + 1
    return limits[low], True


def fits(limit: int, large: int, many: int, small: int, few: int, ranks: int) -> bool:
    """Return whether matrices of two costs fit on the ranks with no load over ``limit``.

    ``most[a]`` is how many small matrices the ranks so far can take beside ``a`` large ones.
    """
    each = [(limit - a * large) // small for a in range(min(many, limit // large) + 1)]
    most = [0] + [-1] * many
    for _ in range(ranks):
        most = [
            max(
                (
                    most[a - own] + each[own]
                    for own in range(min(a + 1, len(each)))
                    if most[a - own] >= 0
                ),
                default=-1,
            )
            for a in range(many + 1)
        ]
    return most[many] >= few


def report(rows: Sequence[Row], config: str) -> str:
    """Return the result page."""
    lines = [
        "# Balance of Newton-Schulz over the ranks of a stage",
        "",
        f"Matrices of one pipeline stage of `{config}`, assigned by counted FLOPs, heaviest first,",
        "then refined by pairs of ranks (`optim/parameter_table.py`), against the optimum.",
        "Matrices are not divided, so ranks with few of them cannot reach the mean. The optimum",
        "is exact where matrices have at most two different costs; otherwise it is the larger of",
        "mean load and largest matrix, which no assignment beats. Written by",
        "`python tools/bench/muon_balance.py`.",
        "",
        "| layout | matrices | ranks | largest/mean | optimum | over the optimum | allowed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        allowed = "-" if row.allowed is None else f"{row.allowed:.2f}"
        lines.append(
            f"| {row.layout} | {row.matrices} | {row.ranks} | {row.balance:.4f} | "
            f"{row.optimum:.4f}{'' if row.exact else ' (bound)'} | "
            f"{row.balance / row.optimum - 1:.1%} | {allowed} |"
        )
    verdict = "All bars are met" if all(row.passed for row in rows) else "A BAR IS MISSED"
    gap = f"at most {LARGEST_GAP - 1:.0%} over the optimum"
    lines += ["", f"{verdict}: the values allowed, and {gap}."]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
