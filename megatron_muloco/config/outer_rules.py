"""Rules about the outer step: fragments, overlap, compression, schedules. See `config.rules`."""

from collections.abc import Iterator
from itertools import pairwise

from megatron_muloco.config.derived import (
    complete_rounds,
    spacing_of_launches,
    train_iterations,
)
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.outer import (
    AverageOuter,
    CompressionConfig,
    GroupedCompression,
    Interval,
    NesterovOuter,
    NoCompression,
    NoOuter,
    StatisticalCompression,
    Steps,
    TopKCompression,
    interval_at,
    interval_values,
)
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.topology import Topology

__all__ = [
    "additive_apply_overlaps",
    "block_size_has_blocks",
    "codec_is_deterministic",
    "data_parallelism_has_one_replica",
    "exceptions_fit_the_compression",
    "fragments_have_layers",
    "norm_ratio_is_above_one",
    "overlap_is_shorter_than_the_spacing",
    "rounds_of_schedules_ascend",
    "run_has_a_round",
    "usable_replicas_exist",
]


def data_parallelism_has_one_replica(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require one replica where there is no outer step."""
    replicas = config.parallel.num_replicas
    if isinstance(config.outer, NoOuter) and replicas > 1:
        yield Problem(
            "parallel.num_replicas",
            f"{replicas}, but outer.kind is none, so the replicas would never be synchronised.\n"
            "Use num_replicas 1 (all ranks become data-parallel), or outer.kind nesterov or "
            "average.",
        )


def fragments_have_layers(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require at least one layer and one step of the round for each fragment."""
    if isinstance(config.outer, NoOuter):
        return
    count, interval = config.outer.fragments.count, config.outer.sync_interval
    if count > config.model.num_layers:
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than the {config.model.num_layers} layers of the model, but a "
            "fragment holds at least one whole layer.\nUse fewer fragments.",
        )
    if count > min(interval_values(interval)):
        yield Problem(
            "outer.fragments.count",
            f"{count} is more than {_shortest(interval)}, so several fragments would be launched "
            "in one step.\nUse fewer fragments.",
        )


def _shortest(interval: Interval) -> str:
    """Return ``sync_interval H``, or ``the shortest sync_interval H`` of a schedule."""
    values = interval_values(interval)
    return f"{'the shortest ' if len(values) > 1 else ''}sync_interval {min(values)}"


