"""Runs that go on with another K, layout or method: what is kept, what is read, what is refused."""

import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from megatron_muloco.checkpoint.changes import RunningMean
from megatron_muloco.checkpoint.io import digests_of
from megatron_muloco.checkpoint.state import ANCHOR, read_description
from megatron_muloco.errors import ConfigError
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.runtime.parallel_state import unmirror_groups
from megatron_muloco.training import loop
from tests.distributed.test_checkpoint import stored_tensors
from tests.support.byte_runs import byte_config, byte_dataset, run_here
from tests.support.matrix import TOLERANCE
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON

LAST = 12
ALL = ["replicas", "method", "inner_optimizer"]
NESTEROV = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 3}
NO_OUTER = {"kind": "none"}
# Fragment 0 is launched after steps 1, 4, 7, ..., fragment 1 after 3, 6, 9, ...; applied one later.
CODED = {
    **NESTEROV,
    "fragments": {"count": 2},
    "overlap_steps": 1,
    "max_in_flight": 2,
    "compression": {"kind": "statistical", "bits": 2},
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("bytes"))


@dataclass
class Part:
    """What one rank saw of one part of a run.

    Attributes:
        replica: This rank's replica.
        counts: Whether this rank is the first of those that read the same samples.
        first_step: The first inner step of this part.
        digest: Digest of the anchor after the load, before the first step.
        loaded: Every tensor of the state after the load, by key of the checkpoint and name.
        samples: Indices that were read for training.
        losses: Loss by inner step.
        said: What was printed.
    """

    replica: int = 0
    counts: bool = False
    first_step: int = 0
    digest: str = ""
    loaded: dict[str, Tensor] = field(default_factory=dict)
    samples: Counter[int] = field(default_factory=Counter)
    losses: dict[int, float] = field(default_factory=dict)
    said: str = ""


class Counted:
    """A dataset that counts which samples are read."""

    def __init__(self, dataset: Any, read: Counter[int]) -> None:
        self.dataset, self.read = dataset, read

    def __getitem__(self, index: int) -> Any:
        self.read[index] += 1
        return self.dataset[index]


def part_of_a_run(prefix: str, steps: int, directory: Path, sections: dict[str, Any]) -> Part:
    """Train until ``steps`` inner steps are made, from what is in the directory."""
    part = Part()

    @contextmanager
    def watched(context: Any) -> Iterator[None]:
        state = context.state
        coords = state.groups.coords
        part.replica, part.counts = coords.replica, coords.tp == coords.pp == coords.cp == 0
        kinds = {ANCHOR: state.anchors()}
        part.digest = digests_of(state.groups, state.view.shards, kinds, training_device())[ANCHOR]
        kinds |= {"master": state.view.masters}
        kinds |= {f"inner.{kind}": held for kind, held in state.inner.named_state().items()}
        if state.synchronizer is not None:
            outer = state.synchronizer.state_dict()["tensors"]
            kinds |= {f"outer.{kind}": held for kind, held in outer.items()}
        part.loaded = {
            f"{kind}.{name}": tensor.detach().clone()
            for kind, held in kinds.items()
            for name, tensor in held.items()
        }
        data = context.train_data
        data._dataset = Counted(data._dataset, part.samples)
        with mock.patch.object(loop, "inner_step", step_and_stop):
            yield

    def step_and_stop(*args: Any) -> int:
        """Make an inner step, and let the run stop after the step ``steps``."""
        inner_step(*args)
        return steps

    inner_step = loop.inner_step
    checkpoint = {"dir": str(directory), "keep": 9, "allow_changes": ALL}
    training = {"train_iters": LAST, "global_batch_size": 12, **sections.get("training", {})}
    sections = {"inner": MUON, "outer": NESTEROV, **sections, "training": training}
    sections["checkpoint"] = {**checkpoint, **sections.get("checkpoint", {})}
    with redirect_stdout(StringIO()) as said:
        ended = run_here(byte_config(prefix, **sections), around=watched)
    assert ended.outcome == ("DONE" if steps == LAST else "STOPPED")
    part.first_step, part.losses, part.said = ended.first_step, ended.losses, said.getvalue()
    return part


