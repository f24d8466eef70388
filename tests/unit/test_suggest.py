"""Suggestions: every config passes, values have reasons, a link of less bandwidth sends less."""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_muloco.config import check, load_config, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.flops import flops_per_token
from megatron_muloco.planning import traffic_plan
from megatron_muloco.planning.timing import link_rate
from megatron_muloco.training.main import main as pretrain
from tools import suggest
from tools.scaling.advice import (
    LADDER,
    Exchange,
    Round,
    Shape,
    choose_exchange,
    shape_near,
)
from tools.scaling.labelled import KINDS
from tools.scaling.ready import CONFIGS, model_budget

LINKS = ("100Mbit", "1Gbit", "10Gbit", "100Gbit", "1.6Tbit")


def options(words: str) -> argparse.Namespace:
    """Return options as the command line would give them, with the defaults of the tool."""
    defaults = {
        "params": 1.5e9, "replicas": 8, "link": "10Gbit", "tokens": "20x", "gpus": None,
        "goal": "loss", "method": "auto", "share": 0.95, "gpu_tflops": 989.0, "gpu_memory": 80.0,
        "mfu": 0.4, "output": None,
    }  # fmt: skip
    given = dict(word.split("=") for word in words.split())
    kinds = {name: type(value) for name, value in defaults.items()} | {"gpus": int}
    return argparse.Namespace(**defaults | {k: kinds[k](v) for k, v in given.items()})


