"""Every sample of a step is read once, however the step is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator as megatron_batches

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import batch_schedule
from megatron_muloco.data.sampler import BatchLayout, RunLayout, run_layout, samples_of_step, share
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

# Newer versions of Megatron have dropped this class.
MEGATRON = getattr(megatron_batches, "RampupBatchsizeNumMicroBatchesCalculator", None)
CONFIG = load_config("configs/cpu_k2.yaml")
SIZES = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def layouts(draw, batch=None):
    """A layout; with ``batch``, one of those that the batch can be cut into."""
    if batch is None:
        cut = [draw(SIZES) for _ in range(4)]
        return BatchLayout(cut[0] * cut[1] * cut[2] * cut[3], *cut[:3])
    divisors = [d for d in range(1, batch + 1) if batch % d == 0]
    replicas = draw(st.sampled_from(divisors))
    ranks = draw(st.sampled_from([d for d in divisors if (batch // replicas) % d == 0]))
    micro = draw(st.sampled_from([d for d in divisors if (batch // replicas // ranks) % d == 0]))
    return BatchLayout(batch, replicas, ranks, micro)


def read(layout, step):
    """Everything all ranks read at a step, in the order of ranks and microbatches."""
    return [
        index
        for replica in range(layout.num_replicas)
        for dp_rank in range(layout.data_parallel_size)
        for microbatch in range(layout.num_microbatches)
        for index in layout.indices(step, replica, dp_rank, microbatch)
    ]


@given(layouts(), st.integers(1, 1000))
def test_ranks_partition_the_samples_of_a_step(layout, step):
    assert read(layout, step) == list(samples_of_step(step, layout.global_batch_size))


@given(st.data(), st.sampled_from([8, 12, 16]))
def test_changing_the_cut_between_steps_neither_repeats_nor_skips(data, batch):
    steps = data.draw(st.lists(layouts(batch), min_size=1, max_size=6))
    samples = [index for step, layout in enumerate(steps, 1) for index in read(layout, step)]
    assert samples == list(range(len(steps) * batch))


@given(st.lists(layouts(), min_size=1, max_size=6))
def test_changing_the_batch_between_steps_neither_repeats_nor_skips(steps):
    samples = []
    for step, layout in enumerate(steps, 1):
        resumed = RunLayout(((1, layout),)).resumed(step - 1, len(samples))
        samples += read(resumed.at(step), step)
    assert samples == list(range(sum(layout.global_batch_size for layout in steps)))


@given(layouts(), st.integers(0, 9), st.integers(0, 999))
def test_held_out_data_has_no_offset(layout, step, consumed):
    resumed = RunLayout(((1, layout),)).resumed(step, consumed)
    assert resumed.at(step).held_out() == layout.held_out()


@pytest.mark.skipif(MEGATRON is None, reason="this Megatron has no such ramp-up")
@given(
    start=st.integers(1, 6),
    increment=st.integers(1, 4),
    increments=st.integers(1, 6),
    samples=st.integers(1, 400),
    consumed=st.integers(0, 1000),
)
def test_a_ramp_reads_every_sample_once_with_megatrons_batches(
    start, increment, increments, samples, consumed
):
    batch = start + increments * increment
    changes = {
        "global_batch_size": batch, "micro_batch_size": 1,
        "rampup_batch_size": (start, increment, samples),
    }  # fmt: skip
    training = CONFIG.training.model_copy(update=changes)
    theirs = MEGATRON(batch, 1, 1, False, 1, start, increment, samples)
    batches = batch_schedule(training)
    run = run_layout(CONFIG.model_copy(update={"training": training}), Topology(1, 1, 1, 1))
    read_so_far = []
    for step in range(1, 30):
        theirs.update(len(read_so_far), False)
        assert run.at(step).global_batch_size == theirs.get_current_global_batch_size()
        read_so_far += read(run.at(step), step)
        assert run.consumed(step) == batches.consumed(step) == len(read_so_far)
        assert batches.steps(len(read_so_far)) == step
        assert batches.steps(len(read_so_far) - 0.5) == step
    assert read_so_far == list(range(len(read_so_far)))
    later = run.resumed(7, consumed)
    assert read(later.at(8), 8)[0] == later.consumed(7) == consumed


@given(layouts(), st.integers(1, 100))
def test_each_replica_and_each_rank_reads_one_block(layout, step):
    for replica in range(layout.num_replicas):
        for dp_rank in range(layout.data_parallel_size):
            passes = [
                layout.indices(step, replica, dp_rank, microbatch)
                for microbatch in range(layout.num_microbatches)
            ]
            assert all(len(indices) == layout.micro_batch_size for indices in passes)
            assert all(a.stop == b.start for a, b in pairwise(passes))


def test_k_replicas_read_what_one_replica_with_k_times_the_ranks_reads():
    many, one = BatchLayout(32, 4, 2, 2), BatchLayout(32, 1, 8, 2)
    for rank in range(8):
        for microbatch in range(2):
            assert many.indices(7, rank // 2, rank % 2, microbatch) == one.indices(
                7, 0, rank, microbatch
            )


def test_every_replica_evaluates_on_all_samples():
    layout = BatchLayout(16, 4, 2, 1)
    assert read(layout.held_out(), 1) == read(layout, 1) == list(range(16))
    assert layout.held_out().data_parallel_size == layout.data_parallel_size


@pytest.mark.parametrize("sizes", [(10, 4, 1, 1), (8, 2, 2, 4), (0, 1, 1, 1), (8, 0, 1, 1)])
def test_uneven_batch_is_refused_with_the_whole_product(sizes):
    with pytest.raises(ConfigError, match=f"global_batch_size {sizes[0]} is not a multiple of"):
        BatchLayout(*sizes)


@pytest.mark.parametrize(
    "place", [(0, 0, 0, 0), (1, 2, 0, 0), (1, 0, 2, 0), (1, 0, 0, 2), (1, -1, 0, 0)]
)
def test_places_outside_the_layout_are_refused(place):
    with pytest.raises(ValueError, match=r"counted from 1|is not in"):
        BatchLayout(8, 2, 2, 1).indices(*place)


@pytest.mark.parametrize(("count", "parts"), [(12, 3), (15, 2), (7, 4), (2, 3), (0, 2), (5, 1)])
def test_shares_divide_a_count(count: int, parts: int) -> None:
    shares = [share(count, index, parts) for index in range(parts)]
    assert [each for part in shares for each in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
