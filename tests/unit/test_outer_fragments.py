"""Fragments are a partition of the parameters, whatever the pattern and the pipeline stage."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_muloco.config.outer import FragmentPattern
from megatron_muloco.errors import ConfigError
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.params import ParamInfo

PATTERNS: tuple[FragmentPattern, ...] = ("sequential", "strided")


def model_names(num_layers: int, *, tied: bool = False) -> list[str]:
    per_layer = [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "mlp.linear_fc1.weight",
    ]
    names = ["embedding.word_embeddings.weight"]
    names += [f"decoder.layers.{n}.{part}" for n in range(num_layers) for part in per_layer]
    names.append("decoder.final_layernorm.weight")
    return names if tied else [*names, "output_layer.weight"]


def named(names: Iterable[str]) -> list[ParamInfo]:
    return [ParamInfo.from_name(name, (4,), None) for name in names]


def layers_of(plan: FragmentPlan) -> list[list[int]]:
    return [
        sorted({int(name.split(".")[2]) for name in group if name.startswith("decoder.layers")})
        for group in plan.fragments
    ]


def test_sequential_takes_neighbours_and_strided_takes_every_third() -> None:
    names = model_names(6)
    sequential = FragmentPlan.by_layer(named(names), num_layers=6, count=3, pattern="sequential")
    strided = FragmentPlan.by_layer(named(names), num_layers=6, count=3, pattern="strided")
    assert layers_of(sequential) == [[0, 1], [2, 3], [4, 5]]
    assert layers_of(strided) == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_embedding_opens_and_the_head_closes(pattern: FragmentPattern) -> None:
    plan = FragmentPlan.by_layer(named(model_names(4)), num_layers=4, count=2, pattern=pattern)
    assert "embedding.word_embeddings.weight" in plan.fragments[0]
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= set(plan.fragments[1])


def test_the_published_three_fragments_of_the_416m_model() -> None:
    # embedding + layers 0-3 | 4-7 | 8-11 + norm + head, as in the public experiment code.
    plan = FragmentPlan.by_layer(named(model_names(12)), num_layers=12, count=3)
    assert layers_of(plan) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@given(st.integers(1, 20), st.data(), st.sampled_from(PATTERNS), st.booleans())
def test_every_name_is_in_one_fragment_and_none_is_empty(
    num_layers: int, data: st.DataObject, pattern: FragmentPattern, tied: bool
) -> None:
    count = data.draw(st.integers(1, num_layers))
    names = model_names(num_layers, tied=tied)
    plan = FragmentPlan.by_layer(named(names), num_layers=num_layers, count=count, pattern=pattern)
    plan.check(names)
    assert sorted(plan.names()) == sorted(names)
    sizes = [len(layers) for layers in layers_of(plan)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pipeline_stage_gets_its_part_of_the_same_fragments(pattern: FragmentPattern) -> None:
    names = model_names(6)
    whole = FragmentPlan.by_layer(named(names), num_layers=6, count=3, pattern=pattern)
    for stage in (names[:10], names[10:]):
        part = FragmentPlan.by_layer(named(stage), num_layers=6, count=3, pattern=pattern)
        for group, all_names in zip(part.fragments, whole.fragments, strict=True):
            assert list(group) == [name for name in all_names if name in stage]


def test_missing_and_unknown_names_are_listed() -> None:
    plan = FragmentPlan((("a", "b"), ("stray",)))
    with pytest.raises(ConfigError, match="missing: c; repeated or unknown: stray"):
        plan.check(["a", "b", "c"])


def test_a_name_in_two_fragments_is_refused() -> None:
    with pytest.raises(ConfigError, match="repeated or unknown: b"):
        FragmentPlan((("a", "b"), ("b",)))


@pytest.mark.parametrize("name", ["vision.tower.weight", "decoder.layers.4.mlp.linear_fc1.weight"])
def test_a_name_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no fragment for {name}"):
        FragmentPlan.by_layer(named([*model_names(4), name]), num_layers=4)


def test_more_fragments_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"outer\.fragments\.count: 5 is not in 1\.\.4"):
        FragmentPlan.by_layer(named(model_names(4)), num_layers=4, count=5)
