"""The plan's bytes add up, follow the sharding rules, and the report says what it assumes."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_muloco.comm.costs import all_reduce_cost, chunked_all_reduce_cost
from megatron_muloco.config import RunConfig, load_config, topology_of
from megatron_muloco.config.derived import parameter_counts, sketch_width
from megatron_muloco.config.inner import MuonConfig
from megatron_muloco.params import ParamInfo
from megatron_muloco.planning import memory_plan, render_plan, traffic_plan
from megatron_muloco.planning.layout import (
    best_split,
    by_fragment,
    cut_buffer,
    rank_shards,
    stage_flops,
    stage_parameters,
    stage_shards,
    stage_slices,
)
from megatron_muloco.planning.memory import OuterMemory
from megatron_muloco.planning.report import human_bytes, human_count
from megatron_muloco.planning.traffic import round_bytes
from megatron_muloco.topology import Coords, Topology

CONFIGS = Path(__file__).parents[2] / "configs"
CPU = CONFIGS / "cpu_k2.yaml"
HEADS = ["model.num_attention_heads=4", "training.global_batch_size=64"]


def config_of(*overrides: str) -> RunConfig:
    return load_config(CPU, [*HEADS, *overrides])


@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    untied=st.booleans(),
)
@settings(deadline=None)
def test_slices_hold_the_model_once(tp: int, pp: int, untied: bool) -> None:
    config = config_of(f"model.untie_embeddings_and_output_weights={str(untied).lower()}")
    topology, counts = Topology(1, tp, pp, 1), parameter_counts(config.model)
    slices = stage_slices(config, topology)
    assert len(slices) == pp
    assert tp * sum(part.matrices for part in slices) == counts.matrices
    # a tied head is copied to the last stage only where that is another rank
    copies = (pp > 1 and not untied) * counts.embedding // tp
    tables = (counts.embedding + counts.output) // tp
    assert sum(part.vectors for part in slices) == tables + counts.norms + copies
    # what the outer groups exchange covers every parameter exactly once
    exchanged = sum(
        info.numel
        for stage in range(pp)
        for rank in range(tp)
        for info in stage_parameters(config, topology, stage=stage, tp_rank=rank)
        if info.is_primary
    )
    assert exchanged == counts.total


@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=12),
    ranks=st.integers(1, 9),
    bucket=st.sampled_from([None, 1, 300, 2000]),
    alone=st.sets(st.integers(0, 11), max_size=2),
)
def test_shards_partition_every_parameter(
    sizes: list[int], ranks: int, bucket: int | None, alone: set[int]
) -> None:
    parameters = [ParamInfo.from_name(str(i), (size,), None) for i, size in enumerate(sizes)]
    cut = cut_buffer(
        parameters, ranks=ranks, bucket_elements=bucket, alone={str(index) for index in alone}
    )
    assert len(cut) == ranks
    for param in parameters:
        ranges = sorted((s.start, s.end) for shards in cut for s in shards if s.param is param)
        edges = [0, *(end for _, end in ranges)]
        assert [start for start, _ in ranges] == edges[:-1]
        assert edges[-1] == param.numel
    for shards in cut:
        order = [int(shard.name) for shard in shards]
        assert order == sorted(set(order))


def test_a_fragment_may_lie_on_few_data_parallel_ranks() -> None:
    config = config_of("outer.fragments.count=4", "model.num_layers=4")
    shards = stage_shards(config, Topology(2, 1, 1, 8), stage=0, tp_rank=0)
    held = [[sum(s.numel for s in part) for part in by_fragment(config, each)] for each in shards]
    # Megatron cuts the stage as a whole, not every parameter: some ranks have one fragment only
    assert any(max(parts) == sum(parts) for parts in held)
    assert sum(map(sum, held)) == parameter_counts(config.model).total


def test_one_rank_holds_everything() -> None:
    config = config_of("parallel.num_replicas=1")
    memory = memory_plan(config, Topology(1, 1, 1, 1))
    counts = parameter_counts(config.model)
    assert memory.weights == memory.gradients == 4 * counts.total
    assert memory.masters == 0  # fp32 parameters are their own masters
    assert memory.inner_state == 4 * (counts.matrices + 2 * counts.vectors)
    assert memory.anchor == memory.outer_momentum == 4 * counts.total
    # the pseudogradient in the reducer's flat buffer, also where there is nobody to send it to
    assert memory.outer_step == OuterMemory(1, 0, 0, 0, 0, 4 * counts.total, 0)
    assert memory.device == (
        memory.weights
        + memory.gradients
        + memory.inner_state
        + memory.exchange
        + memory.outer_state
        + 4 * counts.total
    )


def test_bf16_halves_weights_and_adds_masters() -> None:
    topology = Topology(2, 1, 1, 1)
    full = memory_plan(config_of(), topology)
    half = memory_plan(config_of("training.precision=bf16"), topology)
    assert 2 * half.weights == full.weights
    assert half.masters == full.weights
    assert half.gradients == full.gradients
    thin = memory_plan(
        config_of("training.precision=bf16", "training.accumulate_dtype=bf16"), topology
    )
    assert 2 * thin.gradients == full.gradients


def test_adamw_has_a_second_moment_for_matrices() -> None:
    muon = config_of()
    adamw = config_of("inner.kind=adamw")
    topology = Topology(2, 1, 1, 1)
    difference = memory_plan(adamw, topology).inner_state - memory_plan(muon, topology).inner_state
    assert difference == 4 * parameter_counts(muon.model).matrices


@pytest.mark.parametrize("data", [1, 2, 4])
def test_data_parallel_ranks_share_state_but_not_weights(data: int) -> None:
    config = config_of("training.precision=bf16", "training.micro_batch_size=1")
    alone = memory_plan(config, Topology(2, 1, 1, 1))
    shared = memory_plan(config, Topology(2, 1, 1, data))
    assert (shared.weights, shared.gradients) == (alone.weights, alone.gradients)
    # a bucket ends at a multiple of lcm(dp, 128), a parameter starts at one of 64
    parameters = stage_parameters(config, Topology(2, 1, 1, 1), stage=0, tp_rank=0)
    padding = 4 * (64 * len(parameters) + 128)
    for name in ("masters", "anchor", "outer_momentum"):
        share = getattr(alone, name) // data
        assert share <= getattr(shared, name) <= share + padding
    for name in ("buffers", "temporary"):
        share = getattr(alone.outer_step, name) // data
        assert share <= getattr(shared.outer_step, name) <= share + padding
    # a rank that holds vector parameters has two moments of them
    moments = parameter_counts(config.model).matrices + 2 * parameter_counts(config.model).vectors
    assert 4 * moments // data <= shared.inner_state <= 8 * parameter_counts(config.model).total


def test_moments_of_data_parallel_ranks_add_up() -> None:
    config = config_of("inner.kind=adamw", "training.micro_batch_size=1")
    topology = Topology(2, 1, 1, 4)
    shards = stage_shards(config, topology, stage=0, tp_rank=0)
    most = max(sum(shard.numel for shard in each) for each in shards)
    assert memory_plan(config, topology).inner_state == 8 * most


def test_outer_state_can_live_on_the_host() -> None:
    topology = Topology(2, 1, 1, 1)
    device = memory_plan(config_of(), topology)
    host = memory_plan(config_of("outer.state_device=cpu"), topology)
    assert host.host == device.outer_state
    assert host.device + host.host == device.device
    assert device.host == 0


def test_what_has_no_outer_step_needs_no_state() -> None:
    none = memory_plan(
        config_of("outer=null", "outer.kind=none", "parallel.num_replicas=1"), Topology(1, 1, 1, 1)
    )
    assert (none.anchor, none.outer_momentum) == (0, 0)
    assert none.outer_step == OuterMemory(0, 0, 0, 0, 0, 0, 0)
    average = memory_plan(config_of("outer=null", "outer.kind=average"), Topology(2, 1, 1, 1))
    assert average.anchor > 0
    assert average.outer_momentum == average.anchor  # kept whatever the outer momentum is


def outer_step_of(*overrides: str) -> OuterMemory:
    config = config_of("model.num_layers=4", *overrides)
    return memory_plan(config, Topology(2, 1, 1, 1)).outer_step


def test_fragments_and_overlap_need_what_is_in_flight() -> None:
    whole, parts = outer_step_of(), outer_step_of("outer.fragments.count=4")
    assert (whole.in_flight, parts.in_flight) == (1, 1)
    assert whole.buffers == parts.buffers == 0  # training waits, and they are released
    assert whole.at_launch == parts.at_launch == 0
    late = outer_step_of("outer.fragments.count=4", "outer.overlap_steps=1")
    assert late.in_flight == 1
    assert late.buffers == late.at_launch < whole.temporary / 2  # the embedding is in one of four
    # The run ends within a round: fragments average, from pseudogradients and a buffer.
    assert parts.temporary == 2 * late.buffers
    assert late.temporary == 0  # nothing is in flight then
    # offsets 2, 5, 7, 10: never more than two launches within four steps, three within five
    for steps, flights in ((3, 2), (4, 2), (5, 2), (6, 3)):
        more = outer_step_of(
            "outer.fragments.count=4", f"outer.overlap_steps={steps}", "outer.max_in_flight=4"
        )
        assert more.in_flight == flights
        assert more.buffers == flights * late.buffers
        assert more.buffers / 2 < more.at_launch <= more.buffers  # the others are smaller


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 3), (4, 2, 1)])
def test_exchange_memory_is_that_of_the_exchange(
    sizes: tuple[int, int, int], wire: Literal["fp32", "bf16"]
) -> None:
    import torch

    from megatron_muloco.optim.exchange import ShardExchange
    from megatron_muloco.optim.parameter_table import assign
    from megatron_muloco.params import ParamInfo
    from megatron_muloco.planning.layout import stage_matrices
    from megatron_muloco.planning.memory import exchange_bytes
    from tests.support.scattered import NoTransport, cut_evenly

    tensor, pipeline, data = sizes
    config = config_of(
        "model.hidden_size=16",
        "model.kv_channels=4",
        "model.ffn_hidden_size=24",
        f"inner.muon.exchange_dtype={wire}",
    )
    topology = Topology(1, tensor, pipeline, data)
    matrices = stage_matrices(config, topology, stage=0, accelerator=False)
    rows = {matrix.param: 0 for matrix in matrices}
    for matrix in matrices:
        rows[matrix.param] += matrix.local_shape[0]
    params = [
        ParamInfo.from_name(name, (rows[name], matrix.local_columns), matrix.partition_dim)
        for name, matrix in {matrix.param: matrix for matrix in matrices}.items()
    ]
    layout = cut_evenly(params, tensor, data)
    kept = [
        ShardExchange(
            matrices,
            assign(matrices, len(layout)).owners,
            layout,
            rank=rank,
            transport=NoTransport(),
            wire_dtype=torch.float32 if wire == "fp32" else torch.bfloat16,
            buckets=4,
        ).buffer_bytes
        for rank in range(len(layout))
    ]
    # One element more or less is held where shards are not all of one size: 4 bytes, 4 on the wire.
    assert abs(exchange_bytes(config, topology) - max(kept)) <= 8
    assert exchange_bytes(config_of("inner.kind=adamw"), topology) == 0


def test_a_narrow_wire_needs_more_memory_than_it_saves() -> None:
    wide, narrow = outer_step_of(), outer_step_of("outer.compression.wire_dtype=bf16")
    # Three copies of half the size, and the chunks of both replicas in fp32, before and after they
    # are weighed; an all-reduce works in one buffer.
    assert narrow.temporary == (3 * 0.5 + 2) * wide.temporary


def test_the_plan_shows_fragments_and_overlap() -> None:
    overrides = ["outer.fragments.count=3", "outer.overlap_steps=1"]
    text = render_plan(load_config(CPU, overrides))
    for words in (
        "sequential layers, a launch every 3 or 4 steps",
        "1 step  from launch to apply; 0.5 of the local value is kept",
        "copies at launch",
        "to 1 other replica, fp32, in 3 launches",
    ):
        assert words in text
    assert "the progress since the launch is added" in render_plan(
        load_config(CPU, [*overrides, "outer.apply=additive"])
    )
    blocking = render_plan(load_config(CPU))
    assert "training waits for every launch" in blocking
    assert "copies at launch" not in blocking


def test_one_rank_per_replica_sends_nothing_inside() -> None:
    traffic = traffic_plan(config_of(), Topology(2, 1, 1, 1))
    assert traffic.inner_step == 0
    assert traffic.outer_per_rank == traffic.outer_per_replica > 0


def test_data_parallel_traffic_follows_the_ring() -> None:
    config = config_of("training.precision=bf16", "training.micro_batch_size=1")
    elements = stage_slices(config, Topology(2, 1, 1, 4))[0].total
    traffic = traffic_plan(config, Topology(2, 1, 1, 4))
    assert traffic.gradient_reduce == elements * 4 * 3 // 4
    assert traffic.parameter_gather == elements * 2 * 3 // 4
    matrices = parameter_counts(config.model).matrices
    # collect and return, each rank's quarter in bf16, three quarters of it to others
    assert traffic.muon_exchange == 2 * (matrices // 4) * 2 * 3 // 4
    assert (traffic.tensor_parallel, traffic.pipeline) == (0, 0)


def test_context_parallel_ranks_send_keys_and_values() -> None:
    config = config_of("parallel.context_parallel_size=4", "model.seq_length=64")
    topology = Topology(2, 1, 1, 1, 4)
    one, model = config_of("model.seq_length=64"), config.model
    traffic = traffic_plan(config, topology)
    tokens = config.training.global_batch_size // 2 * model.seq_length
    values = 2 * model.query_groups * model.kv_channels
    # three quarters of all keys and values, and of their gradients, in fp32
    assert traffic.context_parallel == model.num_layers * 2 * tokens * values * 4 * 3 // 4
    assert traffic_plan(one, Topology(2, 1, 1, 4)).context_parallel == 0
    # masters and state are divided as over data-parallel ranks; activations are not
    plan = memory_plan(config, topology)
    as_data = memory_plan(
        config_of("model.seq_length=64", "training.micro_batch_size=1"), Topology(2, 1, 1, 4)
    )
    assert plan == replace(as_data, activations=plan.activations)


def test_adamw_exchanges_no_matrices() -> None:
    config = config_of("inner.kind=adamw", "training.micro_batch_size=1")
    assert traffic_plan(config, Topology(2, 1, 1, 4)).muon_exchange == 0


def test_exchange_dtype_is_what_is_asked_for() -> None:
    topology = Topology(2, 1, 1, 4)
    narrow = config_of("inner.muon.exchange_dtype=bf16", "training.micro_batch_size=1")
    wide = config_of("training.micro_batch_size=1")
    assert (
        2 * traffic_plan(narrow, topology).muon_exchange
        == traffic_plan(wide, topology).muon_exchange
    )


@pytest.mark.parametrize("accelerator", [True, False])
def test_auto_dtypes_have_one_rule(accelerator: bool) -> None:
    on_device = "bf16" if accelerator else "fp32"
    for compute, wire in itertools.product(("auto", "bf16", "fp32"), repeat=2):
        muon = MuonConfig(ns_dtype=compute, exchange_dtype=wire)
        expected = on_device if compute == "auto" else compute
        assert muon.compute_dtype(accelerator=accelerator) == expected
        assert muon.wire_dtype(accelerator=accelerator) == (expected if wire == "auto" else wire)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_plan_says_which_device_it_assumes(precision: str) -> None:
    device = {"bf16": "accelerators", "fp32": "CPUs"}[precision]
    assert f"for {device}, as training.precision is {precision}" in render_plan(
        config_of(f"training.precision={precision}")
    )


@given(st.integers(1, 10_000), st.integers(2, 16), st.integers(0, 5))
def test_a_mean_sends_two_copies_less_two_shares(
    elements: int, replicas: int, metadata: int
) -> None:
    ideal = 2 * (replicas - 1) / replicas * elements
    row = 1 + metadata
    full = all_reduce_cost(elements, replicas, row).sent[0]
    half = chunked_all_reduce_cost(elements, replicas, row, value_bytes=2).sent[0]
    # at most one element of padding per chunk, three in bf16, and a row per replica, both ways
    assert 4 * ideal <= full <= 4 * ideal + 2 * (replicas - 1) * 4 * (row + 1)
    assert 2 * ideal <= half <= 2 * ideal + (replicas - 1) * (4 * row + 3 * 4)
    assert all_reduce_cost(elements, 1, row).sent == (0,)


def test_replicas_send_the_model_whatever_the_layout() -> None:
    config = config_of("training.micro_batch_size=1")
    total = parameter_counts(config.model).total
    for topology in (Topology(2, 1, 1, 1), Topology(2, 2, 1, 1), Topology(2, 2, 2, 2)):
        sent = traffic_plan(config, topology).outer_per_replica
        # K = 2: each replica sends its parameters once; each rank 2 rows (weight, norm, one console
        # line of four numbers, the sketch) and at most one element of padding per chunk
        row = 1 + 1 + 4 + sketch_width(config, topology)
        ranks = topology.replica_size
        assert 4 * total + ranks * 2 * row * 4 <= sent
        assert sent <= 4 * total + ranks * 2 * (row + 3) * 4


def test_fragments_send_the_same_parameters_in_more_launches() -> None:
    layout = Topology(2, 1, 2, 1)

    def sent_by_stages(config: RunConfig, *, sketch: bool) -> list[int]:
        shards = [rank_shards(config, layout, Coords(0, stage, 0, 0, 0)) for stage in (0, 1)]
        return [round_bytes(config, layout, each, sketch=sketch)[0] for each in shards]

    sent = {}
    for count in (1, 2, 4):
        config = config_of(f"outer.fragments.count={count}", "model.num_layers=4")
        sent[count] = sent_by_stages(config, sketch=False)
        with_sketch = sent_by_stages(config, sketch=True)
        # K = 2: two rows a launch; a stage without a share of a fragment has nothing to sketch
        launches = {1: 1, 2: 1, 4: 2}[count]
        extra = launches * 2 * sketch_width(config, layout) * 4
        assert with_sketch == [bytes_ + extra for bytes_ in sent[count]]
    # rows of six numbers, two a launch, both ways over K = 2; padding of one element at most
    for more in (2, 4):
        for stage in (0, 1):
            rows = (more - 1) * 2 * 6 * 4
            assert 0 <= sent[more][stage] - sent[1][stage] - rows <= more * 4


def test_a_sketch_has_4096_values_of_a_replica_but_256_of_a_rank() -> None:
    config = config_of()
    widths = [sketch_width(config, Topology(2, 1, 1, dp)) for dp in (1, 4, 512)]
    assert widths == [4096, 1024, 256]
    assert sketch_width(config, Topology(1, 1, 1, 1)) == 0
    assert sketch_width(config_of("monitor.pseudogradient_interval=0"), Topology(2, 1, 1, 1)) == 0


def test_the_15b_plan_says_what_the_paper_says() -> None:
    config = load_config(CONFIGS / "15b_k16.yaml")
    text = render_plan(config, topology_of(config, 1024))
    for words in (
        "1,024  16 replicas x tp 4 x pp 2 x dp 8\n",
        "sequences: 32 microbatches of 1 on each of 8 data-parallel ranks",
        "bf16, pipeline stage 0, which needs most",
        "to 15 other replicas, fp32",
        "15.23B",
        "15,229,089,792",
        "36,330",
        "304.8B",
        "5e-05",
        "1,211",
        "500 steps of warm-up",
    ):
        assert words in text
    assert "smallest world" not in text
    assert max(len(line) for line in text.splitlines()) <= 110
    assert len(text.splitlines()) <= 60


def test_an_assumed_world_is_said() -> None:
    assert "the smallest world of this config" in render_plan(load_config(CPU))


def test_one_of_something_is_said_as_one() -> None:
    text = render_plan(load_config(CPU))
    for words in ("sequences: one microbatch of 8\n", "to 1 other replica, fp32\n"):
        assert words in text
    assert "pipeline stage" not in text  # there is no other


def test_steps_after_the_last_round_are_a_warning() -> None:
    text = render_plan(load_config(CPU, ["training.train_iters=257"]))
    assert "7 steps" in text
    assert "plain mean of the replicas" in text
    assert "warning" not in render_plan(load_config(CPU))


def test_plain_data_parallelism_has_no_rounds() -> None:
    text = render_plan(load_config(CONFIGS / "15b_dp_muon.yaml"))
    assert "data parallelism, no outer step" in text
    assert "each round" not in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(15_229_089_792, "15.23B"), (304_758_128_640, "304.8B"), (999, "999"), (1_500, "1.50k")],
)
def test_counts_are_readable(number: int, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1_500, "1.50 kB"), (3.81e9, "3.81 GB")]
)
def test_sizes_are_readable(number: float, text: str) -> None:
    assert human_bytes(number) == text


# ---- pipeline stages ----------------------------------------------------------------------


@given(
    layers=st.integers(2, 24),
    stages=st.integers(2, 5),
    vocabulary=st.sampled_from([128, 4096, 200_000]),
)
@settings(deadline=None)
def test_the_best_split_is_one_that_the_config_accepts(
    layers: int, stages: int, vocabulary: int
) -> None:
    if layers < stages:
        return
    keys = [f"model.num_layers={layers}", f"model.vocab_size={vocabulary}"]
    one = config_of(*keys)
    topology = Topology(2, 1, stages, 1)
    best = best_split(one, topology)
    config = config_of(
        *keys,
        f"parallel.pipeline_model_parallel_size={stages}",
        f"parallel.num_layers_in_first_pipeline_stage={best.first}",
        f"parallel.num_layers_in_last_pipeline_stage={best.last}",
    )
    flops = stage_flops(config, topology)
    # the stages compute what the model does, and the loss; the split keeps the sum
    assert sum(flops) == pytest.approx(sum(stage_flops(one, Topology(2, 1, 1, 1))))
    assert max(flops) * stages / sum(flops) == pytest.approx(best.balance)
    if layers % stages == 0:
        equal = stage_flops(one, topology)
        assert best.balance <= max(equal) * stages / sum(equal) * (1 + 1e-9)
    assert f"{best.balance:.3f}  this one" in render_plan(config, topology)


def test_the_plan_says_which_keys_balance_the_stages() -> None:
    config = config_of("model.num_layers=12", "parallel.pipeline_model_parallel_size=2")
    plan = render_plan(config)
    best = best_split(config, Topology(2, 1, 2, 1))
    assert best.last < best.first == 12 - best.last
    assert f"with num_layers_in_last_pipeline_stage {best.last}\n" in plan
    assert "pipeline stages" not in render_plan(config_of())


def test_recomputed_layers_count_in_the_balance() -> None:
    full = ["training.recompute_granularity=full", "training.recompute_num_layers=1"]
    block = [*full, "training.recompute_method=block"]
    topology = Topology(1, 1, 1, 1)
    plain, selective, first, every = (
        stage_flops(config_of(*keys), topology)[0]
        for keys in ([], ["training.recompute_granularity=selective"], block, full)
    )
    assert plain < selective < first < every < 4 / 3 * plain
