"""The parameter tables of all pipeline stages as text: one line for the console, all for a file."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.optim.parameter_table import ParameterTable

__all__ = ["TruthReport", "truth_report"]


@dataclass(frozen=True, slots=True)
class TruthReport:
    """What the inner optimizer does to every parameter of a replica.

    Attributes:
        summary: In one line.
        table: Every parameter of every stage.
    """

    summary: str
    table: str


def truth_report(stages: Sequence[ParameterTable]) -> TruthReport:
    """Return the report of the stages, in their order."""
    rows = [row for table in stages for row in table.rows]
    matrices = [row for row in rows if row.route == "matrix"]
    summary = f"{len(rows)} by AdamW"
    if matrices:
        flops = sum(sum(table.assignment.loads) for table in stages)
        balances = [table.assignment.balance for table in stages]
        ranks = sum(len(table.assignment.loads) for table in stages)
        summary = (
            f"{len(matrices)} by Muon in {sum(len(row.units) for row in matrices)} units, "
            f"{len(rows) - len(matrices)} by AdamW; Newton-Schulz {flops:.3e} FLOPs a step over "
            f"{ranks} rank{'s' * (ranks > 1)}, balance (max/mean) {max(balances):.3f}"
        )
    parts = [
        f"pipeline stage {stage} of {len(stages)}\n{table.render()}\n"
        for stage, table in enumerate(stages)
    ]
    return TruthReport(summary, "\n".join([*parts, f"in all: {summary}\n"]))
