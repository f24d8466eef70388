"""The truth about the inner optimizer: each parameter's route, reason, units, owners and cost.

Built once per pipeline stage from facts that every rank of the stage shares, so all ranks have the
same table without talking to each other. The optimizer acts on it and checks itself against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.assignment import Assignment, assign
from megatron_muloco.optim.forms import ChooseForm, always_plain
from megatron_muloco.optim.units import LayerShape, Route, Unit, route, split
from megatron_muloco.shards import ParamInfo, coverage

__all__ = ["InnerKind", "ParameterRow", "ParameterTable", "build_parameter_table"]

InnerKind = Literal["muon", "adamw"]


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """What happens to one parameter.

    Attributes:
        name: Model-wide name.
        route: Matrix (Muon) or vector (AdamW).
        reason: Why it takes that route.
        local_shape: Shape of a tensor-parallel rank's piece.
        shape: Shape over all tensor-parallel ranks.
        units: Its separately orthogonalised matrices; none for a vector parameter.
        owners: Group rank of each unit's owner.
        lr_mult: Factor on the learning rate.
        wd_mult: Factor on the weight decay.
        cost_share: Its part of the stage's Newton-Schulz FLOPs.
    """

    name: str
    route: Route
    reason: str
    local_shape: tuple[int, ...]
    shape: tuple[int, ...]
    units: tuple[Unit, ...]
    owners: tuple[int, ...]
    lr_mult: float
    wd_mult: float
    cost_share: float


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """All parameters of one pipeline stage.

    Attributes:
        rows: One a parameter, in the order of the model.
        assignment: Owners in the order of `units`, and the load of each rank of the stage group.
    """

    rows: tuple[ParameterRow, ...]
    assignment: Assignment

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, in the order of the rows."""
        return tuple(unit for row in self.rows for unit in row.units)

    @property
    def owners(self) -> tuple[int, ...]:
        """Group rank of each unit's owner, in the order of `units`."""
        return self.assignment.owners

    @property
    def routes(self) -> dict[str, Route]:
        """Route of each parameter."""
        return {row.name: row.route for row in self.rows}

    def owned_by(self, rank: int) -> tuple[str, ...]:
        """Return the names of the units that a group rank must orthogonalise in every step."""
        return tuple(
            unit.name for unit, owner in zip(self.units, self.owners, strict=True) if owner == rank
        )

    def render(self) -> str:
        """Return the table as text, one line a parameter, with totals."""
        cells = [_HEADER, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        matrices = [row for row in self.rows if row.route == "matrix"]
        loads = self.assignment.loads
        return (
            f"{len(matrices)} matrix parameters in {len(self.units)} units, "
            f"{len(self.rows) - len(matrices)} vector parameters; "
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
    choose_form: ChooseForm = always_plain,
    split_heads: bool = False,
    multipliers: Mapping[str, tuple[float, float]] | None = None,
) -> ParameterTable:
    """Return the table of one pipeline stage.

    Args:
        params: All trainable parameters of the stage, also those of which a rank holds no shard; in
            the same order on every rank.
        layer: Sizes of a decoder layer.
        kind: ``muon``, or ``adamw`` to route every parameter to AdamW.
        tensor_size: Number of tensor-parallel ranks.
        group_size: Number of ranks of the stage group (tp x cp x dp).
        num_ns_steps: Newton-Schulz steps, for the cost.
        choose_form: In which form a matrix is orthogonalised, for the cost.
        split_heads: Orthogonalise each head of q, k and v on its own.
        multipliers: Factors on (learning rate, weight decay) of the parameters that have them.

    Raises:
        RuntimeMismatch: A parameter that no rule knows, a name given twice, or multipliers of a
            parameter that does not exist.
    """
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
            choose_form=choose_form,
            split_heads=split_heads,
        )
        if to == "matrix"
        else ()
        for param, (to, _) in zip(params, routed, strict=True)
    ]
    assignment = assign([unit for units in split_up for unit in units], group_size)
    owners = iter(assignment.owners)
    total = sum(assignment.loads)
    rows = []
    for param, (to, reason), units in zip(params, routed, split_up, strict=True):
        lr_mult, wd_mult = (multipliers or {}).get(param.name, (1.0, 1.0))
        rows.append(
            ParameterRow(
                name=param.name,
                route=to,
                reason=reason,
                local_shape=param.local_shape,
                shape=_full_shape(param, tensor_size),
                units=units,
                owners=tuple(next(owners) for _ in units),
                lr_mult=lr_mult,
                wd_mult=wd_mult,
                cost_share=sum(unit.cost for unit in units) / total if total else 0.0,
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


_HEADER = ("parameter", "route", "units, form @owner", "shape", "lr", "wd", "cost", "why")


def _cells(row: ParameterRow) -> tuple[str, ...]:
    units = ", ".join(
        f"{unit.kind} {_blocks(unit)} {unit.form} @{owner}"
        for unit, owner in zip(row.units, row.owners, strict=True)
    )
    shape = " x ".join(str(size) for size in row.shape)
    return (
        row.name,
        row.route,
        units or "-",
        shape,
        f"{row.lr_mult:g}",
        f"{row.wd_mult:g}",
        f"{row.cost_share:.1%}",
        row.reason,
    )


def _blocks(unit: Unit) -> str:
    """Return the shape of what is orthogonalised, and of how many such blocks the unit is."""
    rows, columns = unit.block_shape
    return f"{unit.blocks} * " * (unit.blocks > 1) + f"[{rows} x {columns}]"