def replicas(count: int) -> dict[str, Any]:
    return {"parallel": {"num_replicas": count}}


def checkpoint_at(directory: Path, step: int) -> Path:
    return directory / f"iter_{step:07d}"


# World, steps at the end of the part, sections.
Parts = list[tuple[int, int, dict[str, Any]]]


def run_in_parts(prefix: str, directory: Path, parts: Parts) -> list[list[Part]]:
    """Train a run in parts; check that each begins with the anchor that the one before has saved.

    Returns:
        For each part what every rank saw.
    """
    seen, before = [], 0
    for world, steps, sections in parts:
        ranks = run_ranks(part_of_a_run, world, prefix, steps, directory, sections, timeout_s=240)
        assert {part.first_step for part in ranks} == {before + 1}
        if before:
            saved = read_description(checkpoint_at(directory, before)).anchor_digest
            assert {part.digest for part in ranks} == {saved}
        seen.append(ranks)
        before = steps
    return seen


def samples_read(seen: list[list[Part]], batch: int = 12) -> None:
    """Check that every sample was read once."""
    total = sum((part.samples for ranks in seen for part in ranks if part.counts), Counter[int]())
    steps = max(seen[-1][0].losses)
    assert total == Counter(range(steps * batch))


def test_k_changes_and_every_sample_is_read_once(prefix: str, tmp_path: Path) -> None:
    """K is 1, 2, 4, 3 and 1 again; the changes are inside rounds and, after step 6, between two."""
    parts: Parts = [
        (count, steps, replicas(count))
        for count, steps in ((1, 2), (2, 5), (4, 6), (3, 8), (1, 10))
    ]
    seen = run_in_parts(prefix, tmp_path, parts)
    samples_read(seen)
    assert "4 -> 3 replicas: local parameters are the anchor" in " ".join(seen[3][0].said.split())
    assert "WARNING: outer.lr 0.7 and outer.momentum 0.6" in " ".join(seen[1][0].said.split())
    # A run that goes on: of 256 bytes, a loss near ln 512 = 6.2 would be that of fresh weights.
    assert seen[-1][0].losses[10] < seen[0][0].losses[1]


def flat_mean(stored: dict[str, Tensor], kind: str, name: str, count: int) -> Tensor:
    mean = RunningMean()
    for replica in range(count):
        mean.add({name: stored[f".replica_{replica}.{kind}.{name}"].clone()})
    return mean.mean[name].view(-1)


def state_is_mapped(prefix: str, directory: Path, before: int, after: int) -> None:
    """Save inside a round, with a fragment in flight, and load with another K."""
    step = 4
    lengths = ((before, step), (after, LAST))
    parts: Parts = [(n, steps, {**replicas(n), "outer": CODED}) for n, steps in lengths]
    _, ranks = run_in_parts(prefix, directory, parts)
    stored = stored_tensors(checkpoint_at(directory, step))
    in_flight = [key for key in stored if key.startswith(".outer.mean.")]
    assert in_flight
    for replica, part in enumerate(ranks):
        source = replica % before
        for key, tensor in part.loaded.items():
            kind, name = next(
                (kind, key.removeprefix(f"{kind}.")) for kind in KINDS if key.startswith(f"{kind}.")
            )
            if kind in ("master", "outer.residual", "outer.at_launch"):
                expected = flat_mean(stored, kind, name, before)
            elif kind.startswith("inner."):
                expected = stored[f".replica_{source}.{key}"].view(-1)
            else:
                expected = stored[f".{key.replace('outer.anchor', ANCHOR)}"].view(-1)
            assert_equal(tensor.view(-1), expected, f"replica {replica}: {key}")
        assert {key.partition("decoder")[0] for key in part.loaded} >= {
            "outer.residual.", "outer.owner_residual.", "outer.mean.", "outer.at_launch."
        }  # fmt: skip
        assert sorted(part.losses) == list(range(step + 1, LAST + 1))


