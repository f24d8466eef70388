"""What the program's own planner says of a method: its bytes and its calendar."""

from collections.abc import Sequence

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import topology_of
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.planning import traffic_plan

from .compose import Costs, disturbed_steps
from .methods import CONFIG, RANKS, SYNC_INTERVAL
from .readings import Window

__all__ = ["costs", "disturbed", "parameters"]


def costs(changes: Sequence[str]) -> Costs:
    """Return the bytes that a rank sends in a step."""
    config = _config(changes)
    plan = traffic_plan(config, topology_of(config, RANKS))
    if isinstance(config.outer, NoOuter):
        return Costs(plan.inner_step, 1)
    outer = plan.outer_per_rank / SYNC_INTERVAL
    return Costs(plan.inner_step + outer, SYNC_INTERVAL)


def disturbed(changes: Sequence[str], window: Window) -> set[int]:
    """Return the inner steps of the window whose time holds something of an outer step."""
    outer = _config(changes).outer
    if isinstance(outer, NoOuter):
        return set()
    schedule = SyncSchedule(
        sync_interval=SYNC_INTERVAL,
        train_iters=window.last,
        fragment_count=outer.fragments.count,
        overlap_steps=outer.overlap_steps,
    )
    before = range(max(window.first, 1), window.last)  # the steps before those of the window
    events = {step for step in before if schedule.events(step)}
    in_flight = {step for step in before if schedule.in_flight(step)}
    return disturbed_steps(events, in_flight, range(window.first + 1, window.last + 1))


def parameters(changes: Sequence[str]) -> int:
    """Return how many parameters the model has."""
    from megatron_muloco.config.derived import derive

    config = _config(changes)
    return derive(config, topology_of(config, RANKS)).parameters.total


def _config(changes: Sequence[str]) -> RunConfig:
    return load_config(CONFIG, tuple(changes))
