"""Who orthogonalises which unit: longest processing time first, the same on every rank.

The heaviest unit that is left goes to the rank with the least work so far. The greedy schedule is
at most 4/3 - 1/(3 ranks) times the optimum (R. L. Graham, "Bounds on multiprocessing timing
anomalies", 1969). Ties go to the earlier unit and the lower rank, so ranks agree without talking.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.optim.units import Unit

__all__ = ["Assignment", "assign"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The owner of each unit.

    Attributes:
        owners: Group rank of each unit's owner, in the order of the units.
        loads: FLOPs of each rank of the stage group.
    """

    owners: tuple[int, ...]
    loads: tuple[int, ...]

    @property
    def balance(self) -> float:
        """Largest load over mean load: 1.0 is perfect; 1.0 without any work."""
        total = sum(self.loads)
        return max(self.loads) * len(self.loads) / total if total else 1.0


def assign(units: Sequence[Unit], ranks: int) -> Assignment:
    """Return the owner of each unit among ``ranks`` ranks of a stage group."""
    if ranks < 1:
        raise ValueError(f"units need at least one rank to own them, not {ranks}")
    queue = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(units)
    for index in sorted(range(len(units)), key=lambda i: (-units[i].cost, i)):
        load, rank = heapq.heappop(queue)
        owners[index] = rank
        heapq.heappush(queue, (load + units[index].cost, rank))
    return Assignment(tuple(owners), tuple(load for load, _ in sorted(queue, key=lambda q: q[1])))
