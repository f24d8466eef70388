"""Parameter table: which optimizer updates each parameter and why, its matrices, owners and cost.

`build_parameter_table` computes the table of a pipeline stage from inputs that are equal on all its
ranks, so all ranks get the same table without communication. `MuonAdamW` acts on the table and
checks every step against it. `assign` chooses the owners of the matrices, and `parameter_report`
prints the tables of all stages. The module does not import torch.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.matrices import (
    ChooseImplementation,
    LayerShape,
    MuonMatrix,
    Route,
    always_plain,
    route,
    split,
)
from megatron_muloco.params import ParamInfo, coverage

__all__ = [
    "Assignment",
    "InnerKind",
    "ParameterReport",
    "ParameterRow",
    "ParameterTable",
    "assign",
    "build_parameter_table",
    "parameter_report",
]

InnerKind = Literal["muon", "adamw"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The owner of each matrix.

    Attributes:
        owners: Group rank of each matrix's owner, in the order of the matrices.
        loads: Newton-Schulz FLOPs a step of each rank of the stage group.
    """

    owners: tuple[int, ...]
    loads: tuple[int, ...]

    @property
    def balance(self) -> float:
        """Largest load divided by the mean load: 1.0 is best; also 1.0 without any matrix."""
        total = sum(self.loads)
        return max(self.loads) * len(self.loads) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """What happens to one parameter.

    Attributes:
        name: Model-wide name.
        route: ``matrix`` (Muon) or ``vector`` (AdamW).
        reason: Why it has that route.
        local_shape: Shape of a tensor-parallel rank's piece.
        shape: Shape over all tensor-parallel ranks.
        matrices: Its separately orthogonalised matrices; none for a vector parameter.
        owners: Group rank of each matrix's owner.
        lr_mult: Factor on the learning rate.
        wd_mult: Factor on the weight decay.
        cost_share: Its fraction of the stage's Newton-Schulz FLOPs.
    """

    name: str
    route: Route
    reason: str
    local_shape: tuple[int, ...]
    shape: tuple[int, ...]
    matrices: tuple[MuonMatrix, ...]
    owners: tuple[int, ...]
    lr_mult: float
    wd_mult: float
    cost_share: float


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """All parameters of one pipeline stage.

    Attributes:
        rows: One for each parameter, in the order of the model.
        assignment: Owners in the order of `matrices`, and the load of each rank of the stage group.
    """

    rows: tuple[ParameterRow, ...]
    assignment: Assignment

    @property
    def matrices(self) -> tuple[MuonMatrix, ...]:
        """All matrices, in the order of the rows."""
        return tuple(matrix for row in self.rows for matrix in row.matrices)

    @property
    def owners(self) -> tuple[int, ...]:
        """Group rank of each matrix's owner, in the order of `matrices`."""
        return self.assignment.owners

    @property
    def routes(self) -> dict[str, Route]:
        """Route of each parameter."""
        return {row.name: row.route for row in self.rows}

    def owned_by(self, rank: int) -> tuple[str, ...]:
        """Return the names of the matrices that a group rank orthogonalises in every step."""
        return tuple(
            matrix.name
            for matrix, owner in zip(self.matrices, self.owners, strict=True)
            if owner == rank
        )

    def render(self) -> str:
        """Return the table as text, one line for each parameter, and a line of totals."""
        cells = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        by_muon = [row for row in self.rows if row.route == "matrix"]
        loads = self.assignment.loads
        return (
            f"{len(by_muon)} matrix parameters with {len(self.matrices)} matrices, "
            f"{len(self.rows) - len(by_muon)} vector parameters; "
            f"Newton-Schulz {sum(loads):.3e} FLOPs a step over {len(loads)} ranks, "
            f"balance (max/mean) {self.assignment.balance:.3f}"
        )


