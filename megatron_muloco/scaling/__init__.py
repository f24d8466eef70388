"""Scaling laws: forms, fits, intervals, and the optima of sweeps.

Torch-free. Needs scipy, which the extra ``analysis`` installs.
"""

from megatron_muloco.errors import RuntimeMismatch

try:
    import scipy  # noqa: F401
except ModuleNotFoundError as error:
    raise RuntimeMismatch(
        "megatron_muloco.scaling needs scipy, which is not installed: pip install "
        "'megatron_muloco[analysis]'."
    ) from error

from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.forms import FORMS, Form, Parameter, make_form
from megatron_muloco.scaling.intervals import Estimate, LeftOut, bootstrap, estimates, leave_out
from megatron_muloco.scaling.observations import Observations
from megatron_muloco.scaling.optima import (
    Cell,
    Optimum,
    Regret,
    cells_of,
    critical_batch,
    optimum_laws,
    regrets,
)
from megatron_muloco.scaling.table import Columns, Table, points_of, read_runs, read_table

__all__ = [
    "FORMS",
    "Cell",
    "Columns",
    "Estimate",
    "Fit",
    "Form",
    "LeftOut",
    "Observations",
    "Optimum",
    "Parameter",
    "Regret",
    "Table",
    "bootstrap",
    "cells_of",
    "critical_batch",
    "estimates",
    "fit",
    "leave_out",
    "make_form",
    "optimum_laws",
    "points_of",
    "read_runs",
    "read_table",
    "regrets",
]
