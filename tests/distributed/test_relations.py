"""Relations between whole runs of the real model, schedules and optimizers."""

from functools import partial
from typing import Any

import pytest
import torch

from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.training.build_optimizer import wrap_optimizer
from megatron_muloco.training.forward import ForwardBackward
from tests.support.collectives import counted_collectives
from tests.support.extensions import HeavyBall
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import (
    ADAMW,
    MUON,
    TinyRun,
    finish_tiny,
    same_for_all_replicas,
    start_tiny,
    tiny_config,
)

INNER = {"muon": MUON, "adamw": ADAMW}
AVERAGE = {"kind": "average", "sync_interval": 2}
NO_OUTER = {"kind": "none"}


def own_samples(step: int, groups: Groups, config: RunConfig) -> list[int]:
    """Return samples of which replica 0's do not depend on the number of replicas."""
    size = config.training.global_batch_size // groups.topology.num_replicas // groups.topology.data
    first = 10_000 * groups.coords.replica + (step - 1) * size * groups.topology.data
    return list(range(first + groups.coords.dp * size, first + (groups.coords.dp + 1) * size))


def trained(config: RunConfig, steps: int, assignment: Any = own_samples) -> dict[str, Any]:
    """Train in one rank and return what tests compare."""
    run = start_tiny(config, assignment).train(steps)
    outcome = {
        "losses": run.losses,
        "norms": run.grad_norms,
        "masters": run.masters(),
        "parameters": run.whole_parameters(),
        "anchors": {
            name: anchor.clone()
            for name, anchor in (
                run.optimizer.synchronizer.anchors() if run.optimizer.synchronizer else {}
            ).items()
        },
    }
    finish_tiny()
    return outcome


def config_of(inner: str, replicas: int, per_replica: int = 4, **sections: Any) -> RunConfig:
    """Return a config whose replicas each train on ``per_replica`` samples a step."""
    parallel = {"num_replicas": replicas, **sections.pop("parallel", {})}
    training = {"global_batch_size": per_replica * replicas, **sections.pop("training", {})}
    return tiny_config(inner=INNER[inner], parallel=parallel, training=training, **sections)


@pytest.mark.parametrize("inner", INNER)
def test_one_replica_with_plain_averaging_is_the_inner_optimizer(inner: str) -> None:
    """Relation 1: anchor - 1 * (anchor - local) is local up to one rounding of each difference."""
    (alone,) = run_ranks(trained, 1, config_of(inner, 1, outer=NO_OUTER), 2)
    (averaged,) = run_ranks(trained, 1, config_of(inner, 1, outer=AVERAGE), 2)
    assert alone["losses"] == averaged["losses"]
    for name, (_, local) in alone["masters"].items():
        moved = averaged["masters"][name][1]
        # Both subtractions round to nearest: half a unit of 2^-23 relative each; the weights are
        # below 8 and so are the differences.
        limit = 2.0**-24 * (local.abs() + (moved - local).abs() + 8 * 2.0**-3)
        assert torch.all((moved - local).abs() <= limit), name


@pytest.mark.parametrize("replicas", [2, 4])
@pytest.mark.parametrize("inner", INNER)
def test_replicas_on_the_same_data_are_one_replica(inner: str, replicas: int) -> None:
    """Relation 2: bit for bit, for powers of two, over two rounds."""
    (one,) = run_ranks(trained, 1, config_of(inner, 1), 4, same_for_all_replicas)
    ranks = run_ranks(trained, replicas, config_of(inner, replicas), 4, same_for_all_replicas)
    for rank in ranks:
        for name, (_, master) in one["masters"].items():
            assert_equal(rank["masters"][name][1], master)
        assert rank["losses"] == one["losses"]


def _isolation(config: RunConfig) -> tuple[list[float], list[float], int]:
    run = start_tiny(config, own_samples)
    size = run.groups.topology.replica_size
    mine = range(run.groups.coords.replica * size, (run.groups.coords.replica + 1) * size)
    with counted_collectives() as calls:
        run.train(2)  # the outer step follows the third
    crossing = sum(count for ranks, count in calls.items() if not set(ranks) <= set(mine))
    inside = sum(count for ranks, count in calls.items() if set(ranks) <= set(mine))
    finish_tiny()
    assert size == 1 or inside > 0, "the counter saw nothing at all"
    return run.losses, run.grad_norms, crossing


@pytest.mark.parametrize("inner", INNER)
def test_between_outer_steps_a_replica_is_alone(inner: str) -> None:
    """Relation 4: replica 0 does not notice K, and no collective crosses replicas."""
    outer = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 3}
    layout = {"tensor_model_parallel_size": 2}
    alone = run_ranks(_isolation, 2, config_of(inner, 1, outer=outer, parallel=layout))
    for replicas in (2, 3):
        config = config_of(inner, replicas, outer=outer, parallel=layout)
        ranks = run_ranks(_isolation, 2 * replicas, config)
        assert ranks[0][:2] == alone[0][:2]
        assert [rank[2] for rank in ranks] == [0] * len(ranks)


