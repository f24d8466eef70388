"""Evaluation divided over replicas: the loss that one replica would compute alone, bit for bit."""

from typing import Any

import pytest
import torch

from megatron_muloco.data.batches import BatchSource
from megatron_muloco.data.sampler import BatchLayout
from megatron_muloco.training.forward import anchor_in_place, evaluate
from tests.support.spawn import run_ranks
from tests.support.tiny_models import TinyRun, finish_tiny, made_up_tokens, start_tiny, tiny_config

# World, replicas, sizes inside a replica; held-out sequences of a batch, and batches. In most of
# them the replicas' shares of the forward passes differ, and in one a replica has none.
CASES: dict[str, tuple[int, int, dict[str, int], tuple[int, int]]] = {
    "k2": (2, 2, {}, (5, 3)),
    "k3": (3, 3, {}, (5, 2)),
    "k3-one-pass": (3, 3, {}, (1, 1)),
    "k2-dp2": (4, 2, {}, (6, 3)),
    "k2-tp2": (4, 2, {"tensor_model_parallel_size": 2}, (3, 1)),
    "k2-pp2": (4, 2, {"pipeline_model_parallel_size": 2}, (5, 1)),
}


class HeldOut:
    """Made-up samples that training does not see."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = made_up_tokens(50_000 + index, 17, 60)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "position_ids": torch.arange(16),
            "loss_mask": torch.ones(16),
        }


def alone(run: TinyRun, source: BatchSource, steps: int) -> float:
    """The loss from all forward passes on this replica, batch by batch."""
    count, groups = source.layout.num_microbatches, run.groups
    total = torch.zeros(())
    with torch.no_grad(), anchor_in_place(run.optimizer):
        for step in range(1, steps + 1):
            batches = (source.microbatch(step, index) for index in range(count))
            total = total + run.forward(batches, count, forward_only=True)
    mine = groups.on_last_stage and groups.coords.tp == 0
    loss = (total if mine else torch.zeros(())).double()
    torch.distributed.all_reduce(loss, group=groups.replica)
    return float(loss) / (groups.topology.data * count * steps)


def evaluate_both_ways(
    replicas: int, parallel: dict[str, int], samples: int, steps: int
) -> tuple[float, float, int, bool]:
    """The two losses, this rank's forward passes, and whether training was left as it was."""
    config = tiny_config(parallel={"num_replicas": replicas, **parallel}, training=BATCH)
    run = start_tiny(config).train(3)  # a round of 2 steps: replicas and anchor differ
    before, groups = run.masters(), run.groups
    layout = BatchLayout(samples, 1, groups.topology.data, micro_batch_size=1)
    source: Any = BatchSource(HeldOut(), layout, replica=0, dp_rank=groups.coords.dp, steps=steps)
    expected, read = alone(run, source, steps), []
    microbatch = source.microbatch
    source.microbatch = lambda *place: read.append(place) or microbatch(*place)
    found = evaluate(run.forward, run.optimizer, source, groups, steps=steps)
    kept = all(torch.equal(before[name][1], each) for name, (_, each) in run.masters().items())
    finish_tiny()
    return expected, found, len(read), kept


BATCH = {"global_batch_size": 12}


@pytest.mark.parametrize("case", CASES)
def test_replicas_share_the_forward_passes_and_get_the_loss_of_one(case: str) -> None:
    world, replicas, parallel, (samples, steps) = CASES[case]
    by_rank = run_ranks(evaluate_both_ways, world, replicas, parallel, samples, steps)
    dp = 2 if case == "k2-dp2" else 1
    passes = samples // dp * steps
    assert len({found for _, found, _, _ in by_rank}) == 1
    for rank, (expected, found, read, kept) in enumerate(by_rank):
        assert found == expected
        assert kept
        replica = rank // (world // replicas)
        assert read == passes * (replica + 1) // replicas - passes * replica // replicas
