"""The network laboratory: its arithmetic, its command lines and its page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.bench.lowbandwidth import compose, counters, probe, readings, table
from tools.bench.lowbandwidth.commands import (
    BURST_BYTES,
    Link,
    Names,
    create_commands,
    owner_of,
    relay_command,
    shape_commands,
)
from tools.bench.lowbandwidth.methods import (
    METHODS,
    OVERLAP,
    SYNC_INTERVAL,
    TABLE,
    Sizes,
    overrides,
)
from tools.bench.lowbandwidth.model import costs
from tools.bench.lowbandwidth.phases import Campaign
from tools.bench.lowbandwidth.results import results

NAMES = Names(pid=123, started=456)


def reading(**changes: object) -> readings.Reading:
    """Return a reading of two rounds of three steps after a warm-up round, changed as asked."""
    values: dict[str, object] = {
        "method": "muloco",
        "changes": [],
        "mbit": 10.0,
        "achieved": [(10.0, 9.9)],
        "congestion_control": "reno",
        "window": readings.Window(3, 9),
        "digest": "abc",
        "series": {
            "step_s": [(step, 2.0 if step in (4, 7) else 1.0) for step in range(1, 10)],
            "round_ms": [(3, 9_000.0), (6, 4_000.0), (9, 5_000.0)],
            "exposed_ms": [(3, 70.0), (6, 1_000.0), (9, 2_000.0)],
        },
        "sent": [600.0, 1_200.0],
    }
    return readings.Reading(**(values | changes))  # type: ignore[arg-type]


# ---- commands ---------------------------------------------------------------------------------


def test_both_ends_of_every_link_are_shaped_to_the_rate() -> None:
    commands = shape_commands(NAMES, 3, Link(10))
    places = {(c[c.index("-n") + 1], c[c.index("dev") + 1]) for c in commands}
    expected = {(NAMES.rank(r), "eth0") for r in range(3)} | {
        (NAMES.hub, f"port{r}") for r in range(3)
    }
    assert places == expected
    assert all(c[c.index("rate") + 1] == "10000000bit" for c in commands)
    assert all(c[c.index("burst") + 1] == f"{BURST_BYTES}b" for c in commands)


def test_unshaped_links_get_no_command() -> None:
    assert shape_commands(NAMES, 2, Link(None)) == []


def test_delay_sits_below_the_rate_and_each_packet_meets_it_once() -> None:
    commands = shape_commands(NAMES, 1, Link(10, delay_ms=20, loss=0.01))
    kinds = [("tbf" if "tbf" in c else "netem", c[c.index("dev") + 1]) for c in commands]
    assert kinds == [("tbf", "eth0"), ("netem", "eth0"), ("tbf", "port0")]
    netem = " ".join(commands[1])
    assert "parent 1:1 handle 2: netem delay 20ms loss 1.0000%" in netem


def test_delay_without_a_rate_is_at_the_root() -> None:
    (command,) = shape_commands(NAMES, 1, Link(None, delay_ms=5))
    assert "root handle 2: netem delay 5ms" in " ".join(command)


def test_a_relay_takes_the_place_of_bridge_and_netem() -> None:
    link = Link(10, delay_ms=20, loss=0.01)
    commands = [
        *create_commands(NAMES, 2, bridge=False),
        *shape_commands(NAMES, 2, link, netem=False),
    ]
    assert not {"bridge", "master", "netem"} & {word for command in commands for word in command}
    ports = [c[c.index("set") + 1] for c in commands if c[:4] == ["ip", "-n", NAMES.hub, "link"]]
    relay = relay_command(NAMES, 2, link)
    assert relay[:4] == ["ip", "netns", "exec", NAMES.hub]
    assert relay[-4:] == ["20", "0.01", *ports]


def test_readings_of_other_links_have_other_names() -> None:
    links = [Link(None), Link(10), Link(100), Link(10, 20), Link(10, 20, 0.01), Link(10, 0, 0.01)]
    assert len({link.name for link in links}) == len(links)
    assert Link(10).name == "10mbit"


def test_namespaces_say_who_owns_them() -> None:
    created = [c[3] for c in create_commands(NAMES, 2) if c[:3] == ["ip", "netns", "add"]]
    assert created == [NAMES.hub, NAMES.rank(0), NAMES.rank(1)]
    assert {owner_of(name) for name in created} == {(123, 456)}
    assert owner_of("muloco-laboratory") is None
    assert owner_of("somebody-123-456-hub") is None


# ---- counters ---------------------------------------------------------------------------------

NET_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo
    lo:      11       1    0    0    0     0          0         0       12       1    0    0    0
  eth0:    2100      20    0    0    0     0          0         0     1200      10    0    0    0
"""