def _with_sgd(run: TinyRun) -> TinyRun:
    """Turn Muon into plain SGD on matrices; vector parameters stay where they are."""
    muon = run.optimizer.inner.matrix_update
    muon.orthogonalise = lambda batch: batch.float()
    return run


def _sgd(config: RunConfig, steps: int) -> dict[str, tuple[int, torch.Tensor]]:
    run = _with_sgd(start_tiny(config)).train(steps)
    masters = run.masters()
    finish_tiny()
    return masters


def test_synchronising_every_step_is_data_parallelism() -> None:
    """Relation 6: K replicas, H = 1, SGD, plain mean, against dp = K."""
    inner = {**MUON, "lr": 0.5, "weight_decay": 0.0, "lr_warmup_iters": 0}
    inner |= {"muon": {"momentum": 0.0}, "vector": {"lr_mult": 0.0}}
    training = {"clip_grad": 0.0}
    every_step = {"kind": "average", "sync_interval": 1}
    replicas = tiny_config(
        inner=inner, training=training, outer=every_step, parallel={"num_replicas": 2}
    )
    data_parallel = tiny_config(inner=inner, training=training, outer=NO_OUTER)
    many = run_ranks(_sgd, 2, replicas, 3)
    pieces = run_ranks(_sgd, 2, data_parallel, 3)
    for name, (_, whole) in many[0].items():
        shards = sorted((p[name] for p in pieces if name in p), key=lambda piece: piece[0])
        together = torch.cat([tensor for _, tensor in shards])
        # A step moves a weight by lr * scale * gradient, here at most 1; means of two fp32
        # gradients against two means of parameters differ by a few roundings of that, three times
        # over.
        torch.testing.assert_close(together, whole, rtol=0, atol=3 * 8 * 2.0**-24)


COVER = {  # layout, replicas, inner, precision
    "tp2-k2": ({"tensor_model_parallel_size": 2}, 2, "muon", "fp32"),
    "tp2-sp-k2-bf16": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        2,
        "muon",
        "bf16",
    ),
    "pp2-k2": ({"pipeline_model_parallel_size": 2}, 2, "adamw", "fp32"),
    "dp2-k3": ({}, 3, "muon", "fp32"),
    "dp2-k4-bf16": ({}, 4, "adamw", "bf16"),
    "tp2-pp2-k2": (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        2,
        "muon",
        "fp32",
    ),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", COVER)
def test_anchors_and_replicated_parameters_are_equal_after_outer_steps(
    case: str, tied: bool
) -> None:
    """After two rounds on different data: equal anchors over replicas, equal copies inside one."""
    parallel, replicas, inner, precision = COVER[case]
    if tied and "pp2" not in case:
        pytest.skip("tied embeddings are duplicated over pipeline stages only")
    data = 2 if case.startswith("dp2") else 1
    config = config_of(
        inner,
        replicas,
        parallel=parallel,
        training={"precision": precision},
        model={"untie_embeddings_and_output_weights": not tied},
    )
    size = data * config.parallel.tensor_model_parallel_size
    size *= config.parallel.pipeline_model_parallel_size
    ranks = run_ranks(trained, replicas * size, config, 4)
    for position in range(size):
        first = ranks[position]
        for replica in range(1, replicas):
            other = ranks[replica * size + position]
            for kind in ("anchors", "parameters"):
                assert first[kind].keys() == other[kind].keys()
                for name, tensor in first[kind].items():
                    assert_equal(other[kind][name], tensor)
    _check_copies(ranks[:size])


def _check_copies(replica: list[dict[str, Any]]) -> None:
    """Parameters of the same name and whole shape are bitwise equal on all ranks of a replica."""
    seen: dict[str, torch.Tensor] = {}
    for rank in replica:
        for name, tensor in rank["parameters"].items():
            split = tensor.dim() > 1
            if not split:
                assert_equal(tensor, seen.setdefault(name, tensor))
    embeddings = [r["parameters"].get("embedding.word_embeddings.weight") for r in replica]
    held = [tensor for tensor in embeddings if tensor is not None]
    tensor_ranks = len({tuple(t.flatten()[:4].tolist()) for t in held})
    assert tensor_ranks <= 2, "copies of the embedding differ"


def _poisoned(config: RunConfig) -> tuple[bool, float, dict[str, torch.Tensor], dict[str, Any]]:
    run = start_tiny(config, own_samples).train(1)
    if run.groups.coords.replica == 1:
        name = next(iter(run.optimizer.view.masters))
        run.optimizer.view.masters[name][0] = float("nan")
        run.optimizer.view.publish()
    run.train(1)
    report = run.optimizer.last_outer
    assert report is not None
    moments = run.optimizer.inner.named_state()
    largest = max(
        (float(t.abs().max()) for named in moments.values() for t in named.values() if t.numel()),
        default=0.0,
    )
    anchors = {name: a.clone() for name, a in run.optimizer.synchronizer.anchors().items()}
    run.train(1)
    losses = run.losses
    finish_tiny()
    weights = report.applied[0].weights
    return report.restarted_from_anchor, largest, anchors, {"losses": losses, "weights": weights}


