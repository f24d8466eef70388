"""What must hold for an outer step to happen, and for its parts to fit each other.

Each rule is a function; `checks` lists and runs them.
"""

from collections.abc import Iterator
from itertools import pairwise

from megatron_muloco.config.compression import (
    CompressionConfig,
    E3M0Compression,
    NoCompression,
    TopKCompression,
)
from megatron_muloco.config.derived import spacing_of_launches, train_iterations
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.config.problems import Problem
from megatron_muloco.config.round_schedules import Interval, Steps, interval_at, interval_values
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.topology import Topology

__all__ = [
    "apply_rule_is_one",
    "block_size_has_blocks",
    "data_parallelism_has_one_replica",
    "exceptions_fit_the_code",
    "fragments_have_layers",
    "norm_band_is_a_band",
    "overlap_is_shorter_than_the_spacing",
    "rounds_of_schedules_ascend",
    "run_has_a_round",
]


def data_parallelism_has_one_replica(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Without an outer step replicas would never meet."""
    replicas = config.parallel.num_replicas
    if isinstance(config.outer, NoOuter) and replicas > 1:
        yield Problem(
            "parallel.num_replicas",
            f"{replicas}, but outer.kind is none, so the replicas would never exchange anything.\n"
            "Use num_replicas 1 (all ranks become data-parallel), or outer.kind nesterov or "
            "average.",
        )


def fragments_have_layers(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """A fragment holds a layer and has a step of the round to itself."""
    if isinstance(config.outer, NoOuter):
        return
    count, interval = config.outer.fragments.count, config.outer.sync_interval
    if count > config.model.num_layers:
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than the {config.model.num_layers} layers of the model, and a "
            "fragment holds at least one whole layer.\nUse fewer fragments.",
        )
    if count > min(interval_values(interval)):
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than {_shortest(interval)}, so several fragments would start in "
            "one step.\nUse fewer fragments.",
        )


def _shortest(interval: Interval) -> str:
    """Return the words for the interval, or for the shortest one."""
    values = interval_values(interval)
    return f"{'the shortest ' if len(values) > 1 else ''}sync_interval {min(values)}"


def overlap_is_shorter_than_the_spacing(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """No more fragments are under way than allowed."""
    if isinstance(config.outer, NoOuter):
        return
    outer = config.outer
    spacing = max(1, spacing_of_launches(outer))
    shortest = _shortest(outer.sync_interval)
    if outer.overlap_steps >= min(interval_values(outer.sync_interval)):
        yield Problem(
            "outer.overlap_steps",
            f"{outer.overlap_steps} is not shorter than {shortest}, so a "
            "fragment would start again before its result was used.\nUse fewer overlap_steps or a "
            "longer sync_interval.",
        )
    elif outer.overlap_steps >= spacing * outer.max_in_flight:
        steps = (
            f"the {spacing} steps between two launches"
            if outer.max_in_flight == 1
            else f"{outer.max_in_flight} times the {spacing} steps between two launches"
        )
        yield Problem(
            "outer.overlap_steps",
            f"{outer.overlap_steps} is not shorter than {steps}\n"
            f"({shortest} / fragments.count {outer.fragments.count}), so "
            f"{outer.max_in_flight + 1} fragments would be in flight at once.\nUse overlap_steps "
            f"of at most {spacing * outer.max_in_flight - 1}, fewer fragments, a longer "
            f"sync_interval, or max_in_flight above {outer.max_in_flight}.",
        )


def apply_rule_is_one(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Adding the progress since the launch needs such progress, and mixes nothing."""
    if isinstance(config.outer, NoOuter) or config.outer.apply != "additive":
        return
    if config.outer.overlap_steps == 0:
        yield Problem(
            "outer.apply",
            "additive, but overlap_steps is 0: no progress is made between launch and apply, so "
            "there is nothing to add.\nUse mix, or overlap_steps above 0.",
        )
    if config.outer.mixing_weight is not None:
        yield Problem(
            "outer.mixing_weight",
            f"{config.outer.mixing_weight:g} has no meaning with apply additive, which keeps all "
            "progress since the launch.\nRemove it or use apply: mix.",
        )


def exceptions_fit_the_code(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Other bits for some parameters need a code that has bits."""
    code = _code(config)
    if not isinstance(code, E3M0Compression | TopKCompression):
        return
    for key, bits in code.exceptions:
        if bits not in (None, "none"):
            yield Problem(
                f"outer.compression.exceptions.{key}",
                f"{bits}, but kind {code.kind} has one code for all parameters.\nUse none to send "
                "these in fp32, or kind linear or statistical.",
            )


def block_size_has_blocks(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Blocks have a size only where there are blocks."""
    code = _code(config)
    if isinstance(code, NoCompression | TopKCompression) or code.granularity == "block":
        return
    if code.block_size is not None:
        yield Problem(
            "outer.compression.block_size",
            f"{code.block_size} has no effect with granularity {code.granularity}.\nRemove it or "
            "set outer.compression.granularity: block.",
        )


def _code(config: RunConfig) -> CompressionConfig:
    return NoCompression() if isinstance(config.outer, NoOuter) else config.outer.compression


def norm_band_is_a_band(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """The guard's ratio leaves room on both sides of the median."""
    if isinstance(config.outer, NoOuter):
        return
    ratio = config.outer.guard.max_norm_ratio
    if 0 < ratio <= 1:
        yield Problem(
            "outer.guard.max_norm_ratio",
            f"{ratio:g} leaves no room around the median norm, so every replica would be left "
            "out.\nUse 0 for no band, or a ratio well above 1, for instance 10.",
        )


def run_has_a_round(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """The outer step happens at least once."""
    iterations = train_iterations(config)
    if isinstance(config.outer, NoOuter) or iterations is None:
        return
    first = interval_at(config.outer.sync_interval, 1)
    if first > iterations:
        yield Problem(
            "outer.sync_interval",
            f"{first} is longer than the run of {iterations} steps, so no "
            "outer step would ever happen.\nUse a shorter interval or a longer run.",
        )


def rounds_of_schedules_ascend(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """A list of values says from which round on each one holds, and leaves no round out."""
    if isinstance(config.outer, NoOuter):
        return
    for key, schedule in _schedules(config.outer):
        if not isinstance(schedule, Steps):
            continue
        rounds = [first for first, _ in schedule.values]
        if rounds[0] != 1:
            yield Problem(
                f"{key}.values.0",
                f"begins with round {rounds[0]}, and nothing says what holds before it.\n"
                "Let the first pair be [1, value]; rounds are counted from 1.",
            )
        for place, (before, after) in enumerate(pairwise(rounds), 1):
            if after <= before:
                yield Problem(
                    f"{key}.values.{place}",
                    f"round {after} follows round {before}, but each pair holds until the next "
                    "one.\nWrite the pairs in the order of their rounds, each round once.",
                )


def _schedules(outer: NesterovOuter | AverageOuter) -> Iterator[tuple[str, object]]:
    yield "outer.sync_interval", outer.sync_interval
    yield "outer.lr", outer.lr
    yield "outer.momentum", outer.momentum