def test_counters_of_the_right_device_and_direction() -> None:
    assert counters.interface_bytes(NET_DEV) == (1200, 2100)
    with pytest.raises(ValueError, match="eth7"):
        counters.interface_bytes(NET_DEV, "eth7")


def test_counters_are_interpolated_and_constant_outside() -> None:
    samples = [(10.0, 0, 100), (20.0, 1000, 300)]
    assert counters.bytes_at(samples, 12.5) == (250.0, 150.0)
    assert counters.bytes_at(samples, 20.0) == (1000.0, 300.0)
    assert counters.bytes_at(samples, 5.0) == (0.0, 100.0)
    assert counters.bytes_at(samples, 25.0) == (1000.0, 300.0)


def test_the_worst_link_decides_and_too_fast_is_wrong_too() -> None:
    links = [probe.Achieved(0, 10.0, 9.5), probe.Achieved(1, 10.75, 10.0)]
    assert probe.off_by(links, 10) == pytest.approx(0.075)  # one rounding in a division


def test_a_lossy_link_is_measured_before_its_loss_and_after_it() -> None:
    links = [probe.Achieved(0, 10.0, 9.0)]
    assert probe.off_by(links, 10, loss=0.1) == 0
    assert probe.off_by(links, 10) == pytest.approx(0.1)  # one rounding in a division


def test_echoes_must_take_twice_the_delay_and_miss_what_is_lost() -> None:
    link = Link(10, delay_ms=20, loss=0.01)
    # A trip there and back is whole with 0.99 squared: 79.6 of 4,000 are missing, 8.8 deviates.
    right = probe.Echoes([40.0, 42.9, 37.1], sent=4000, lost=80)
    assert probe.wrong_echoes(right, link) == ""
    assert "43.10 ms, not 40" in probe.wrong_echoes(replace(right, round_trip_ms=[40, 43.1]), link)
    assert "116 of 4000" in probe.wrong_echoes(replace(right, lost=116), link)
    assert "1 of 4000" in probe.wrong_echoes(replace(right, lost=1), replace(link, loss=0.0))


# ---- arithmetic -------------------------------------------------------------------------------


def test_floor_is_compute_and_bytes_over_rate() -> None:
    assert compose.floor_seconds(0.5, 1_250_000, 10) == 1.5
    assert compose.floor_seconds(0.5, 1_250_000, None) == 0.5


def test_steps_of_the_window_only() -> None:
    assert compose.step_seconds(reading(), 3) == 1.5  # (4 + 5) s / 2 rounds / 3 steps
    assert compose.step_seconds(reading(), 1) == 8 / 6
    assert compose.exposed_per_round(reading(), 3) == 1_500
    with pytest.raises(ValueError, match="window"):
        compose.step_seconds(replace(reading(), window=readings.Window(90, 99)), 3)


def test_time_to_a_loss_is_composed_from_the_first_evaluation_that_reaches_it() -> None:
    validation = [(0, 9.0), (30, 5.0), (60, 4.0), (90, 4.1)]
    assert compose.steps_to(validation, 4.1) == 60
    assert compose.steps_to(validation, 9.5) == 0
    assert compose.steps_to(validation, 3.9) is None
    assert table.time_to_loss(60, 1.5) == 90.0
    assert table.time_to_loss(None, 1.5) is None


def test_paired_differences_are_relative() -> None:
    assert compose.relative_difference([4.5], [4.0]) == (0.125, None)
    mean, half = compose.relative_difference([4.0, 4.5], [4.0, 4.0])
    assert mean == 0.0625
    # Two pairs: half of the interval is the t quantile of one degree, 12.706, of half their gap.
    assert half == pytest.approx(12.706 * 0.0625, rel=1e-4)  # the quantile has five digits
    assert compose.relative_difference([5.0, 5.0], [4.0, 4.0])[1] == 0


def row_of(**changed: Any) -> table.Row:
    arguments: dict[str, Any] = {
        "cost": compose.Costs(bytes_per_step=250_000, steps_per_round=3),
        "compute": 1.0,
        "validation": [(0, 9.0), (30, 4.0)],
        "target": 4.0,
    }
    free = reading(mbit=None, series={"round_ms": [(6, 3_000.0), (9, 4_500.0)]})
    return table.row("MuLoCo", reading(), free, **(arguments | changed))