KINDS = (
    ANCHOR,
    "master",
    "inner.momentum_buffer",
    "inner.exp_avg_sq",
    "inner.exp_avg",
    "outer.anchor",
    "outer.momentum",
    "outer.mean",
    "outer.at_launch",
    "outer.residual",
    "outer.owner_residual",
)


def test_every_kind_of_state_follows_its_rule(prefix: str, tmp_path: Path) -> None:
    state_is_mapped(prefix, tmp_path, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 2), (4, 1), (3, 4)])
def test_every_kind_of_state_follows_its_rule_for_other_k(
    before: int, after: int, prefix: str, tmp_path: Path
) -> None:
    state_is_mapped(prefix, tmp_path, before, after)


def test_data_parallel_to_muloco_and_back(prefix: str, tmp_path: Path) -> None:
    """AdamW on two ranks, MuLoCo with K = 2, with K = 4, Muon on one rank.

    MuLoCo begins where its schedule has a fragment in flight that was never launched.
    """
    parts: Parts = [
        (2, 3, {"inner": ADAMW, "outer": NO_OUTER}),
        (2, 5, {**replicas(2), "outer": CODED}),
        (4, 6, {**replicas(4), "outer": CODED}),
        (1, LAST, {"outer": NO_OUTER}),
    ]
    seen, before = [], 0
    for world, steps, sections in parts:
        ranks = run_ranks(part_of_a_run, world, prefix, steps, tmp_path, sections, timeout_s=240)
        assert {part.first_step for part in ranks} == {before + 1}
        seen.append(ranks)
        before = steps
    samples_read(seen)
    for part in seen[1]:
        assert part.digest == read_description(checkpoint_at(tmp_path, 3)).anchor_digest
        for key, tensor in part.loaded.items():
            if key.startswith(("outer.momentum.", "outer.residual.", "outer.mean.")):
                assert not tensor.any(), key
        assert any(part.loaded[key].any() for key in part.loaded if "momentum_buffer" in key)
    saved = read_description(checkpoint_at(tmp_path, 5)).anchor_digest
    assert {part.digest for part in seen[2]} == {saved}
    # Back to one set of weights inside a round: the mean of what the replicas trained.
    stored = stored_tensors(checkpoint_at(tmp_path, 6))
    for key, tensor in seen[3][0].loaded.items():
        if key.startswith("master."):
            name = key.removeprefix("master.")
            assert_equal(tensor.view(-1), flat_mean(stored, "master", name, 4), key)


def test_at_a_boundary_data_parallelism_takes_the_anchor(prefix: str, tmp_path: Path) -> None:
    parts: Parts = [
        (2, 3, replicas(2)),
        (1, 4, {"outer": NO_OUTER}),
        (2, 6, {**replicas(2), "inner": ADAMW}),
    ]
    seen = run_in_parts(prefix, tmp_path, parts)
    samples_read(seen)
    for part in seen[2]:  # after Muon, AdamW begins afresh
        moments = {key: t for key, t in part.loaded.items() if key.startswith("inner.exp_avg")}
        assert any("linear" in key for key in moments)
        assert not any(tensor.any() for tensor in moments.values())


