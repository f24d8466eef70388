"""Runs whose numbers go bad: what is excluded, when a run stops, and what is never saved."""

import random
import re
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_muloco.checkpoint import layout
from megatron_muloco.comm.groups import Groups
from megatron_muloco.config import RunConfig
from megatron_muloco.errors import EXIT_NUMERICS, NumericsError
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.training import one_process
from megatron_muloco.training.one_process import run_in_one_process, run_replicas
from tests.support.byte_runs import Ended, byte_config, byte_dataset, run_here
from tests.support.damages import damage
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import ADAMW, MUON, NESTEROV, build_tiny, tiny_config

DETERMINISTIC = {"compression": {"kind": "none", "deterministic": True}}
BAND = {"guard": {"max_norm_ratio": 10.0}}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("bytes"))


def flowing(said: StringIO) -> str:
    return " ".join(said.getvalue().split())


def saved_steps(directory: Path) -> list[int]:
    return sorted(layout.step_of(path) for path in directory.glob("iter_*"))


# ---- plain data parallelism ----------------------------------------------------------------------

STEPS, LIMIT, EVERY = 12, 4, 2


def data_parallel(
    prefix: str, directory: Path, kinds: dict[int, str], *, async_save: bool = False
) -> tuple[Ended, str]:
    """Train with damages; return the end and what was said."""
    config = byte_config(
        prefix,
        inner=ADAMW,
        outer={"kind": "none"},
        training={"train_iters": STEPS, "max_skipped_steps": LIMIT},
        checkpoint={
            "dir": str(directory),
            "save_interval": EVERY,
            "keep": 2,
            "async_save": async_save,
        },
    )
    with redirect_stdout(StringIO()) as said:
        ended = run_here(config, around=lambda context: damage(context.optimizer, kinds))
    return ended, flowing(said)


def spoil_weights(prefix: str, directory: Path, async_save: bool = False) -> None:
    """Weights become NaN at step 5: nothing is saved over steps 2 and 4, and the run stops."""
    undisturbed, _ = data_parallel(prefix, directory / "undisturbed", {})
    ended, said = data_parallel(prefix, directory / "bad", {5: "nan"}, async_save=async_save)
    # Step 6 is the first one with NaN gradients.
    assert (ended.outcome, max(ended.losses)) == ("STALLED", 5 + LIMIT)
    assert saved_steps(directory / "bad") == [2, 4]
    assert re.search(r"NOT SAVED: .*anchor of ", said)
    assert "values that are not finite, so this state is not saved." in said
    assert f"STOPPED after iteration 9: {LIMIT} inner steps in a row were skipped" in said
    assert "The state was not saved; earlier checkpoints stay" in said
    resumed, _ = data_parallel(prefix, directory / "bad", {})
    assert (resumed.outcome, resumed.first_step) == ("DONE", 5)
    resumed.assert_same(undisturbed)


def spoil_weights_in_background(prefix: str, directory: Path) -> None:
    """The same with saves in the background, which find it in the copy."""
    spoil_weights(prefix, directory, async_save=True)


def spoil_gradients(prefix: str, directory: Path) -> None:
    """All gradients are NaN from step 5 on: the state is saved, and no older one is deleted."""
    kinds = dict.fromkeys(range(5, STEPS + 1), "gradient")
    ended, said = data_parallel(prefix, directory, kinds)
    assert (ended.outcome, max(ended.losses)) == ("STALLED", 4 + LIMIT)
    assert saved_steps(directory) == [2, 4, 6, 8]
    assert "The state is saved." in said
    resumed, _ = data_parallel(prefix, directory, {})
    assert (resumed.outcome, resumed.first_step) == ("DONE", 9)
    assert saved_steps(directory) == [10, 12]


def spoil_the_end(prefix: str, directory: Path) -> None:
    """Weights become NaN after the last step: the run has failed, with and without a directory."""
    ended, said = data_parallel(prefix, directory, {STEPS: "inf"})
    assert (ended.outcome, saved_steps(directory)) == ("NOT_FINITE", [8, 10])
    assert "THE RUN HAS FAILED: anchor of " in said


@pytest.mark.parametrize(
    "body", [spoil_weights, spoil_weights_in_background, spoil_gradients, spoil_the_end]
)
def test_bad_numbers_are_never_saved_over_good_ones(body: Any, prefix: str, tmp_path: Path) -> None:
    run_ranks(body, 1, prefix, tmp_path, timeout_s=120)


# ---- replicas ------------------------------------------------------------------------------------