def test_a_row_composes_one_reading() -> None:
    row = row_of()
    assert row.timing == compose.Timing(compute=1.0, wall=1.5, floor=1.2)
    assert row.timing.utilisation == 1.0 / 1.5
    assert row.counted_bytes == 150.0  # the mean of 600 and 1,200 over 6 steps
    assert row.exposed_share == 3.0 / 9.0
    assert row.seconds_to_target == 45.0
    text = table.methods_table([row], with_target=True)
    widths = {line.count("|") for line in text.splitlines()}
    assert len(widths) == 1
    assert "| MuLoCo | 250.0 | 0.1 | 1,000 |" in text


def test_slow_arithmetic_can_be_left_out_of_a_step() -> None:
    # 1.5 s a step on the link, 1.25 s without: the link adds 0.25 s to whatever compute takes.
    assert row_of(compute=0.5, link_alone=True).timing.wall == 0.75
    assert row_of(compute=0.5).timing.wall == 1.5


# ---- methods and the planner ------------------------------------------------------------------


def changes(name: str) -> tuple[str, ...]:
    return overrides(METHODS[name], Sizes(600, 8, 30, 1), "events")


def test_the_same_step_is_compared() -> None:
    for method in (*TABLE, *OVERLAP):
        ours = changes(method.name)
        assert "training.global_batch_size=8" in ours
        assert "training.micro_batch_size=2" in ours
        assert method.is_data_parallel != (f"outer.sync_interval={SYNC_INTERVAL}" in ours)


def test_the_planner_knows_that_replicas_send_less() -> None:
    data_parallel, replicas = costs(changes("muon_dp")), costs(changes("muloco"))
    assert (data_parallel.steps_per_round, replicas.steps_per_round) == (1, SYNC_INTERVAL)
    # Gradients and parameters in fp32 against one all-reduce in fp32: at least the interval, and
    # Muon's matrices beside it.
    assert data_parallel.bytes_per_step > SYNC_INTERVAL * 0.99 * replicas.bytes_per_step


# ---- storage and page -------------------------------------------------------------------------


def campaign(out: Path) -> Campaign:
    return Campaign(
        out=out,
        methods=(),
        rates=(10.0,),
        overlap_rate=20.0,
        whole_rate=10.0,
        seeds=(1,),
        steps=600,
        batch=8,
        dp_steps=20,
        rounds=3,
        link=Link(None),
        timeout=1.0,
        commit="abc1234",
    )


def test_a_reading_survives_storage(tmp_path: Path) -> None:
    path = tmp_path / "measure" / "a.json"
    assert readings.load(path) is None
    readings.store(path, reading())
    assert readings.load(path) == reading()


def test_a_page_shows_what_is_there(tmp_path: Path) -> None:
    from tools.bench.lowbandwidth.page import render

    plan = campaign(tmp_path)
    assert not results(plan, None).rows[10.0]
    method = METHODS["muloco"]
    window = readings.Window(SYNC_INTERVAL, 2 * SYNC_INTERVAL)
    last = 2 * SYNC_INTERVAL
    series = {
        "step_s": [(step, 0.5) for step in range(1, last + 1)],
        "round_ms": [(SYNC_INTERVAL, 20_000.0), (last, 20_000.0)],
        "exposed_ms": [(last, 5_000.0)],
        "validation": [(0, 9.0), (30, 4.0), (60, 3.5)],
    }
    free = series | {"round_ms": [(SYNC_INTERVAL, 15_000.0), (last, 15_000.0)]}
    for path, rate, seen in (
        (plan.measured(method, None), None, free),
        (plan.measured(method, 10.0), 10.0, series),
        (plan.trained(method, 1), None, series),
    ):
        stored = reading(mbit=rate, window=window, series=seen, changes=list(changes("muloco")))
        readings.store(path, stored)
    found = results(plan, None)
    assert found.target == 3.5
    (row,) = found.rows[10.0]
    assert row.seconds_to_target == 60 * 20 / SYNC_INTERVAL
    page = render(plan, found, None)
    assert "## 10 Mbit/s" in page
    assert "Best utilisation: 75.0%, MuLoCo." in page
    assert max(map(len, (line for line in page.splitlines() if "|" not in line))) <= 125
