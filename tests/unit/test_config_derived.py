"""Numbers that follow from a config."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_muloco.config import derive, learning_rate, load_config
from megatron_muloco.config.derived import complete_rounds, spacing_of_launches
from megatron_muloco.config.outer import Steps
from megatron_muloco.topology import Topology

CPU = Path(__file__).parents[2] / "configs" / "cpu_k2.yaml"
INNER = load_config(CPU).inner


@pytest.mark.parametrize(("tokens", "steps"), [(4096, 1), (4097, 2), (1_024_000, 250)])
def test_tokens_are_rounded_up_to_steps(tokens: int, steps: int) -> None:
    config = load_config(
        CPU,
        [
            "training.train_iters=null",
            f"training.train_tokens={tokens}",
            "inner.lr_warmup_iters=0",
            "outer.sync_interval=1",
        ],
    )
    assert derive(config).train_iters == steps


def test_tokens_per_parameter_count_embeddings() -> None:
    config = load_config(CPU, ["training.train_iters=null", "training.tokens_per_parameter=2"])
    derived = derive(config)
    assert derived.train_iters == math.ceil(2 * derived.parameters.total / 4096)


def test_a_step_is_dealt_out_exactly() -> None:
    config = load_config(CPU, ["training.micro_batch_size=1", "training.global_batch_size=48"])
    for data in (1, 2, 3, 4):
        derived = derive(config, Topology(2, 1, 1, data))
        assert derived.num_microbatches * 1 * data * 2 == 48
        assert derived.replica_batch_size == 24
        assert derived.tokens_per_step == 48 * 256


def test_rounds_and_what_is_left() -> None:
    assert (derive(load_config(CPU)).rounds, derive(load_config(CPU)).flushed_steps) == (25, 0)
    derived = derive(load_config(CPU, ["training.train_iters=257"]))
    assert (derived.rounds, derived.flushed_steps) == (25, 7)
    plain = derive(load_config(CPU, ["outer=null", "outer.kind=none", "parallel.num_replicas=1"]))
    assert (plain.rounds, plain.flushed_steps) == (0, 0)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_weight_decay_follows_the_batch_of_a_replica(replicas: int) -> None:
    config = load_config(
        CPU,
        [
            f"parallel.num_replicas={replicas}",
            "training.global_batch_size=64",
            "inner.weight_decay=null",
            "inner.weight_decay_base=0.5",
            "inner.weight_decay_reference_batch=32",
        ],
    )
    assert derive(config).weight_decay == 0.5 * (64 / replicas) / 32


@pytest.mark.parametrize(("vocab", "padded"), [(4096, 4096), (4097, 4224), (1, 128), (4000, 4096)])
def test_padding_of_the_vocabulary_does_not_depend_on_tp(vocab: int, padded: int) -> None:
    for tp in (1, 2, 4):
        config = load_config(
            CPU,
            [
                f"model.vocab_size={vocab}",
                f"parallel.tensor_model_parallel_size={tp}",
                "model.num_attention_heads=4",
            ],
        )
        assert derive(config).padded_vocab_size == padded


def test_spacing_is_the_shortest_distance_of_launches() -> None:
    outer = load_config(CPU).outer
    for interval in range(1, 40):
        for count in range(1, interval + 1):
            changed = outer.model_copy(
                update={
                    "sync_interval": interval,
                    "fragments": outer.fragments.model_copy(update={"count": count}),
                }
            )
            offsets = sorted(interval * (i + 1) // count % interval for i in range(count))
            distances = [b - a for a, b in itertools.pairwise(offsets)]
            distances.append(offsets[0] + interval - offsets[-1])
            assert min(distances) == spacing_of_launches(changed)


@given(
    style=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 50),
    iterations=st.integers(51, 300),
)
def test_learning_rates_rise_then_never_rise(style: str, warmup: int, iterations: int) -> None:
    changes = {"lr_decay_style": style, "lr_warmup_iters": warmup, "lr": 1.0}
    inner = INNER.model_copy(update=changes)
    rates = [learning_rate(inner, iterations, step) for step in range(1, iterations + 1)]
    assert all(rate > 0 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    if warmup:
        assert rates[0] == 1.0 / warmup
        assert rates[warmup - 1] == 1.0
    # x + (1 - x)*0 and cos(pi) = -1 are exact in binary floating point
    assert rates[-1] == (1.0 if style == "constant" else 0.1)
    assert learning_rate(inner, iterations, iterations + 5) == rates[-1]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    inner = load_config(CPU, ["inner.lr=1.0", "inner.min_lr_ratio=0.0"]).inner
    # one rounding of cos(pi/2), which is about 6e-17 instead of 0
    assert learning_rate(inner, 220, 120) == pytest.approx(0.5, abs=1e-15)


@given(
    style=st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    warmup=st.integers(0, 30),
    decay=st.integers(1, 40),
)
def test_wsd_is_megatrons(style: str, warmup: int, decay: int) -> None:
    iterations = 100
    changes = {
        "lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": decay,
        "lr_warmup_iters": warmup, "lr": 1.0,
    }  # fmt: skip
    inner = INNER.model_copy(update=changes)
    group: dict[str, float] = {}
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), 0.0, 1.0, inner.min_lr_ratio, warmup, iterations,
        "WSD", 0.0, 0.0, 0, "constant", wsd_decay_steps=decay, lr_wsd_decay_style=style,
    )  # fmt: skip
    for step in range(1, iterations + 6):
        theirs.step(1)
        # The same formula in another order: a few roundings of numbers up to 2.
        assert learning_rate(inner, iterations, step) == pytest.approx(group["lr"], abs=1e-15)


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        learning_rate(load_config(CPU).inner, 250, 0)


def test_the_mixing_weight_has_the_papers_default() -> None:
    outer = load_config(CPU).outer
    assert outer.effective_mixing_weight == 0.0
    assert outer.model_copy(update={"overlap_steps": 3}).effective_mixing_weight == 0.5
    given = outer.model_copy(update={"overlap_steps": 3, "mixing_weight": 0.0})
    assert given.effective_mixing_weight == 0.0


def test_average_is_nesterov_with_lr_one_and_no_momentum() -> None:
    outer = load_config(CPU, ["outer=null", "outer.kind=average"]).outer
    assert (outer.lr, outer.momentum) == (1.0, 0.0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4),
    st.integers(0, 300),
)
def test_complete_rounds_are_those_that_counting_finds(
    pairs: list[tuple[int, int]], train_iters: int
) -> None:
    firsts = list(itertools.accumulate((gap for gap, _ in pairs[1:]), initial=1))
    values = tuple(zip(firsts, (steps for _, steps in pairs), strict=True))
    interval = Steps[int](kind="steps", values=values)
    rounds, left = 0, train_iters
    while left >= interval(rounds + 1):
        rounds, left = rounds + 1, left - interval(rounds + 1)
    assert complete_rounds(interval, train_iters) == (rounds, left)
    assert complete_rounds(values[0][1], train_iters) == divmod(train_iters, values[0][1])
