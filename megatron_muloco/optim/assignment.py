"""Who orthogonalises which unit: longest processing time first, then refined; alike on all ranks.

The heaviest unit that is left goes to the rank with the least work so far. The greedy schedule is
at most 4/3 - 1/(3 ranks) times the optimum (R. L. Graham, "Bounds on multiprocessing timing
anomalies", 1969). Then the busiest rank shares its units anew with another rank, as evenly as those
two can, for as long as that helps. Ties go to the earlier unit and the lower rank, so ranks agree
without talking.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.optim.units import Unit

__all__ = ["Assignment", "assign"]

# Two ranks that have more units than this share them evenly enough, and trying all sums is dear.
_MOST_SHARED_UNITS = 20


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
    costs = [unit.cost for unit in units]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(units)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(queue)
        owned[rank].append(index)
        heapq.heappush(queue, (load + costs[index], rank))
    loads = _refine(owned, costs)
    owners = {index: rank for rank, indices in enumerate(owned) for index in indices}
    return Assignment(tuple(owners[index] for index in range(len(units))), tuple(loads))


def _refine(owned: list[list[int]], costs: Sequence[int]) -> list[int]:
    """Lower the largest load by sharing two ranks' units anew; change ``owned``, return the loads.

    It ends because every change leaves fewer ranks with the largest load, or lowers it.
    """
    loads = [sum(costs[index] for index in indices) for indices in owned]
    improved = True
    while improved:
        improved = False
        busiest = max(range(len(owned)), key=lambda rank: (loads[rank], -rank))
        for other in sorted(range(len(owned)), key=lambda rank: (loads[rank], rank)):
            if other == busiest:
                continue
            both = sorted(owned[busiest] + owned[other])
            kept = _half(both, costs) if len(both) <= _MOST_SHARED_UNITS else ()
            rest = [index for index in both if index not in kept]
            halves = [sum(costs[index] for index in half) for half in (kept, rest)]
            if max(halves) < loads[busiest]:
                owned[busiest], owned[other] = list(kept), rest
                loads[busiest], loads[other] = halves
                improved = True
                break
    return loads


def _half(indices: Sequence[int], costs: Sequence[int]) -> tuple[int, ...]:
    """Return some of the units whose sum is as near to half of all as it can be."""
    subsets: dict[int, tuple[int, ...]] = {0: ()}
    for index in indices:
        for load, subset in list(subsets.items()):
            subsets.setdefault(load + costs[index], (*subset, index))
    total = sum(costs[index] for index in indices)
    best = min(subsets, key=lambda load: (max(load, total - load), load))
    return subsets[best]