@pytest.mark.parametrize(
    "words",
    [
        "",
        "params=150e6 replicas=2 link=1Gbit",
        "params=416e6 replicas=3 link=100Mbit tokens=5e9",
        "params=914e6 replicas=1 goal=time",
        "params=914e6 replicas=4 method=diloco link=300Mbit",
        "params=2.3e9 replicas=16 gpus=256 goal=time",
        "params=3.07e9 replicas=1 method=dp_muon",
        "params=5e9 replicas=12 gpus=192",
        "params=15e9 replicas=16 gpus=1024 link=100Gbit tokens=300B",
        "params=15e9 replicas=4 gpus=64",
        "params=30e9 replicas=8 gpus=512",
    ],
)
def test_what_is_suggested_passes(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options(words)
    found = suggest.suggest(asked)
    path = tmp_path / "run.yaml"
    path.write_text(found.ready.text(tmp_path))
    world = found.machine.gpus
    with pytest.raises(SystemExit) as ended:
        pretrain(["--config", str(path), "--dry-run", "--world-size", str(world)])
    assert not ended.value.code
    assert f"{world:,}" in capsys.readouterr().out
    config = load_config(path)
    check(config, topology_of(config, world))
    assert config.model_dump() == found.config.model_dump()
    assert config.parallel.num_replicas == asked.replicas
    for value in found.ready.values:
        named = value.key in ("checkpoint.dir", "monitor.dir")
        assert named or value.label.partition(":")[0] in KINDS
    assert "passes" in suggest.report(found, asked)


@pytest.mark.parametrize("words", ["", "params=416e6 replicas=2", "params=15e9 gpus=256"])
def test_a_link_of_less_bandwidth_never_sends_more(words: str) -> None:
    rounds = [suggest.suggest(options(f"{words} link={link}")).chosen for link in LINKS]
    for slower, faster in pairwise(rounds):
        assert slower.sent / slower.exchange.interval <= faster.sent / faster.exchange.interval
        # The loss of the figures, which the choice gives up for time; read to +-0.15 %.
        assert slower.exchange.penalty("muloco") >= faster.exchange.penalty("muloco") - 0.15


def test_the_ladder_sends_less_with_every_step() -> None:
    base = suggest.suggest(options("link=1Tbit"))
    sent = []
    for exchange in LADDER:
        found = suggest._ready(base.target, base.shape, base.machine, (1, 1), exchange, "loss")
        config = suggest.load_text(found)
        plan = traffic_plan(config, topology_of(config, base.machine.gpus))
        sent.append(plan.outer_per_replica / exchange.interval)
    assert sent == sorted(sent, reverse=True)


def test_times_are_bytes_and_flops_over_rates() -> None:
    found = suggest.suggest(options("link=10Gbit mfu=0.5 gpu_tflops=1000"))
    config, chosen = found.config, found.chosen
    plan = traffic_plan(config, topology_of(config, found.machine.gpus))
    assert chosen.sent == plan.outer_per_replica
    assert chosen.exchange_seconds == pytest.approx(8 * chosen.sent / 10e9)
    tokens = config.training.global_batch_size * config.model.seq_length
    flops = flops_per_token(config.model).total * tokens
    assert chosen.step_seconds == pytest.approx(flops / (found.machine.gpus * 0.5 * 1e15))


def test_overlap_hides_no_more_than_its_steps() -> None:
    def round_with(overlap: int, seconds: float) -> Round:
        return Round(Exchange(4, 30, overlap), 1.0, 1, seconds)

    assert round_with(0, 4.0).exposed_seconds == 4.0
    assert round_with(5, 4.0).exposed_seconds == 0.0
    assert round_with(5, 7.0).exposed_seconds == 2.0
    assert round_with(0, 30.0).share == 0.5


def test_the_first_exchange_that_is_enough_is_taken() -> None:
    def plan(exchange: Exchange) -> Round:
        return Round(exchange, 1.0, exchange.bits, exchange.bits / 4)

    chosen, tried = choose_exchange(plan, 0.9)
    assert chosen == tried[-1]
    assert chosen.share >= 0.9
    assert all(each.share < 0.9 for each in tried[:-1])
    assert choose_exchange(plan, 1.1)[0].exchange == LADDER[-1]


def test_a_share_that_no_link_gives_is_said() -> None:
    asked = options("link=1Mbit")
    found = suggest.suggest(asked)
    assert found.chosen.exchange == LADDER[-1]
    assert "no exchange leaves 95%" in suggest.report(found, asked)


def test_time_takes_no_smaller_batch_than_loss() -> None:
    for size, least in (("416e6", 1), ("914e6", 1), ("1.76e9", 2), ("15e9 gpus=512", 2)):
        loss, time = (
            suggest.suggest(options(f"params={size} goal={goal}")).config.training
            for goal in suggest.GOALS
        )
        assert time.global_batch_size >= least * loss.global_batch_size


@pytest.mark.parametrize("heads", sorted(suggest.SIZES))
def test_published_sizes_are_of_the_family(heads: int) -> None:
    name, micro = suggest.SIZES[heads]
    path = tmp = CONFIGS / f"models/{name}.yaml"
    assert Shape(heads).params == model_budget(path).parameters.total
    assert f"micro_batch_size: {micro} " in tmp.read_text()
    assert shape_near(1.01 * Shape(heads).params) == Shape(heads)


def test_a_published_size_extends_its_file() -> None:
    found = suggest.suggest(options("params=914e6"))
    assert [path.name for path in found.ready.extends] == ["914m.yaml", "muloco_k8.yaml"]


def test_the_method_is_that_of_the_lowest_published_loss() -> None:
    assert suggest.suggest(options("replicas=8")).target.method == "muloco"
    assert suggest.suggest(options("replicas=1")).target.method == "muloco"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10Gbit", 1e10),
        ("800 Mbit/s", 8e8),
        ("1.6Tbitps", 1.6e12),
        ("5e2kbit", 5e5),
    ],
)
def test_rates_are_read(text: str, rate: float) -> None:
    assert link_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["10", "10GB", "10Gbyte", "-1Gbit", "0Gbit", "fast", "1.2.3Gbit", ""]
)
def test_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="A byte is 8 bits"):
        link_rate(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpus=63", "not divisible by 8 replicas"),
        ("replicas=0", "at least one replica"),
        ("link=10GB", "is no rate"),
        ("params=1e6", "the family has models from"),
        ("params=1e13", "the family has models from"),
        ("params=nan", "--params nan is not above 0"),
        ("tokens=lots", "no token budget"),
        ("mfu=1.5", "--mfu 1.5"),
        ("share=0", "--share 0"),
        ("method=dp_muon", "no outer step"),
        ("params=30e9 replicas=8 gpus=8", "does not fit"),
    ],
)
def test_nonsense_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suggest.suggest(options(words))


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        suggest.suggest(options("gpus=63 link=10 mfu=2"))
    assert len(caught.value.problems) == 3


def test_a_batch_above_the_critical_one_is_said() -> None:
    many, few = (options(f"params=150e6 replicas=2 gpus={n} tokens=1e9") for n in (1024, 16))
    found = suggest.suggest(many)
    assert found.config.training.global_batch_size >= 1024  # one sequence a rank
    assert "more than the critical" in suggest.report(found, many)
    assert "warning" not in suggest.report(suggest.suggest(few), few)


def test_the_command_writes_the_config_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--params", "150e6", "--replicas", "2", "--link", "10Gbit"]
    assert suggest.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# MuLoCo, 2 replicas, 150.6M parameters")
    assert "plan: passes" in printed.err
    out = tmp_path / "run.yaml"
    assert suggest.main([*words, "--output", str(out)]) == 0
    assert not capsys.readouterr().out
    assert load_config(out).parallel.num_replicas == 2
    assert suggest.main(["--params", "150e6", "--replicas", "2", "--link", "10GB"]) == 2
    assert math.isfinite(load_config(out).inner.lr)
