"""Time of a run: closed forms, the simulation of compute and links, and what both agree on."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_muloco.config import RunConfig, load_config, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.planning.simulation import (
    Compute,
    Layered,
    Player,
    Send,
    Wait,
    fewest_overlap_steps,
    layered_rounds,
    steady_share,
    trainer_rounds,
)
from megatron_muloco.planning.timing import (
    LINKS,
    Rate,
    Rates,
    blocking_share,
    data_parallel_bits,
    exposed_seconds,
    failures,
    ideal_seconds,
    link_rate,
    rate_for_share,
    smallest_rate,
    step_time,
)
from megatron_muloco.planning.traffic import launch_bytes, traffic_plan

CONFIGS = Path(__file__).parents[2] / "configs"


def rates_of(**changes: float) -> Rates:
    """Return rates of a machine, with others of some."""
    numbers = {"flops": 1e15, "mfu": 0.5, "link": 1e10, "efficiency": 1.0, "writing": 1e10,
               "mtbf": 1e8, "restart": 600.0} | changes  # fmt: skip
    return Rates(**{name: Rate(value, "assumed") for name, value in numbers.items()})


def load(name: str, *overrides: str) -> RunConfig:
    """Return a shipped config with changes."""
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


# ---- links ------------------------------------------------------------------------------------


def test_links_have_rates_or_names() -> None:
    assert link_rate("10Gbit") == link_rate("10 Gbit/s") == link_rate("10gbe") == 10e9
    assert link_rate("NDR") == LINKS["ndr"]


@pytest.mark.parametrize("link", ["10", "10GB/s", "carrier-pigeon", "0Gbit", ""])
def test_an_unknown_link_is_refused_with_the_list(link: str) -> None:
    with pytest.raises(ConfigError) as refused:
        link_rate(link)
    assert all(name in str(refused.value) for name in LINKS)


# ---- the player -------------------------------------------------------------------------------


def test_transfers_share_the_link_in_the_order_of_their_sends() -> None:
    player = Player(rate=2.0)
    player.play([Compute(1.0), Send("a", 4.0), Send("b", 2.0), Compute(0.5), Wait("b")])
    # a from 1 to 3, then b from 3 to 4; half a second of it computed.
    assert (player.now, player.computed, player.busy) == (4.0, 1.5, 3.0)
    player.play([Wait("a"), Wait("never sent")])
    assert player.now == 4.0


# ---- simulation and closed forms ----------------------------------------------------------------
#
# Times are multiples of powers of two, so that both sides are exact.


@pytest.mark.parametrize("interval", [1, 4, 32])
@pytest.mark.parametrize("bits", [0.5, 8.0, 64.0])
def test_a_blocking_exchange_is_the_closed_form(interval: int, bits: float) -> None:
    simulated = steady_share(trainer_rounds(interval, (bits,), 0, 0.25), 2.0)
    assert simulated == blocking_share(interval, 0.25, bits / 2)


@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
@pytest.mark.parametrize("bits", [0.5, 2.0, 3.0])
def test_overlap_exposes_what_tau_steps_do_not_hide(overlap: int, bits: float) -> None:
    simulated = steady_share(trainer_rounds(8, (bits,), overlap, 0.25), 2.0)
    assert simulated == blocking_share(8, 0.25, exposed_seconds(bits / 2, overlap, 0.25))


def test_a_model_of_one_layer_blocks() -> None:
    layers = layered_rounds(Layered(1, 0.25, 8.0, interval=4))
    # A third and two thirds of a step add up to it but for rounding.
    assert steady_share(layers, 2.0) == pytest.approx(blocking_share(4, 0.25, 4.0), rel=1e-12)


def test_data_parallelism_hides_reduction_behind_backward() -> None:
    layers = layered_rounds(Layered(64, 1.0, 0.5))
    fast, slow = steady_share(layers, 100.0), steady_share(layers, 1.0)
    # At rate 1 the reduction needs 0.5 s, less than backward: only the last layer's is exposed.
    assert slow == pytest.approx(1 / (1 + 0.5 / 64), rel=1e-9)
    assert slow < fast < 1


def test_more_overlap_and_a_faster_link_never_compute_less() -> None:
    bits = (3.0, 1.0, 2.0)
    for overlap in range(7):
        shares = [steady_share(trainer_rounds(8, bits, overlap, 1.0), 2.0**e) for e in range(-3, 4)]
        assert shares == sorted(shares)
        more = steady_share(trainer_rounds(8, bits, overlap + 1, 1.0), 1.0)
        assert more >= steady_share(trainer_rounds(8, bits, overlap, 1.0), 1.0)


def test_the_link_bounds_what_overlap_can_hide() -> None:
    # 16 s of sending in a round of 8 s: the link is always busy, half of the time computes.
    rounds = trainer_rounds(8, (16.0,), 7, 1.0)
    assert steady_share(rounds, 1.0) <= 8 / 16
    assert fewest_overlap_steps(8, (16.0,), 1.0, 1.0, 1.0) is None
    # A link that is 1/64 too slow: in small pieces it takes many rounds until training waits.
    pieces = trainer_rounds(8, (65 / 64,) * 8, 6, 1.0)
    assert steady_share(pieces, 1.0) == 64 / 65


def test_the_fewest_overlap_steps_hide_and_one_less_does_not() -> None:
    assert fewest_overlap_steps(8, (3.0,), 1.0, 1.0, 1.0) == 3
    assert fewest_overlap_steps(8, (1.5, 1.5), 1.0, 1.0, 1.0) == 2  # smaller pieces arrive sooner
    assert steady_share(trainer_rounds(8, (3.0,), 2, 1.0), 1.0) < 1


@pytest.mark.parametrize("share", [0.5, 0.8, 0.99])
def test_the_rate_for_a_share_has_that_share(share: float) -> None:
    rate = rate_for_share(share, 1e12, 30, 0.5)
    assert blocking_share(30, 0.5, 1e12 / rate) == pytest.approx(share, rel=1e-12)
    rounds = trainer_rounds(30, (1e12,), 0, 0.5)
    found = smallest_rate(share, lambda bits: steady_share(rounds, bits))
    assert found == pytest.approx(rate, rel=1.1e-3)  # it is searched to 0.1 %


def test_a_share_that_no_rate_has() -> None:
    assert smallest_rate(0.9, lambda rate: 0.5) is None


def test_ideal_seconds_are_steps_that_block() -> None:
    share = steady_share(trainer_rounds(32, (64.0,), 0, 0.25), 2.0)
    assert ideal_seconds(320, 0.25, 64.0, 2.0, 32) == 320 * 0.25 / share


# ---- steps of a config ------------------------------------------------------------------------


def test_a_step_without_pipeline_is_its_flops() -> None:
    config = load("416m_diloco_k8", "training.recompute_granularity=none")
    topology = topology_of(config, 16)
    step, rates = step_time(config, topology, rates_of()), rates_of()
    assert (step.imbalance, step.bubble, step.newton_schulz) == (0, 0, 0)
    tokens = config.training.global_batch_size * config.model.seq_length
    model = flops_per_token(config.model).total * tokens
    # The last stage also counts 5 FLOPs for each logit of the loss.
    loss = 5 * config.model.vocab_size * tokens
    speed = 16 * rates.flops.value * rates.mfu.value
    assert step.seconds == pytest.approx((model + loss) / speed, rel=1e-9)
    assert step.utilisation == pytest.approx(0.5 * model / (model + loss), rel=1e-9)


def test_the_bubble_is_p_minus_1_over_m() -> None:
    config = load("15b_k16")
    topology = topology_of(config, 1024)
    step = step_time(config, topology, rates_of())
    microbatches = 256 // 8
    assert step.bubble == pytest.approx((step.compute + step.imbalance) / microbatches, rel=1e-9)
    assert step.newton_schulz > 0


def test_a_measured_step_keeps_its_proportions() -> None:
    config = load("15b_k16")
    topology = topology_of(config, 1024)
    computed = step_time(config, topology, rates_of())
    measured = step_time(config, topology, replace(rates_of(), step=Rate(3.0, "measured")))
    assert measured.seconds == pytest.approx(3.0, rel=1e-12)
    assert measured.bubble / 3.0 == pytest.approx(computed.bubble / computed.seconds, rel=1e-12)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("outer.fragments.count=3",),
        ("outer.compression.kind=statistical", "outer.compression.bits=4"),
    ],
)
def test_launches_add_up_to_the_bytes_of_the_plan(overrides: tuple[str, ...]) -> None:
    config = load("416m_muloco_k8", *overrides)
    topology = topology_of(config, 16)
    launches = launch_bytes(config, topology)
    assert len(launches) == config.outer.fragments.count  # type: ignore[union-attr]
    assert sum(launches) == traffic_plan(config, topology).outer_per_replica


def test_data_parallelism_has_no_launches_and_hierarchy_sends_less() -> None:
    config = load("15b_dp_muon")
    topology = topology_of(config, 256)
    assert launch_bytes(config, topology) == ()
    flat = data_parallel_bits(config, topology, 2, hierarchical=False)
    two_levels = data_parallel_bits(config, topology, 2, hierarchical=True)
    ranks = topology.sharding
    for sums, all_ranks in zip(two_levels, flat, strict=True):
        assert sums / all_ranks == pytest.approx((1 / 2) / ((ranks - 1) / ranks), rel=1e-12)


# ---- failures ---------------------------------------------------------------------------------


def test_no_other_interval_has_more_goodput_than_dalys() -> None:
    found = failures(1000, rates_of(), 60.0, None)
    assert found.mtbf == 1e8 / 1000
    assert found.young == math.sqrt(2 * 60 * found.mtbf)
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = failures(1000, rates_of(), 60.0, factor * found.daly)
        assert other.goodput_at is not None
        assert other.goodput_at < found.goodput


def test_goodput_falls_with_ranks_and_is_whole_without_failures() -> None:
    goodputs = [failures(ranks, rates_of(), 60.0, None).goodput for ranks in (10, 1000, 100_000)]
    assert goodputs == sorted(goodputs, reverse=True)
    assert failures(1, rates_of(mtbf=1e15), 1.0, None).goodput == pytest.approx(1, abs=1e-6)
    assert failures(10**9, rates_of(), 60.0, 3600.0).goodput_at == 0.0
