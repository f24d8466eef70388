"""Relation 7: a run that was stopped anywhere and resumed is bit for bit one that never stopped."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_muloco.checkpoint import loading
from megatron_muloco.checkpoint import store as store_module
from megatron_muloco.checkpoint.state import read_description
from megatron_muloco.errors import ConfigError
from megatron_muloco.model import initialise
from megatron_muloco.training import loop
from tests.support.byte_runs import Ended, byte_config, byte_dataset, run_here
from tests.support.faults import fail_call, signal_at_call
from tests.support.spawn import run_ranks
from tests.support.tiny_models import ADAMW, MUON

STEPS = 7
# In the middle of the first round, at an outer step, and in the middle of the second round. The run
# also ends in the middle of a round.
STOPS = (1, 3, 5)
ROUND = 3

NESTEROV = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": ROUND}
NO_OUTER = {"kind": "none"}
# Rounds of 3 and 4 steps; fragments are in flight after each of the STOPS.
SCHEDULES = {
    "kind": "nesterov",
    "sync_interval": {"kind": "steps", "values": [[1, ROUND], [2, 4]]},
    "lr": {"kind": "cosine", "start": 0.9, "end": 0.5, "rounds": 2},
    "momentum": {"kind": "linear", "start": 0.3, "end": 0.8, "rounds": 2},
    "fragments": {"count": 3},
    "overlap_steps": 1,
    "max_in_flight": 2,
}
# Fragments are in flight after steps 1 and 3, with residuals after both.
CODED = {
    **NESTEROV,
    "fragments": {"count": 2},
    "overlap_steps": 1,
    "max_in_flight": 2,
    "compression": {"kind": "statistical", "bits": 2},
}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}

COVER: dict[str, tuple[int, int, dict[str, Any]]] = {  # world, replicas, sections
    "k1": (1, 1, {"inner": MUON}),
    "k2": (2, 2, {"inner": ADAMW}),
    "k2-schedules": (2, 2, {"outer": SCHEDULES, "model": {"num_layers": 3}}),
    "k2-coded": (2, 2, {"outer": CODED}),
    # Two steps of 4 samples, one of 6, the rest of 8.
    "k2-ramp": (2, 2, {"training": {"global_batch_size": 8, "rampup_batch_size": [4, 2, 13]}}),
    "k2-tp2-bf16": (4, 2, {"inner": MUON, "parallel": TP2, "training": {"precision": "bf16"}}),
    "k2-pp2": (4, 2, {"inner": MUON, "parallel": PP2}),
    "k2-dp2": (4, 2, {"inner": MUON}),
    "dp2-bf16": (2, 1, {"inner": ADAMW, "outer": NO_OUTER, "training": {"precision": "bf16"}}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("bytes"))


def config_of(prefix: str, replicas: int = 1, **sections: Any) -> Any:
    sections.setdefault("inner", ADAMW)
    sections.setdefault("outer", NESTEROV)
    parallel = {"num_replicas": replicas, **sections.pop("parallel", {})}
    return byte_config(prefix, parallel=parallel, **sections)


def stop_everywhere(prefix: str, replicas: int, sections: dict[str, Any], directory: Path) -> None:
    """Compare, in each rank, an undisturbed run, one that saves each step, and resumed ones."""
    undisturbed = run_here(config_of(prefix, replicas, **sections))
    assert (undisturbed.outcome, len(undisturbed.losses)) == ("DONE", STEPS)
    saving = {"dir": str(directory / "each"), "save_interval": 1, "keep": 2 * STEPS}
    run_here(config_of(prefix, replicas, **sections, checkpoint=saving)).assert_same(undisturbed)
    for step in STOPS:
        going_on = {
            "dir": str(directory / f"from{step}"),
            "resume": str(directory / "each" / f"iter_{step:07d}"),
        }
        resumed = run_here(config_of(prefix, replicas, **sections, checkpoint=going_on))
        assert resumed.first_step == step + 1
        resumed.assert_same(undisturbed)


@pytest.mark.parametrize("case", COVER)
def test_resumed_at_any_step_is_never_stopped(case: str, prefix: str, tmp_path: Path) -> None:
    world, replicas, sections = COVER[case]
    run_ranks(stop_everywhere, world, prefix, replicas, sections, tmp_path, timeout_s=120)


def refuse_to_draw(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a resumed run has drawn initial weights")


def resume_without_drawing(prefix: str, init: str, directory: Path) -> None:
    """Resume where every function that draws weights raises; compare with a run that went on."""
    sections = {"model": {"init": init}, "training": {"overlap_grad_reduce": True}}
    saving = {"dir": str(directory), "save_interval": ROUND, "keep": STEPS}
    undisturbed = run_here(config_of(prefix, 2, **sections, checkpoint=saving))
    there = {"dir": str(directory / "on"), "resume": str(directory / "iter_0000003")}
    with (
        mock.patch.object(initialise, "_draw", refuse_to_draw),
        mock.patch.object(layers, "_initialize_affine_weight_cpu", refuse_to_draw),
    ):
        resumed = run_here(config_of(prefix, 2, **sections, checkpoint=there))
    resumed.assert_same(undisturbed)


@pytest.mark.parametrize("init", ["muloco", "megatron"])
def test_a_resumed_run_draws_no_weights(init: str, prefix: str, tmp_path: Path) -> None:
    run_ranks(resume_without_drawing, 2, prefix, init, tmp_path)


def resume_with_a_gap(prefix: str, directory: Path) -> str:
    """Load all masters but one; return what the run says."""
    run_here(config_of(prefix, 2, checkpoint={"dir": str(directory)}))
    fill = loading._fill

    def fill_all_but_one(view: Any, pieces: Any) -> None:
        lost = "output_layer.weight"
        fill(view, {**pieces, lost: view.masters[lost]})

    going_on = config_of(prefix, 2, checkpoint={"dir": str(directory)})
    with mock.patch.object(loading, "_fill", fill_all_but_one):
        try:
            run_here(going_on)
        except ConfigError as error:
            return str(error)
    return ""


def test_a_weight_that_a_load_misses_is_named(prefix: str, tmp_path: Path) -> None:
    for said in run_ranks(resume_with_a_gap, 2, prefix, tmp_path):
        assert "could not be loaded: it has no values for " in said
        assert "master of output_layer.weight" in said


def resume_with_compression(prefix: str, directory: Path) -> str:
    """Save without compression, resume with it; return what the run says."""
    checkpoint = {"dir": str(directory), "save_interval": ROUND, "keep": STEPS}
    run_here(config_of(prefix, 2, outer={**CODED, "compression": {}}, checkpoint=checkpoint))
    there = {"dir": str(directory / "coded"), "resume": str(directory / "iter_0000003")}
    with redirect_stdout(StringIO()) as said:
        run_here(config_of(prefix, 2, outer=CODED, checkpoint=there))
    return said.getvalue()


def test_a_run_says_that_residuals_begin_with_zeros(prefix: str, tmp_path: Path) -> None:
    said, _ = run_ranks(resume_with_compression, 2, prefix, tmp_path)
    expected = (
        "error feedback: compression error of the pseudogradients (e) and compression error of the "
        "mean (f): zero, the checkpoint has none"
    )
    assert expected in " ".join(said.split())


def resume_with_batches(prefix: str, directory: Path) -> list[dict[str, Any]]:
    """Train 3 steps of 4 samples, 2 of 8, and 2 of 4; return the scalars of each checkpoint."""
    found, resume = [], "none"
    for last, batch in ((3, 4), (5, 8), (7, 4)):
        checkpoint = {"dir": str(directory / f"until{last}"), "resume": resume}
        training = {"train_iters": last, "global_batch_size": batch}
        ended = run_here(config_of(prefix, 2, training=training, checkpoint=checkpoint))
        path = directory / f"until{last}" / f"iter_{last:07d}"
        resume = str(path)
        found.append({**read_description(path).scalars, "losses": len(ended.losses)})
    return found


def test_a_run_goes_on_with_another_batch_where_its_samples_ended(
    prefix: str, tmp_path: Path
) -> None:
    found, _ = run_ranks(resume_with_batches, 2, prefix, tmp_path)
    assert found == [
        {"step": 3, "consumed_samples": 12, "losses": 3},
        {"step": 5, "consumed_samples": 28, "losses": 2},
        {"step": 7, "consumed_samples": 36, "losses": 2},
    ]


def ramp_and_batches(prefix: str, directory: Path) -> None:
    """Compare a ramp with runs of one batch each that follow each other."""
    constant = {
        **ADAMW,
        "lr_decay_style": "constant",
        "lr_warmup_iters": 0,
    }  # the length of a run has no influence

    def trained(directory: Path, resume: str, **training: Any) -> Any:
        checkpoint = {"dir": str(directory), "resume": resume}
        sections = {"inner": constant, "outer": NO_OUTER, "checkpoint": checkpoint}
        return run_here(config_of(prefix, training=training, **sections))

    ramp = [4, 2, 13]
    ramped = trained(
        directory / "ramp", "none", global_batch_size=8, rampup_batch_size=ramp, train_iters=5
    )
    resume, losses = "none", {}
    for last, batch in ((2, 4), (3, 6), (5, 8)):
        ended = trained(directory / f"{last}", resume, global_batch_size=batch, train_iters=last)
        losses |= ended.losses
        resume = str(directory / f"{last}" / f"iter_{last:07d}")
    assert ramped.losses == losses
    ended.assert_same(ramped)


def test_a_ramp_is_runs_with_its_batches_one_after_the_other(prefix: str, tmp_path: Path) -> None:
    run_ranks(ramp_and_batches, 1, prefix, tmp_path)


def change_batch_of_a_length_in_tokens(prefix: str, directory: Path) -> str:
    config = config_of(prefix, checkpoint={"dir": str(directory)})
    run_here(config)
    tokens = 100 * 8 * config.model.seq_length
    training = {"train_iters": None, "train_tokens": tokens, "global_batch_size": 8}
    try:
        run_here(config_of(prefix, training=training, checkpoint={"dir": str(directory)}))
    except ConfigError as error:
        return str(error)
    return ""


def test_another_batch_needs_a_length_in_steps(prefix: str, tmp_path: Path) -> None:
    (said,) = run_ranks(change_batch_of_a_length_in_tokens, 1, prefix, tmp_path)
    assert "the first 7 steps read 28 samples with another" in said
    assert "Set training.train_iters" in said


Fault = Callable[[Any], AbstractContextManager[Any]]


def on_rank(rank: int, fault: Fault, context: Any) -> AbstractContextManager[Any]:
    """Enter the fault on one rank only."""
    return fault(context) if dist.get_rank() == rank else nullcontext()


def in_first_step(context: Any) -> AbstractContextManager[Any]:
    return signal_at_call(context.model, "zero_grad_buffer", number=1, signum=signal.SIGUSR1)


def in_evaluation(context: Any) -> AbstractContextManager[Any]:
    return signal_at_call(loop, "evaluate", number=2, signum=signal.SIGUSR1)


def in_a_save(context: Any) -> AbstractContextManager[Any]:
    return signal_at_call(store_module, "write_tensors", number=1, signum=signal.SIGUSR1)


def twice(context: Any) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for number in (2, 3):
        stack.enter_context(
            signal_at_call(context.optimizer, "inner_step", number=number, signum=signal.SIGTERM)
        )
    return stack


PLACES: dict[str, tuple[Fault, range]] = {  # fault, steps after which the run may stop
    "first-step": (in_first_step, range(2, 5)),
    # The outer step after step 3 keeps replicas together; evaluation follows it.
    "evaluation": (in_evaluation, range(4, 7)),
    "save": (in_a_save, range(3, 5)),
    "twice": (twice, range(3, 6)),
}
SECTIONS = {"training": {"eval_interval": ROUND, "eval_iters": 1, "train_iters": 2 * STEPS}}


def checkpoints_in(directory: Path) -> dict[str, Any]:
    return {"dir": str(directory), "save_interval": 2}


def signalled(prefix: str, fault: Fault, directory: Path) -> tuple[Ended, str]:
    config = config_of(prefix, 2, **SECTIONS, checkpoint=checkpoints_in(directory))
    ended = run_here(config, around=partial(on_rank, 1, fault))
    return ended, (directory / "latest_checkpointed_iteration.txt").read_text().strip()


def resume_all(prefix: str, directories: list[Path]) -> None:
    undisturbed = run_here(config_of(prefix, 2, **SECTIONS))
    for directory in directories:
        resumed = run_here(config_of(prefix, 2, **SECTIONS, checkpoint=checkpoints_in(directory)))
        assert resumed.outcome == "DONE"
        resumed.assert_same(undisturbed)


def test_a_signal_stops_all_ranks_at_one_step_wherever_it_arrives(
    prefix: str, tmp_path: Path
) -> None:
    for name, (fault, steps) in PLACES.items():
        ranks = run_ranks(signalled, 2, prefix, fault, tmp_path / name)
        assert [ended.outcome for ended, _ in ranks] == ["STOPPED"] * 2, name
        lasts = {max(ended.losses) for ended, _ in ranks}
        assert len(lasts) == 1, (name, lasts)
        assert lasts <= set(steps), (name, lasts)
        assert {latest for _, latest in ranks} == set(map(str, lasts)), name
    run_ranks(resume_all, 2, prefix, [tmp_path / name for name in PLACES])


def stopped_with(prefix: str, checkpoint: dict[str, Any], fault: Fault) -> Ended:
    return run_here(config_of(prefix, 2, checkpoint=checkpoint), around=fault)


def test_a_stop_without_a_checkpoint_directory_is_told_apart(prefix: str) -> None:
    ranks = run_ranks(stopped_with, 2, prefix, {}, in_first_step)
    assert [ended.outcome for ended in ranks] == ["UNSAVED"] * 2
    assert max(ranks[0].losses) == 2


def disk_full(number: int, context: Any) -> AbstractContextManager[Any]:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fail_call(FileSystemWriter, "write_data", number=number, error=error)


def first_save_fails(context: Any) -> AbstractContextManager[Any]:
    return on_rank(1, partial(disk_full, 1), context)


def save_on_request_fails(context: Any) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(
        signal_at_call(context.optimizer, "inner_step", number=3, signum=signal.SIGUSR1)
    )
    stack.enter_context(on_rank(0, partial(disk_full, 2), context))
    return stack


def test_a_full_disk_during_training_costs_one_checkpoint(prefix: str, tmp_path: Path) -> None:
    checkpoint = {"dir": str(tmp_path), "save_interval": 2, "keep": STEPS}
    ranks = run_ranks(stopped_with, 2, prefix, checkpoint, first_save_fails)
    assert [ended.outcome for ended in ranks] == ["DONE"] * 2
    saved = sorted(path.name for path in tmp_path.glob("iter_*"))
    assert saved == ["iter_0000004", "iter_0000006", "iter_0000007"]


def save_beside(prefix: str, directory: Path) -> list[Ended]:
    """Save each step in the background, and resume from some; the second save fails."""
    undisturbed = run_here(config_of(prefix, 2, outer=CODED))
    saving = {"dir": str(directory), "save_interval": 1, "keep": STEPS, "async_save": True}
    config = config_of(prefix, 2, outer=CODED, checkpoint=saving)
    ended = [run_here(config, around=partial(on_rank, 1, partial(disk_full, 2)))]
    ended[0].assert_same(undisturbed)
    for step in STOPS:
        there = {"resume": str(directory / f"iter_{step:07d}"), "async_save": True}
        there["dir"] = str(directory / f"from{step}")
        resumed = run_here(config_of(prefix, 2, outer=CODED, checkpoint=there))
        assert resumed.first_step == step + 1
        resumed.assert_same(undisturbed)
    last = {**saving, "dir": str(directory / "last"), "save_interval": STEPS}
    config = config_of(prefix, 2, outer=CODED, checkpoint=last)
    return [*ended, run_here(config, around=partial(on_rank, 1, partial(disk_full, 1)))]


def test_saving_in_the_background_changes_no_bit_and_a_failure_is_told(
    prefix: str, tmp_path: Path
) -> None:
    ranks = run_ranks(save_beside, 2, prefix, tmp_path, timeout_s=120)
    assert [[ended.outcome for ended in each] for each in ranks] == [["DONE", "SAVE_FAILED"]] * 2
    saved = sorted(int(path.name[5:]) for path in tmp_path.glob("iter_*"))
    assert saved == [1, 3, 4, 5, 6, 7]
    assert not list(tmp_path.glob("last/iter_*"))
    assert not list(tmp_path.glob("*.lock"))


def test_a_full_disk_at_a_stop_is_a_fault_and_keeps_the_last_checkpoint(
    prefix: str, tmp_path: Path
) -> None:
    checkpoint = {"dir": str(tmp_path), "save_interval": 2}
    ranks = run_ranks(stopped_with, 2, prefix, checkpoint, save_on_request_fails)
    assert [ended.outcome for ended in ranks] == ["SAVE_FAILED"] * 2
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000002"]
    assert not list(tmp_path.glob(".tmp*"))
