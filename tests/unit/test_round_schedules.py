"""Schedules over rounds: their values, and how they are written and told."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_muloco.config import RunConfig, derive, load_config
from megatron_muloco.config.derived import spacing_of_launches
from megatron_muloco.config.outer import NesterovOuter, interval_words, rate_words
from megatron_muloco.monitor.console import start_banner
from megatron_muloco.planning import memory_plan, render_plan
from megatron_muloco.topology import Topology

CPU = Path(__file__).parents[2] / "configs" / "cpu_k2.yaml"
STEPS = "{kind: steps, values: [[1, 0.9], [3, 0.5], [4, 0.6]]}"
LINEAR = "{kind: linear, start: 0.9, end: 0.7, rounds: 5}"
COSINE = "{kind: cosine, start: 0.9, end: 0.7, rounds: 5}"
INTERVAL = "{kind: steps, values: [[1, 10], [3, 20]]}"


def outer_of(**keys: str) -> Any:
    return config_of(**keys).outer


def config_of(**keys: str) -> RunConfig:
    return load_config(CPU, [f"outer.{key}={text}" for key, text in keys.items()])


def test_steps_hold_from_their_round_on() -> None:
    lr = outer_of(lr=STEPS).lr
    assert [lr(r) for r in range(1, 7)] == [0.9, 0.9, 0.5, 0.6, 0.6, 0.6]


@pytest.mark.parametrize("key", ["lr", "momentum"])
@pytest.mark.parametrize("ramp", [LINEAR, COSINE])
def test_ramps_start_and_end_exactly_and_then_stay(ramp: str, key: str) -> None:
    schedule = getattr(outer_of(**{key: ramp}), key)
    assert (schedule(1), schedule(5), schedule(6), schedule(10**6)) == (0.9, 0.7, 0.7, 0.7)
    values = [schedule(r) for r in range(1, 6)]
    assert all(after < before for before, after in itertools.pairwise(values))
    # Half of the way after half of the rounds, for both; one rounding of values below 1.
    assert schedule(3) == pytest.approx(0.8, abs=2**-53)


def test_a_linear_ramp_has_equal_steps_and_a_cosine_smaller_ones_at_its_ends() -> None:
    linear, cosine = outer_of(lr=LINEAR).lr, outer_of(lr=COSINE).lr
    # 0.2 in four rounds; values below 1 are off by at most two roundings of 2**-53.
    assert [linear(r) for r in range(1, 6)] == pytest.approx(
        [0.9, 0.85, 0.8, 0.75, 0.7], abs=2**-52
    )
    first_quarter = 0.2 * 0.5 * (1 - math.cos(math.pi / 4))
    assert 0.9 - cosine(2) == pytest.approx(first_quarter, abs=2**-50)
    assert cosine(4) - 0.7 == pytest.approx(first_quarter, abs=2**-50)


def test_plain_numbers_stay_plain_numbers() -> None:
    outer = load_config(CPU).outer
    assert isinstance(outer, NesterovOuter)
    assert (type(outer.lr), type(outer.momentum), type(outer.sync_interval)) == (float, float, int)


@pytest.mark.parametrize(
    ("key", "text"),
    [("lr", STEPS), ("lr", LINEAR), ("momentum", COSINE), ("sync_interval", INTERVAL)],
)
def test_a_schedule_survives_being_saved(key: str, text: str) -> None:
    config = config_of(**{key: text})
    for mode in ("json", "python"):
        assert RunConfig.model_validate(config.model_dump(mode=mode)).outer == config.outer
    assert config.outer != load_config(CPU).outer


def test_a_file_may_replace_a_schedule_by_a_number(tmp_path: Path) -> None:
    base, run = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base.write_text(f"extends: {CPU}\nouter:\n  lr: {LINEAR}\n  momentum: {COSINE}\n")
    run.write_text("extends: base.yaml\nouter: {lr: 0.5, momentum: {end: 0.1}}\n")
    outer = load_config(run).outer
    assert isinstance(outer, NesterovOuter)
    assert outer.lr == 0.5
    assert callable(outer.momentum)
    assert (outer.momentum(1), outer.momentum(5)) == (0.9, 0.1)


def test_rounds_of_different_lengths_are_counted() -> None:
    # 250 steps: 2 rounds of 10, 11 of 20, and 10 left.
    config = config_of(sync_interval=INTERVAL)
    assert (derive(config).rounds, derive(config).flushed_steps) == (13, 10)
    # 2 of 10, then 230 = 5 * 46.
    even = derive(config_of(sync_interval="{kind: steps, values: [[1, 10], [3, 46]]}"))
    assert (even.rounds, even.flushed_steps) == (7, 0)
    # the second round never ends
    long = derive(config_of(sync_interval="{kind: steps, values: [[1, 10], [2, 1000]]}"))
    assert (long.rounds, long.flushed_steps) == (1, 240)


def test_launches_are_as_close_as_in_the_shortest_round() -> None:
    outer = outer_of(sync_interval=INTERVAL, **{"fragments.count": "3"})
    assert spacing_of_launches(outer) == 3
    outer = outer_of(sync_interval="20", **{"fragments.count": "3"})
    assert spacing_of_launches(outer) == 6


def test_words_say_when_what_changes() -> None:
    outer = outer_of(lr=STEPS, momentum=COSINE, sync_interval=INTERVAL)
    assert rate_words(0.9) == "0.9"
    assert rate_words(outer.lr) == "0.9, 0.5 from round 3, 0.6 from round 4"
    assert rate_words(outer.momentum) == "0.9 to 0.7 over 5 rounds (cosine)"
    assert interval_words(1, "step") == "1 step"
    assert interval_words(outer.sync_interval, "step") == "10 steps, 20 from round 3"


def test_banner_and_plan_show_schedules() -> None:
    config = config_of(lr=LINEAR, sync_interval=INTERVAL, **{"fragments.count": "3"})
    banner = start_banner(config, Topology(2, 1, 1, 1), derive(config), device="cpu")
    assert "lr 0.9 to 0.7 over 5 rounds (linear), momentum 0.3" in banner
    assert "every 10 steps, 20 from round 3" in banner
    plan = render_plan(config)
    assert "lr 0.9 to 0.7 over 5 rounds (linear), momentum 0.3" in plan
    assert "of 10 inner steps, 20 from round 3" in plan
    assert "a launch every 3 to 7 steps" in plan


def test_the_memory_plan_takes_the_fullest_round() -> None:
    """Three launches, in flight for three steps each: closer together in a shorter round."""
    in_flight = {
        interval: memory_plan(
            config_of(
                sync_interval=interval,
                overlap_steps="3",
                max_in_flight="2",
                **{"fragments.count": "3"},
            ),
            Topology(2, 1, 1, 1),
        ).outer_step.in_flight
        for interval in ("12", "6", "{kind: steps, values: [[1, 12], [3, 6], [4, 12]]}")
    }
    assert list(in_flight.values()) == [1, 2, 2]
