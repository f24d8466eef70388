"""Scaling laws: forms, fits, intervals, the optima of sweeps, and critical batches.

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

from megatron_muloco.scaling.critical import (
    Largest,
    LossCurve,
    StepsLaw,
    critical_batch,
    first_reach,
    fit_steps,
    largest_below,
    loss_curve,
)
from megatron_muloco.scaling.fitting import Fit, fit
from megatron_muloco.scaling.forms import FORMS, Form, Parameter, make_form
from megatron_muloco.scaling.intervals import (
    Estimate,
    LeftOut,
    bootstrap,
    estimates,
    leave_out,
    prediction_interval,
)
from megatron_muloco.scaling.observations import Observations
from megatron_muloco.scaling.optima import (
    Cell,
    Optimum,
    Regret,
    cells_of,
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
    "Largest",
    "LeftOut",
    "LossCurve",
    "Observations",
    "Optimum",
    "Parameter",
    "Regret",
    "StepsLaw",
    "Table",
    "bootstrap",
    "cells_of",
    "critical_batch",
    "estimates",
    "first_reach",
    "fit",
    "fit_steps",
    "largest_below",
    "leave_out",
    "loss_curve",
    "make_form",
    "optimum_laws",
    "points_of",
    "prediction_interval",
    "read_runs",
    "read_table",
    "regrets",
]