def test_a_replica_that_is_not_finite_is_left_out_and_starts_again_from_the_anchor() -> None:
    """The guard, through the real stack: weight 0, anchors finite and equal, moments forgotten."""
    layout = {"tensor_model_parallel_size": 2}
    ranks = run_ranks(_poisoned, 4, config_of("muon", 2, parallel=layout))
    assert [rank[0] for rank in ranks] == [False, False, True, True]
    assert ranks[0][3]["weights"].tolist() == [1.0, 0.0]
    assert ranks[2][1] == 0.0
    assert ranks[0][1] > 0.0
    for sane, broken in ((ranks[0], ranks[2]), (ranks[1], ranks[3])):
        for name, anchor in sane[2].items():
            assert torch.isfinite(anchor).all()
            assert_equal(broken[2][name], anchor)
    assert all(loss == loss for loss in ranks[2][3]["losses"][-1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlapped_communication_changes_nothing(precision: str) -> None:
    """Megatron's overlap of gradient reduction and parameter gathering: the same bits."""
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    config = partial(config_of, "muon", 2)
    plain = run_ranks(trained, 4, config(training={"precision": precision}), 4)
    other = run_ranks(trained, 4, config(training={"precision": precision, **overlapped}), 4)
    for one, two in zip(plain, other, strict=True):
        assert one["losses"] == two["losses"]
        for name, anchor in one["anchors"].items():
            assert_equal(two["anchors"][name], anchor)


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_recomputing_activations_changes_nothing(granularity: str) -> None:
    """The same bits: what is recomputed is what was computed."""
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    again: dict[str, Any] = {"recompute_granularity": granularity}
    if granularity == "full":
        again["recompute_num_layers"] = 1
    kept = run_ranks(trained, 2, config_of("muon", 1, parallel=layout), 3)
    recomputed = run_ranks(trained, 2, config_of("muon", 1, parallel=layout, training=again), 3)
    for one, two in zip(kept, recomputed, strict=True):
        assert one["losses"] == two["losses"]
        for name, (_, master) in one["masters"].items():
            assert_equal(two["masters"][name][1], master)


def _losses_with_boundaries(config: RunConfig) -> dict[str, float]:
    run = start_tiny(config)
    end = config.model.vocab_size - 1
    samples = run.assignment(1, run.groups, config)
    losses = {}
    for name, position in (("none", None), ("middle", config.model.seq_length // 2)):
        for masked in (False, True):
            forward = ForwardBackward(
                run.model,
                run.groups,
                micro_batch_size=config.training.micro_batch_size,
                seq_length=config.model.seq_length,
                end_of_document=end if masked else None,
            )
            batches = list(run.batches(samples))
            for batch in batches:
                batch["tokens"].masked_fill_(batch["tokens"] == end, 0)
                if position is not None:
                    batch["tokens"][:, position] = end
            losses[f"{name} {masked}"] = float(
                forward(iter(batches), len(batches), forward_only=True)
            )
    finish_tiny()
    return losses


def test_attention_stops_at_the_end_of_a_document_and_only_there() -> None:
    (losses,) = run_ranks(_losses_with_boundaries, 1, config_of("adamw", 1))
    # The masked kernel adds in another order: 16 terms a softmax, a few roundings of 2^-24 each.
    assert losses["none True"] == pytest.approx(losses["none False"], rel=64 * 2.0**-24)
    assert abs(losses["middle True"] - losses["middle False"]) > 1e-4


def _refusal(config: RunConfig, what: str) -> str:
    run = start_tiny(config)
    try:
        if what == "weights":
            next(iter(run.optimizer.view.masters.values())).add_(1.0)
            run.train(1)
        elif what == "outer optimizer":
            optimizer = run.optimizer.view.optimizer
            wrap_optimizer(
                optimizer, run.model, config, run.groups, outer_optimizer=HeavyBall(1.0, 0.5)
            )
        else:
            run.optimizer.view.optimizer.config.clip_grad = 0.5
            wrap_optimizer(run.optimizer.view.optimizer, run.model, config, run.groups)
    except RuntimeMismatch as error:
        return str(error)
    finally:
        finish_tiny()
    return "not refused"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weights", "Load weights before wrap_optimizer"),
        ("clipping", "has clip_grad 0.5, but training.clip_grad is 1.0"),
        ("outer optimizer", "outer.kind is none, so it would never be used"),
    ],
)
def test_what_would_silently_be_another_run_is_refused(what: str, said: str) -> None:
    """Weights loaded after wrap_optimizer, two values of clip_grad, an unused outer optimizer."""
    sections = {"outer": NO_OUTER} if what == "outer optimizer" else {}
    (refused,) = run_ranks(_refusal, 1, config_of("muon", 1, **sections), what)
    assert said in refused
