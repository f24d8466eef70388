"""Brings the parameter tables of all pipeline stages to the rank that shows them."""

from typing import Any

import torch

from megatron_muloco.comm.groups import Groups
from megatron_muloco.optim.parameter_table import ParameterTable
from megatron_muloco.optim.truth_report import TruthReport, truth_report

__all__ = ["gather_report"]


def gather_report(table: ParameterTable, groups: Groups) -> TruthReport:
    """Return the report of all stages of this replica; every replica has the same.

    Args:
        table: Of this rank's stage; the same on all ranks of it.
        groups: This rank's groups.

    Collectives: one object gather over the replica, where it has more than one stage.
    """
    if groups.topology.pipeline == 1:
        return truth_report([table])
    coords = groups.coords
    speaks = coords.tp == coords.cp == coords.dp == 0
    gathered: list[Any] = [None] * groups.topology.replica_size
    mine = (coords.pp, table) if speaks else None
    torch.distributed.all_gather_object(gathered, mine, group=groups.replica)
    stages = dict(entry for entry in gathered if entry is not None)
    return truth_report([stages[stage] for stage in sorted(stages)])