AXES: dict[str, tuple[tuple[int, Any], tuple[int, Any]]] = {  # world and parallel section, each
    "tp1-tp2": ((2, {}), (4, TP2)),
    "tp2-tp1": ((4, TP2), (2, {})),
    "pp1-pp2": ((2, {}), (4, PP2)),
    "pp2-pp1": ((4, PP2), (2, {})),
    "dp1-dp2": ((2, {}), (4, {})),
    "dp2-dp1": ((4, {}), (2, {})),
    "dp2-dp3": ((4, {}), (6, {})),
    "dp3-dp2": ((6, {}), (4, {})),
    "k1-k2": ((1, {"num_replicas": 1}), (2, {})),
    "k2-k3": ((2, {}), (3, {"num_replicas": 3})),
    "k3-k4": ((3, {"num_replicas": 3}), (4, {"num_replicas": 4})),
    "k4-k3": ((4, {"num_replicas": 4}), (3, {"num_replicas": 3})),
    "k3-k2": ((3, {"num_replicas": 3}), (2, {})),
    "k2-k1": ((2, {}), (1, {"num_replicas": 1})),
    "k2-k3-tp2": ((2, {}), (6, {"num_replicas": 3, **TP2})),
    "k4-k1-tp2-pp2": ((4, {"num_replicas": 4}), (4, {"num_replicas": 1, **TP2, **PP2})),
    "k1-k2-pp2-dp2-tp1": ((4, {"num_replicas": 1, **PP2, **TP2}), (4, {"num_replicas": 2})),
}


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_every_axis_keeps_the_anchor(axis: str, prefix: str, tmp_path: Path) -> None:
    parts: Parts = [
        (world, steps, {"parallel": {"num_replicas": 2, **parallel}, "outer": CODED})
        for (world, parallel), steps in zip(AXES[axis], (4, 7), strict=True)
    ]
    samples_read(run_in_parts(prefix, tmp_path, parts))


Shape = tuple[int, int, int, int]  # K, pp, dp, tp
BATCH = 24


def shapes(seed: int) -> tuple[Shape, Shape]:
    """Return two random shapes of at most eight ranks that differ in two or more axes."""
    draw = random.Random(seed)
    fitting = [
        shape
        for shape in product((1, 2, 3, 4), (1, 2), (1, 2, 3), (1, 2))
        if math.prod(shape) <= 8 and BATCH % (shape[0] * shape[2]) == 0
    ]
    while True:
        before, after = draw.choice(fitting), draw.choice(fitting)
        if sum(a != b for a, b in zip(before, after, strict=True)) >= 2:
            return before, after


def sections_of(shape: Shape) -> tuple[int, dict[str, Any]]:
    replicas, pipeline, _, tensor = shape
    parallel = {
        "num_replicas": replicas,
        "pipeline_model_parallel_size": pipeline,
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
    }
    return math.prod(shape), {"parallel": parallel, "training": {"global_batch_size": BATCH}}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_all_axes_change_together(seed: int, prefix: str, tmp_path: Path) -> None:
    """Between two rounds, so that the loss of the next step depends on the anchor alone."""
    before, after = shapes(seed)
    step, last = 3, 5
    world, sections = sections_of(before)
    run_in_parts(prefix, tmp_path / "run", [(world, step, sections)])
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    world, sections = sections_of(after)
    ranks = run_ranks(part_of_a_run, world, prefix, last, tmp_path / "run", sections)
    _, one = sections_of((1, 1, 1, 1))
    (alone,) = run_ranks(part_of_a_run, 1, prefix, step + 1, tmp_path / "alone", one)
    saved = read_description(checkpoint_at(tmp_path / "alone", step)).anchor_digest
    assert {part.digest for part in (*ranks, alone)} == {saved}
    # The mean over replicas of the losses on their shares of the batch is the loss on the batch.
    loss = fmean({part.replica: part.losses[step + 1] for part in ranks}.values())
    assert loss == pytest.approx(alone.losses[step + 1], rel=TOLERANCE["fp32"])
    read = sum((part.samples for part in ranks if part.counts), Counter[int]())
    assert read == Counter(range(step * BATCH, last * BATCH))