def all_bad(prefix: str, directory: Path) -> None:
    """Both replicas are NaN at every outer step; after three of them the run saves and stops."""

    def config(**sections: Any) -> RunConfig:
        return byte_config(
            prefix,
            inner=MUON,
            outer=NESTEROV,
            parallel={"num_replicas": 2},
            training={"train_iters": STEPS},
            checkpoint={"dir": str(directory), "save_interval": EVERY, "keep": 1},
        )

    kinds = dict.fromkeys(range(4, STEPS + 1, 2), "nan")
    with redirect_stdout(StringIO()) as said:
        ended = run_here(config(), around=lambda context: damage(context.optimizer, kinds))
    assert (ended.outcome, max(ended.losses)) == ("STALLED", 8)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in ended.tensors.values())
    if torch.distributed.get_rank() == 0:
        for step in (4, 6, 8):
            assert f"iteration {step}: replicas [0, 1] have weight 0" in flowing(said)
        assert "NO REPLICA IS LEFT, the anchor did not change" in flowing(said)
        assert "STOPPED after iteration 8: 3 rounds in a row had too few usable" in flowing(said)
        # The state before the first empty round was not deleted.
        assert saved_steps(directory) == [2, 4, 6, 8]
    resumed = run_here(config())
    assert (resumed.outcome, resumed.first_step) == ("DONE", 9)


def test_a_run_with_no_replica_left_saves_and_stops(prefix: str, tmp_path: Path) -> None:
    run_ranks(all_bad, 2, prefix, tmp_path, timeout_s=120)


Plan = list[dict[int, str]]  # by replica: inner step -> kind


