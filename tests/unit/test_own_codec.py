"""A codec from outside of the package goes everywhere that the package's own go."""

import warnings
from pathlib import Path

import pytest
import torch

from megatron_muloco.comm.compressed import build_compressed_reducer_for
from megatron_muloco.comm.costs import reducer_cost
from megatron_muloco.compress.codecs import CodecKind, codec_lookup, format_of, register_codec
from megatron_muloco.compress.format import CodingUnit, RawFormat
from megatron_muloco.config import RunConfig, load_config, with_compression
from megatron_muloco.config.outer import ExceptionsConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.params import ParamInfo, ParamKind, Shard
from megatron_muloco.planning import render_plan, traffic_plan
from megatron_muloco.topology import Topology
from tests.support.own_codec import Sign, SignCompression, sign_format
from tests.support.tensors import assert_equal

CPU = Path(__file__).parents[2] / "configs" / "cpu_k2.yaml"
MATRIX = "decoder.layers.0.mlp.linear_fc1.weight"
KINDS: dict[str, ParamKind | None] = {MATRIX: "fc1"}


def config_of(section: SignCompression | None = None) -> RunConfig:
    return with_compression(load_config(CPU), section or SignCompression())


def test_a_payload_has_the_planned_bytes_and_decodes_to_scaled_signs() -> None:
    section, unit = SignCompression(block_size=64), CodingUnit(1000)
    codec = codec_lookup(section, KINDS)(MATRIX)
    values = torch.randn(unit.numel, generator=torch.Generator().manual_seed(0))
    payload, decoded = codec.encode(values, unit), torch.empty(unit.numel)
    # 16 blocks, the last one shorter: a scale each; and a bit for every value
    assert format_of(section, "fc1").payload_bytes(unit) == payload.numel() == 16 * 4 + 125
    codec.decode(payload, unit, decoded)
    assert_equal(decoded.sign(), values.sign())
    for block, found in zip(values.split(64), decoded.split(64), strict=True):
        torch.testing.assert_close(found.abs(), block.abs().mean().expand_as(found))


def test_exceptions_are_those_of_every_compression() -> None:
    section = SignCompression(exceptions=ExceptionsConfig(norm="none"))
    assert isinstance(format_of(section, "norm"), RawFormat)
    assert isinstance(codec_lookup(section, KINDS)(MATRIX), Sign)
    with pytest.raises(
        ConfigError, match=r"exceptions\.norm: 8, but kind sign has no choice of bits"
    ):
        config_of(SignCompression(exceptions=ExceptionsConfig(norm=8)))


def test_the_plan_counts_it_and_names_it() -> None:
    topology = Topology(2, 1, 1, 1)
    text = render_plan(config_of(), topology)
    assert "sign  1 bit; a scale per block of 256" in text
    assert "to 1 other replica, sign, 1 bit" in text
    traffic = traffic_plan(config_of(), topology)
    # a bit and the 256th part of 32: 1.125 bits of 32, plus metadata and the ends of chunks
    assert 27 < traffic.outer_uncoded / traffic.outer_per_replica < 32 / 1.125


def test_a_reducer_keeps_what_the_plan_says() -> None:
    section = SignCompression()
    shard = Shard(ParamInfo.from_name(MATRIX, (64, 512), None), 0, 64 * 512)
    reducer = build_compressed_reducer_for(None, torch.device("cpu"), section, {}, KINDS)
    values = {MATRIX: torch.randn(shard.numel, generator=torch.Generator().manual_seed(1))}
    reduced = reducer.wait(reducer.launch(0, values, 1.0, torch.zeros(0), round_index=1))
    assert reduced.mean[MATRIX].abs().sum() > 0
    kept = reducer.residuals([{MATRIX: shard.numel}])
    cost = reducer_cost(section, [shard], 1)
    assert sum(t.nbytes for kind in kept.values() for t in kind.values()) == cost.residuals


def test_a_run_is_another_run_with_other_settings_of_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = config_of(), config_of(SignCompression(block_size=64))
        dumped = one.model_dump(mode="json")["outer"]["compression"]
    assert (dumped["kind"], dumped["block_size"]) == ("sign", 256)
    assert len({load_config(CPU).digest(), one.digest(), other.digest()}) == 3


def test_it_needs_an_outer_step() -> None:
    plain = load_config(CPU, ["outer=null", "outer.kind=none", "parallel.num_replicas=1"])
    with pytest.raises(ConfigError, match="nothing is sent that could be compressed"):
        with_compression(plain, SignCompression())


def test_a_kind_has_one_codec() -> None:
    with pytest.raises(ValueError, match="a codec of kind 'linear' exists"):
        register_codec("linear", CodecKind(format=sign_format, codec=Sign))
    with pytest.raises(ValueError, match="there is no codec of kind 'unknown'"):
        format_of(SignCompression.model_construct(kind="unknown"), "fc1")
