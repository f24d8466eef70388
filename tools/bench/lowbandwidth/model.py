"""Bytes and parameters of a method, from the program's own planner."""

from collections.abc import Sequence

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.planning import traffic_plan

from .compose import Costs
from .methods import CONFIG, RANKS, SYNC_INTERVAL

__all__ = ["costs", "parameters"]


def costs(changes: Sequence[str]) -> Costs:
    """Return the bytes that a rank sends in a step."""
    config = _config(changes)
    plan = traffic_plan(config, topology_of(config, RANKS))
    if isinstance(config.outer, NoOuter):
        return Costs(plan.inner_step, 1)
    outer = plan.outer_per_rank / SYNC_INTERVAL
    return Costs(plan.inner_step + outer, SYNC_INTERVAL)


def parameters(changes: Sequence[str]) -> int:
    """Return how many parameters the model has."""
    from megatron_muloco.config.derived import derive

    config = _config(changes)
    return derive(config, topology_of(config, RANKS)).parameters.total


def _config(changes: Sequence[str]) -> RunConfig:
    return load_config(CONFIG, tuple(changes))