def refused(prefix: str, directory: Path, sections: dict[str, Any]) -> str:
    try:
        part_of_a_run(prefix, 4, directory, sections)
    except ConfigError as error:
        unmirror_groups()  # so that this worker can start another run
        return str(error)
    return ""


def warm_start(prefix: str, directory: Path) -> None:
    """Save a run, begin others with its weights, and try what must be refused."""
    first = directory / "first"
    part_of_a_run(prefix, LAST, first, {})
    flushed = checkpoint_at(first, LAST) / "final_anchor"
    saved = read_description(flushed).anchor_digest

    other = {"init_from": str(first)}
    began = part_of_a_run(prefix, 1, directory / "other", {"inner": ADAMW, "checkpoint": other})
    assert (began.first_step, began.digest) == (1, saved)
    assert f"(digest {saved})" in " ".join(began.said.split())
    moments = {k: t for k, t in began.loaded.items() if k.startswith(("inner.", "outer.momentum."))}
    assert moments
    assert not any(tensor.any() for tensor in moments.values())
    # The same command again goes on where it was.
    again = part_of_a_run(prefix, 2, directory / "other", {"inner": ADAMW, "checkpoint": other})
    assert again.first_step == 2

    message = refused(prefix, directory / "other", {"checkpoint": {"init_from": str(directory)}})
    assert "checkpoint.init_from: " in message
    assert "so they would not be used" in message
    for path in (first, flushed):
        unlike = {"model": {"num_layers": 3}, "checkpoint": {"init_from": str(path)}}
        message = refused(prefix, directory / "unlike", unlike)
        assert "model.num_layers: 2 when saved, 3 now" in message
    message = refused(prefix, directory / "none", {"checkpoint": {"init_from": "nowhere"}})
    assert "there is no checkpoint directory nowhere" in message


def test_a_run_begins_with_the_weights_of_another(prefix: str, tmp_path: Path) -> None:
    run_ranks(warm_start, 1, prefix, tmp_path)


def refuse_changes(prefix: str, directory: Path) -> list[str]:
    """Save with K = 2; return what runs say that would change something."""
    part_of_a_run(prefix, 2, directory, replicas(2))
    unnamed: dict[str, Any] = {"checkpoint": {"allow_changes": []}}
    named = {"checkpoint": {"allow_changes": ["replicas"]}}
    return [
        refused(prefix, directory, {**replicas(1), **unnamed}),
        refused(prefix, directory, {**replicas(2), "inner": ADAMW, **named}),
        refused(prefix, directory, {**replicas(2), "outer": {**NESTEROV, "sync_interval": 4}}),
    ]


def refuse_to_spread(prefix: str, directory: Path) -> str:
    """Save with a value of replica 1 that is not finite; return what a run of one replica says."""
    step = loop.inner_step

    def broken_step(context: Any, *args: Any) -> Any:
        result = step(context, *args)
        if context.groups.coords.replica == 1:
            next(iter(context.state.view.masters.values())).view(-1)[0] = math.nan
        return result

    with mock.patch.object(loop, "inner_step", broken_step):
        part_of_a_run(prefix, 2, directory, replicas(2))
    return refused(prefix, directory, replicas(1))


def test_a_replica_that_is_not_finite_is_not_averaged(prefix: str, tmp_path: Path) -> None:
    for said in run_ranks(refuse_to_spread, 2, prefix, tmp_path):
        assert "has values that are not finite in replica_1.master" in said


def test_a_change_is_refused_unless_it_is_named(prefix: str, tmp_path: Path) -> None:
    for unnamed, other, fixed in run_ranks(refuse_changes, 2, prefix, tmp_path):
        assert "parallel.num_replicas: 2 when saved, 1 now (replicas)" in unnamed
        assert "allow_changes: [replicas]" in unnamed
        assert "inner.kind: 'muon' when saved, 'adamw' now (inner_optimizer)" in other
        assert "outer.sync_interval: 3 when saved, 4 now; it defines the round" in fixed
