"""Temporary buffers of the plan are those that are allocated, and the verdict is about all rows."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from megatron_muloco.config import RunConfig, load_config, topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.throughput import gpu_by_name
from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.muon import Muon
from megatron_muloco.planning import memory_plan, render_plan
from megatron_muloco.planning.activations import stage_activations
from megatron_muloco.planning.memory import communicator_bytes, newton_schulz_bytes
from megatron_muloco.planning.report import human_bytes, refusal
from megatron_muloco.planning.verdict import Device, Verdict, judge
from megatron_muloco.topology import Topology
from megatron_muloco.training import build
from tests.support.allocated import AllocatedBytes

CONFIGS = Path(__file__).parents[2] / "configs"
GPU_80GB = Device("NVIDIA H100 80GB HBM3", 80 * 10**9)


def verdict_of(name: str, ranks: int, *overrides: str, gpu: Device = GPU_80GB) -> Verdict:
    config = load_config(CONFIGS / f"{name}.yaml", list(overrides))
    topology = topology_of(config, ranks)
    return judge(config, topology, memory_plan(config, topology), gpu)


@pytest.mark.parametrize(
    ("name", "ranks", "fits"),
    [
        ("15b_k16", 1024, True),
        ("15b_k16", 128, True),
        ("3.1b_muloco_k16", 16, False),
        ("3.1b_muloco_k16", 128, True),
    ],
)
def test_shipped_configs_on_gpus_of_80_gb(name: str, ranks: int, fits: bool) -> None:
    verdict = verdict_of(name, ranks)
    assert verdict.fits == fits
    assert len(verdict.largest) == 3
    assert bool(verdict.changes) != fits


def test_the_15b_guide_has_the_figures_of_the_verdict() -> None:
    guide = (CONFIGS.parent / "docs/guides/15b.md").read_text(encoding="utf-8")
    on_host = verdict_of("15b_k16", 128, "outer.state_device=cpu")
    more_ranks = verdict_of("15b_k16", 256)
    for verdict in (verdict_of("15b_k16", 128), on_host, more_ranks):
        assert human_bytes(verdict.needed) in guide


def test_changes_of_a_verdict_keep_what_they_promise() -> None:
    verdict = verdict_of("3.1b_muloco_k16", 16)
    by_words = {change.words: change.needed for change in verdict.changes}
    assert by_words["outer.state_device=cpu"] < verdict.needed
    on_host = verdict_of("3.1b_muloco_k16", 16, "outer.state_device=cpu")
    assert (on_host.fits, on_host.needed) == (False, by_words["outer.state_device=cpu"])
    assert verdict_of("3.1b_muloco_k16", 64).needed == by_words["on 64 ranks"]
    assert verdict_of("3.1b_muloco_k16", 64).fits
    assert sorted(by_words.values()) == list(by_words.values())
    # A microbatch of one sequence is not made smaller.
    few = verdict_of("15b_k16", 128, gpu=Device("NVIDIA A100-SXM4-40GB", 40 * 10**9))
    assert "training.micro_batch_size" not in " ".join(change.words for change in few.changes)


def test_a_verdict_depends_on_the_gpu() -> None:
    for words, name in (("A100 40GB", "NVIDIA A100-SXM4-40GB"), ("h200", "NVIDIA H200")):
        assert gpu_by_name(words).device == name
    large = Device("NVIDIA H200", gpu_by_name("H200").memory_gb * 10**9)
    assert verdict_of("15b_k16", 128, gpu=large).fits
    with pytest.raises(ConfigError, match="not in the table of accelerators: NVIDIA A100"):
        gpu_by_name("H900")


def test_the_plan_shows_the_verdict() -> None:
    config = load_config(CONFIGS / "3.1b_muloco_k16.yaml")
    text = render_plan(config, topology_of(config, 16), GPU_80GB)
    for words in ("does not fit", "largest: activations", "fits with", "outer.state_device=cpu"):
        assert words in text
    assert "verdict" not in render_plan(config, topology_of(config, 16))


def test_a_run_that_does_not_fit_is_refused_unless_it_says_otherwise() -> None:
    config = load_config(CONFIGS / "3.1b_muloco_k16.yaml")
    topology = topology_of(config, 16)
    with pytest.raises(ConfigError, match="check_memory: does not fit") as caught:
        build.require_memory(config, topology, GPU_80GB)
    assert str(caught.value) == refusal(
        judge(config, topology, memory_plan(config, topology), GPU_80GB)
    )
    build.require_memory(config, topology, None)  # on a CPU
    unchecked = load_config(CONFIGS / "3.1b_muloco_k16.yaml", ["training.check_memory=false"])
    build.require_memory(unchecked, topology, GPU_80GB)


# ---- microbatches in flight ----------------------------------------------------------------------


def in_flight(config: RunConfig, topology: Topology) -> list[int]:
    return [
        stage_activations(config, topology, stage, accelerator=True).in_flight
        for stage in range(topology.pipeline)
    ]


def test_earlier_stages_hold_more_microbatches() -> None:
    path, pipeline = CONFIGS / "15b_dp_muon.yaml", "parallel.pipeline_model_parallel_size=3"
    many = load_config(path, [pipeline])
    assert in_flight(many, topology_of(many, 12)) == [3, 2, 1]
    one = load_config(
        path, [pipeline, "training.global_batch_size=2", "training.micro_batch_size=2"]
    )
    assert in_flight(one, topology_of(one, 12)) == [1, 1, 1]


def test_document_masks_grow_with_the_square_of_the_sequence() -> None:
    path = CONFIGS / "15b_k16.yaml"
    short, long = (
        load_config(
            path,
            [
                f"model.seq_length={length}",
                "training.global_batch_size=4096",
                "model.attention_impl=dense",
            ],
        )
        for length in (2048, 4096)
    )
    masks = [
        stage_activations(c, topology_of(c, 1024), 0, accelerator=True).layers.mask
        for c in (short, long)
    ]
    assert masks[0] == 27 * 2 * 2048**2  # 27 layers of a stage, in bf16
    assert masks[1] == 4 * masks[0]
    for other in ("data.mask_document_boundaries=false", "model.attention_impl=varlen"):
        off = load_config(path, [other])
        assert stage_activations(off, topology_of(off, 1024), 0, accelerator=True).layers.mask == 0


def test_fused_swiglu_keeps_two_copies_less() -> None:
    path = CONFIGS / "15b_k16.yaml"
    fused, plain = (
        stage_activations(config, topology_of(config, 1024), 0, accelerator=True).layers.mlp
        for config in (load_config(path), load_config(path, ["training.fusions=none"]))
    )
    assert plain - fused == 27 * 2 * (2 * 2048 * 12672 // 4)  # layers, copies, bf16 of a tp rank


# ---- temporary buffers of the inner step ---------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 192), (192, 64), (128, 128)])
def test_newton_schulz_allocates_what_is_planned(
    rows: int, columns: int, dtype: Literal["bf16", "fp32"]
) -> None:
    from megatron_muloco.config.inner import MuonConfig

    config = MuonConfig(ns_dtype=dtype, exchange_dtype=dtype, ns_impl="plain")
    stacked = torch.randn(3, rows, columns).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    with AllocatedBytes() as counted:
        Muon(config).update(stacked)
    matrix = MuonMatrix("m", "m", "up", ((0, rows),), columns, 0, 1, 1)
    width = 2 if dtype == "bf16" else 4
    planned = newton_schulz_bytes([matrix] * 3, wire_bytes=width, value_bytes=width)
    assert planned == pytest.approx(counted.most, rel=0.05)


def test_adamw_holds_the_root_of_all_second_moments_at_once() -> None:
    values = [torch.ones(1000, requires_grad=True), torch.ones(24, 24, requires_grad=True)]
    for value in values:
        value.grad = torch.ones_like(value)
    optimizer = torch.optim.AdamW(values, foreach=True)
    optimizer.step()  # makes the moments
    with AllocatedBytes() as counted:
        optimizer.step()
    assert counted.most == pytest.approx(4 * (1000 + 576), rel=0.05)


# ---- communicators -------------------------------------------------------------------------------


def test_groups_of_one_rank_have_no_communicator() -> None:

    config = load_config(CONFIGS / "15b_dp_muon.yaml")
    assert communicator_bytes(config, Topology(1, 1, 1, 1)) == 0
    two = communicator_bytes(config, Topology(1, 1, 1, 2))
    # data parallel, stage and replica are one group of the same ranks; the world is another
    assert two == 2 * 544_000_000
    assert communicator_bytes(config, Topology(1, 2, 1, 2)) == 2 * 544_000_000 + 2 * 688_000_000