def build_parameter_table(
    params: Sequence[ParamInfo],
    layer: LayerShape,
    *,
    kind: InnerKind,
    tensor_size: int,
    group_size: int,
    num_ns_steps: int = 5,
    choose_impl: ChooseImplementation = always_plain,
    split_heads: bool = False,
    multipliers: Mapping[str, tuple[float, float]] | None = None,
) -> ParameterTable:
    """Return the table of one pipeline stage.

    Args:
        params: All trainable parameters of the stage in the same order on every rank, including
            those of which a rank holds no shard.
        layer: Sizes of a decoder layer.
        kind: ``muon``, or ``adamw`` to route every parameter to AdamW.
        tensor_size: Number of tensor-parallel ranks.
        group_size: Number of ranks of the stage group (tp x cp x dp).
        num_ns_steps: Newton-Schulz steps, for the cost.
        choose_impl: Chooses the implementation of a matrix, for the cost.
        split_heads: Orthogonalise each head of q, k and v separately.
        multipliers: Factors on (learning rate, weight decay) of the parameters that have them.

    Raises:
        RuntimeMismatch: A parameter without a rule, a name given twice, or multipliers of a
            parameter that does not exist.
    """
    # Routes, masters and checkpoints are keyed by name; a name given twice would hide a parameter.
    names = [param.name for param in params]
    _, repeated = coverage(names, names)
    unknown = sorted(set(multipliers or {}) - set(names))
    if repeated or unknown:
        raise RuntimeMismatch(
            f"parameter names must be unique, repeated: {repeated}; multipliers name parameters "
            f"that this stage does not have: {unknown}"
        )
    routed = [_route(param, kind) for param in params]
    split_up = [
        split(
            param,
            layer,
            tensor_size=tensor_size,
            steps=num_ns_steps,
            choose_impl=choose_impl,
            split_heads=split_heads,
        )
        if to == "matrix"
        else ()
        for param, (to, _) in zip(params, routed, strict=True)
    ]
    # Over all matrices of the stage, also those of which this rank has no shard: every rank must
    # compute the same owners.
    assignment = assign([matrix for matrices in split_up for matrix in matrices], group_size)
    owners = iter(assignment.owners)
    total = sum(assignment.loads)
    rows = []
    for param, (to, reason), matrices in zip(params, routed, split_up, strict=True):
        lr_mult, wd_mult = (multipliers or {}).get(param.name, (1.0, 1.0))
        rows.append(
            ParameterRow(
                name=param.name,
                route=to,
                reason=reason,
                local_shape=param.local_shape,
                shape=_full_shape(param, tensor_size),
                matrices=matrices,
                owners=tuple(next(owners) for _ in matrices),
                lr_mult=lr_mult,
                wd_mult=wd_mult,
                cost_share=sum(matrix.cost for matrix in matrices) / total if total else 0.0,
            )
        )
    return ParameterTable(tuple(rows), assignment)


def _route(param: ParamInfo, kind: InnerKind) -> tuple[Route, str]:
    return ("vector", "inner.kind is adamw") if kind == "adamw" else route(param)


def _full_shape(param: ParamInfo, tensor_size: int) -> tuple[int, ...]:
    return tuple(
        size * tensor_size if dim == param.partition_dim else size
        for dim, size in enumerate(param.local_shape)
    )


_HEADER = ("parameter", "route", "matrices, ns_impl @owner", "shape", "lr", "wd", "cost", "why")


def _cells(row: ParameterRow) -> tuple[str, ...]:
    matrices = ", ".join(
        f"{matrix.kind} {_blocks(matrix)} {matrix.ns_impl} @{owner}"
        for matrix, owner in zip(row.matrices, row.owners, strict=True)
    )
    shape = " x ".join(str(size) for size in row.shape)
    return (
        row.name,
        row.route,
        matrices or "-",
        shape,
        f"{row.lr_mult:g}",
        f"{row.wd_mult:g}",
        f"{row.cost_share:.1%}",
        row.reason,
    )


def _blocks(matrix: MuonMatrix) -> str:
    """Return the shape of a block, and the number of blocks where there are several."""
    rows, columns = matrix.block_shape
    return f"{matrix.blocks} * " * (matrix.blocks > 1) + f"[{rows} x {columns}]"


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """What the inner optimizer does to every parameter of a replica.

    Attributes:
        summary: One line for the console.
        table: The tables of all stages as text, for a file.
    """

    summary: str
    table: str