def random_plan(rounds: int, replicas: int, seed: int) -> Plan:
    """Up to half of the replicas are bad in every round but the first one, which sets the band."""
    source = random.Random(seed)
    plan: Plan = [{} for _ in range(replicas)]
    for index in range(2, rounds + 1):
        for replica in source.sample(range(replicas), source.randint(0, replicas // 2)):
            plan[replica][2 * index] = source.choice(["nan", "inf", "far"])
    return plan


def bad_at_random(prefix: str, plan: Plan) -> tuple[str, list[float]]:
    """Train a whole run with bad replicas; return what was said, and the metric by round."""
    config = byte_config(
        prefix,
        inner=MUON,
        outer={**NESTEROV, **BAND},
        parallel={"num_replicas": len(plan)},
        training={"train_iters": 20, "global_batch_size": len(plan)},
    )
    excluded: list[float] = []
    build = one_process.build_context  # type: ignore[attr-defined]
    with ExitStack() as damages, redirect_stdout(StringIO()) as said:

        def build_damaged(config: RunConfig, groups: Groups, *args: Any, **options: Any) -> Any:
            context = build(config, groups, *args, **options)
            damages.enter_context(damage(context.optimizer, plan[groups.coords.replica]))
            if groups.coords.replica == 0:
                optimizer: Any = context.optimizer
                outer_step = optimizer.outer_step

                def recorded(values: Tensor | None = None) -> OuterReport | None:
                    report: OuterReport | None = outer_step(values)
                    if report is not None:
                        excluded.append(report.metrics()["muloco/excluded"])
                    return report

                optimizer.outer_step = recorded
            return context

        with mock.patch.object(one_process, "build_context", build_damaged):
            result = run_in_one_process(config)
    assert all(torch.isfinite(torch.tensor(replica.losses[-1])) for replica in result.replicas)
    return flowing(said), excluded


def test_every_exclusion_of_a_run_is_said_and_counted(prefix: str) -> None:
    plan = random_plan(rounds=10, replicas=4, seed=3)
    ((said, excluded),) = run_ranks(bad_at_random, 1, prefix, plan)
    kinds = {kind for steps in plan for kind in steps.values()}
    assert kinds == {"nan", "inf", "far"}
    total = 0
    for step in range(2, 21, 2):
        bad = [replica for replica, steps in enumerate(plan) if step in steps]
        assert (f"after iteration {step}: replicas {bad} have weight 0" in said) == bool(bad)
        assert excluded[step // 2 - 1] == len(bad)
        total += len(bad)
    assert said.count("have weight 0") == sum(count > 0 for count in excluded)
    assert f"excluded: {total} times a replica had weight 0" in said


def of_four(step: int, groups: Groups, config: RunConfig) -> list[int]:
    """Return the samples that replica k of four has, also where there are three."""
    size = config.training.global_batch_size // config.parallel.num_replicas
    first = ((step - 1) * 4 + groups.coords.replica) * size
    return list(range(first, first + size))


def course(config: RunConfig, plan: Plan) -> list[dict[str, Any]]:
    def body(groups: Groups) -> dict[str, Any]:
        run = build_tiny(config, groups, of_four)
        with damage(run.optimizer, plan[groups.coords.replica]):
            run.train(config.training.train_iters or 0)
        synchronizer = run.optimizer.synchronizer
        assert synchronizer is not None
        tensors: dict[str, dict[str, Tensor]] = synchronizer.state_dict()["tensors"]
        kept = {kind: {n: t.clone() for n, t in tensors[kind].items()} for kind in SHARED}
        return {"losses": run.losses, **kept}

    return run_replicas(config, body)


SHARED = ("anchor", "momentum")
WAYS: dict[str, list[str]] = {
    # Before the second round there is no band, so the first bad pseudogradient is not finite.
    "parameters": ["nan", "inf", "far", "far", "nan"],
    "gradients": ["gradient"] * 5,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_replica_that_is_always_bad_costs_nothing_but_itself(way: str) -> None:
    """Three replicas and a bad one are, bit for bit, the three: so is every loss."""

    def config(replicas: int) -> RunConfig:
        return tiny_config(
            inner=MUON,
            outer={**NESTEROV, **DETERMINISTIC, **BAND},
            parallel={"num_replicas": replicas},
            training={"global_batch_size": 2 * replicas, "train_iters": 10},
        )

    kinds = WAYS[way]
    bad = {2 * index: kind for index, kind in enumerate(kinds, 1)}
    if way == "gradients":
        bad |= {step - 1: "gradient" for step in bad}
    (with_it,) = run_ranks(course, 1, config(4), [{}, {}, {}, bad])
    (without,) = run_ranks(course, 1, config(3), [{}, {}, {}])
    for mine, theirs in zip(with_it[:3], without, strict=True):
        assert mine["losses"] == theirs["losses"]
        for kind in SHARED:
            for name, tensor in theirs[kind].items():
                assert_equal(mine[kind][name], tensor, f"{kind} of {name}")


def stops_in_one_process(prefix: str) -> str:
    config = byte_config(prefix, outer=NESTEROV, training={"train_iters": 8})
    build = one_process.build_context  # type: ignore[attr-defined]

    def build_damaged(*args: Any, **options: Any) -> Any:
        context = build(*args, **options)
        stack.enter_context(damage(context.optimizer, {2: "nan", 4: "nan", 6: "nan"}))
        return context

    with ExitStack() as stack, mock.patch.object(one_process, "build_context", build_damaged):
        try:
            run_in_one_process(config, writes=False)
        except NumericsError as error:
            return str(error)
    return ""


def test_a_run_in_one_process_that_stops_is_no_result(prefix: str) -> None:
    assert run_ranks(stops_in_one_process, 1, prefix) == [
        "the run stopped because nothing was trained any more; the cause is above"
    ]


def exit_codes(config: RunConfig) -> dict[str, int]:
    """Return the exit code of the program for every way in which a run can end."""
    from megatron_muloco.training import loop, main
    from megatron_muloco.training.stopping import StopRequest

    codes = {}
    for outcome in loop.Outcome:
        with mock.patch.object(loop, "run", lambda *_, outcome=outcome: outcome):
            codes[outcome.name] = main._train(config, StopRequest(), mock.Mock())
    return codes


def test_bad_numbers_have_an_exit_code_of_their_own(prefix: str) -> None:
    (codes,) = run_ranks(exit_codes, 1, byte_config(prefix))
    assert {name for name, code in codes.items() if code == EXIT_NUMERICS} == {
        "STALLED",
        "NOT_FINITE",
    }


# ---- spikes --------------------------------------------------------------------------------------

# A window of two steps and ratios of nearly 1: on these data some steps are spikes.
SPIKES = {"max_norm_ratio": 1.02, "max_loss_ratio": 1.001, "window": 2, "patience": 1}


def spiky(prefix: str, **checkpoint: Any) -> tuple[Ended, list[tuple[bool, bool]]]:
    """Train two replicas; return the end, and for each step whether it was skipped, rolled back."""
    config = byte_config(
        prefix,
        inner=MUON,
        outer={**NESTEROV, "sync_interval": 4},
        parallel={"num_replicas": 2},
        training={"train_iters": 14, "spikes": SPIKES},
        checkpoint=checkpoint,
    )
    course: list[tuple[bool, bool]] = []

    def watched(context: Any) -> Any:
        return _watched(context.optimizer, course)

    return run_here(config, around=watched), course


def _watched(optimizer: Any, course: list[tuple[bool, bool]]) -> Any:
    watch_loss = optimizer.watch_loss

    def recorded(loss: float) -> bool:
        rolled_back: bool = watch_loss(loss)
        if rolled_back:  # the replica holds the anchor, and nothing that it has trained before
            for name, anchor in optimizer.synchronizer.anchors().items():
                assert_equal(optimizer.view.masters[name], anchor, name)
            for moment in optimizer.inner.named_state().values():
                assert not any(bool(tensor.any()) for tensor in moment.values())
        course.append((optimizer.last_inner.skipped, rolled_back))
        return rolled_back

    return mock.patch.object(optimizer, "watch_loss", recorded)


def stop_and_resume_among_spikes(prefix: str, directory: Path) -> list[tuple[bool, bool]]:
    undisturbed, course = spiky(prefix)
    saved, _ = spiky(prefix, dir=str(directory / "each"), save_interval=1, keep=14)
    saved.assert_same(undisturbed)
    for step in (3, 6, 9):
        resumed, rest = spiky(
            prefix,
            dir=str(directory / f"from{step}"),
            resume=str(directory / "each" / f"iter_{step:07d}"),
        )
        assert rest == course[step:]
        resumed.assert_same(undisturbed)
    return course


def test_a_resumed_run_skips_and_goes_back_where_an_undisturbed_one_does(
    prefix: str, tmp_path: Path
) -> None:
    for course in run_ranks(stop_and_resume_among_spikes, 2, prefix, tmp_path, timeout_s=120):
        assert any(skipped for skipped, _ in course)
        assert any(rolled_back for _, rolled_back in course)