def overlap_is_shorter_than_the_spacing(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Require that at most ``max_in_flight`` fragments are in flight at once."""
    if isinstance(config.outer, NoOuter):
        return
    outer = config.outer
    spacing = max(1, spacing_of_launches(outer))
    shortest = _shortest(outer.sync_interval)
    if outer.overlap_steps >= min(interval_values(outer.sync_interval)):
        yield Problem(
            "outer.overlap_steps",
            f"{outer.overlap_steps} is not shorter than {shortest}, so a fragment would be "
            "launched again before its result is applied.\n"
            "Use fewer overlap_steps or a longer sync_interval.",
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


def additive_apply_overlaps(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require overlap for ``apply: additive``, and no mixing weight beside it."""
    if isinstance(config.outer, NoOuter) or config.outer.apply != "additive":
        return
    if config.outer.overlap_steps == 0:
        yield Problem(
            "outer.apply",
            "additive, but overlap_steps is 0, so there is no progress between launch and apply to "
            "add.\nUse mix, or overlap_steps above 0.",
        )
    if config.outer.mixing_weight is not None:
        yield Problem(
            "outer.mixing_weight",
            f"{config.outer.mixing_weight:g} has no effect with apply additive, which keeps all "
            "progress since the launch.\nRemove it or use apply: mix.",
        )


def exceptions_fit_the_compression(
    config: RunConfig, topology: Topology | None
) -> Iterator[Problem]:
    """Allow a number of bits as an exception only for kinds that have ``bits``."""
    compression = _compression(config)
    if isinstance(compression, NoCompression) or compression.has_bits:
        return
    for key, bits in compression.exceptions:
        if bits not in (None, "none"):
            yield Problem(
                f"outer.compression.exceptions.{key}",
                f"{bits}, but kind {compression.kind} has no choice of bits.\n"
                "Use none to send these parameters in fp32, or kind linear or statistical.",
            )


def block_size_has_blocks(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Allow ``block_size`` of quantizers only with granularity block."""
    compression = _compression(config)
    if not isinstance(compression, GroupedCompression) or compression.granularity == "block":
        return
    if compression.block_size is not None:
        yield Problem(
            "outer.compression.block_size",
            f"{compression.block_size} has no effect with granularity {compression.granularity}.\n"
            "Remove it or set outer.compression.granularity: block.",
        )


def codec_is_deterministic(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Refuse ``deterministic`` with codecs whose sums torch counts as nondeterministic on GPUs.

    Those of kind statistical are exact, so their order has no effect; but torch raises an error for
    the operations (weighted ``bincount``, ``cumsum`` of floats) whatever the values are.
    """
    compression = _compression(config)
    if not config.training.deterministic:
        return
    if isinstance(compression, StatisticalCompression):
        place, value = "kind", "statistical"
    elif isinstance(compression, TopKCompression) and compression.value_bits:
        place, value = "value_bits", str(compression.value_bits)
    else:
        return
    yield Problem(
        f"outer.compression.{place}",
        f"{value}, but training.deterministic is true; torch has no deterministic form of "
        "operations\nthat this codec uses on a GPU. Use kind linear, e3m0 or topk without "
        "value_bits, or set\ntraining.deterministic: false.",
    )


def _compression(config: RunConfig) -> CompressionConfig:
    return NoCompression() if isinstance(config.outer, NoOuter) else config.outer.compression


def norm_ratio_is_above_one(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require a ratio of the guard above 1, or 0 for off."""
    if isinstance(config.outer, NoOuter):
        return
    ratio = config.outer.guard.max_norm_ratio
    if 0 < ratio <= 1:
        yield Problem(
            "outer.guard.max_norm_ratio",
            f"{ratio:g} excludes norms on both sides of the median, so every replica would be "
            "excluded.\nUse 0 to turn it off, or a ratio well above 1, for instance 10.",
        )


def usable_replicas_exist(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that a round with all replicas has enough of them."""
    if isinstance(config.outer, NoOuter):
        return
    needed, replicas = config.outer.guard.min_usable_replicas, config.parallel.num_replicas
    if needed > replicas:
        yield Problem(
            "outer.guard.min_usable_replicas",
            f"{needed} is more than parallel.num_replicas {replicas}, so every round would be "
            f"empty.\nUse at most {replicas}.",
        )


_MOST_ROUNDS = 5_000_000  # the schedule keeps the first step of each in memory


def run_has_a_round(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require at least one outer step in the run, and not more than can be planned."""
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
    elif (rounds := complete_rounds(config.outer.sync_interval, iterations)[0]) > _MOST_ROUNDS:
        yield Problem(
            "outer.sync_interval",
            f"the run of {iterations} steps has {rounds} rounds, and at most {_MOST_ROUNDS} are "
            "possible.\nUse a longer interval or a shorter run.",
        )


def rounds_of_schedules_ascend(config: RunConfig, topology: Topology | None) -> Iterator[Problem]:
    """Require that the rounds of a schedule start at 1 and ascend."""
    if isinstance(config.outer, NoOuter):
        return
    for key, schedule in _schedules(config.outer):
        if not isinstance(schedule, Steps):
            continue
        rounds = [first for first, _ in schedule.values]
        if rounds[0] != 1:
            yield Problem(
                f"{key}.values.0",
                f"the first round is {rounds[0]}, so there is no value for the rounds before it.\n"
                "Start with the pair [1, value]; rounds are counted from 1.",
            )
        for place, (before, after) in enumerate(pairwise(rounds), 1):
            if after <= before:
                yield Problem(
                    f"{key}.values.{place}",
                    f"round {after} comes after round {before}, but each pair holds until the next "
                    "one.\nList the pairs in ascending order of rounds, each round once.",
                )


def _schedules(outer: NesterovOuter | AverageOuter) -> Iterator[tuple[str, object]]:
    yield "outer.sync_interval", outer.sync_interval
    yield "outer.lr", outer.lr
    yield "outer.momentum", outer.momentum