def parameter_report(stages: Sequence[ParameterTable]) -> ParameterReport:
    """Return the report of all pipeline stages, given in their order."""
    rows = [row for table in stages for row in table.rows]
    by_muon = [row for row in rows if row.route == "matrix"]
    summary = f"{len(rows)} by AdamW"
    if by_muon:
        flops = sum(sum(table.assignment.loads) for table in stages)
        balances = [table.assignment.balance for table in stages]
        ranks = sum(len(table.assignment.loads) for table in stages)
        summary = (
            f"{len(by_muon)} by Muon with {sum(len(row.matrices) for row in by_muon)} matrices, "
            f"{len(rows) - len(by_muon)} by AdamW; Newton-Schulz {flops:.3e} FLOPs a step over "
            f"{ranks} rank{'s' * (ranks > 1)}, balance (max/mean) {max(balances):.3f}"
        )
    parts = [
        f"pipeline stage {stage} of {len(stages)}\n{table.render()}\n"
        for stage, table in enumerate(stages)
    ]
    return ParameterReport(summary, "\n".join([*parts, f"in all: {summary}\n"]))


# ---- owners --------------------------------------------------------------------------------------

# Trying all subsets of more matrices than this takes too long, and the greedy schedule of so many
# is even enough.
_MOST_SHARED_MATRICES = 20


def assign(matrices: Sequence[MuonMatrix], ranks: int) -> Assignment:
    """Choose the owner of each matrix among ``ranks`` ranks of a stage group.

    Longest processing time first: the costliest remaining matrix goes to the rank with the least
    work so far, which is at most 4/3 - 1/(3 ranks) times the optimum. Then the busiest rank divides
    its matrices and another rank's between the two as evenly as possible, as long as that lowers
    its load. Ties go to the earlier matrix and the lower rank, so all ranks get the same result
    without communication.

    Source: R. L. Graham, "Bounds on multiprocessing timing anomalies" (1969), for the bound.
    """
    if ranks < 1:
        raise ValueError(f"matrices need at least one rank to own them, not {ranks}")
    # Pairs compare by load, then by rank. Costs are integers, so loads are exact and equal ones are
    # equal on every rank; sums of floats would make ties depend on the order of addition.
    queue = [(0, rank) for rank in range(ranks)]
    costs = [matrix.cost for matrix in matrices]
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(matrices)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(queue)
        owned[rank].append(index)
        heapq.heappush(queue, (load + costs[index], rank))
    loads = _refine(owned, costs)
    owners = {index: rank for rank, indices in enumerate(owned) for index in indices}
    return Assignment(tuple(owners[index] for index in range(len(matrices))), tuple(loads))


def _refine(owned: list[list[int]], costs: Sequence[int]) -> list[int]:
    """Lower the largest load by dividing two ranks' matrices again; change ``owned`` in place.

    It terminates because every change lowers the largest load or the number of ranks that have it.

    Returns:
        The load of each rank.
    """
    loads = [sum(costs[index] for index in indices) for indices in owned]
    improved = True
    while improved:
        improved = False
        # Of several busiest ranks the lowest, hence -rank.
        busiest = max(range(len(owned)), key=lambda rank: (loads[rank], -rank))
        for other in sorted(range(len(owned)), key=lambda rank: (loads[rank], rank)):
            if other == busiest:
                continue
            # Sorted, because `_half` prefers earlier matrices and moves have mixed up the lists.
            both = sorted(owned[busiest] + owned[other])
            kept = _half(both, costs) if len(both) <= _MOST_SHARED_MATRICES else ()
            rest = [index for index in both if index not in kept]
            halves = [sum(costs[index] for index in half) for half in (kept, rest)]
            # Strictly less: with equal loads two ranks could exchange matrices for ever.
            if max(halves) < loads[busiest]:
                owned[busiest], owned[other] = list(kept), rest
                loads[busiest], loads[other] = halves
                improved = True
                break
    return loads


def _half(indices: Sequence[int], costs: Sequence[int]) -> tuple[int, ...]:
    """Return the subset whose cost is as close to half of the total as possible."""
    # One subset for each sum that can be reached, the first one found, so all ranks find the same.
    # The matrices of a decoder have few different costs, hence far fewer sums than subsets.
    subsets: dict[int, tuple[int, ...]] = {0: ()}
    for index in indices:
        # Over a copy, so that an index enters each subset once.
        for load, subset in list(subsets.items()):
            subsets.setdefault(load + costs[index], (*subset, index))
    total = sum(costs[index] for index in indices)
    best = min(subsets, key=lambda load: (max(load, total - load), load))
    return subsets[best]
