"""K replicas in one process are the run of K ranks, bit for bit."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.in_process import InProcessGroup, run_in_turns
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import derive
from megatron_muloco.errors import ConfigError, SyncError
from megatron_muloco.training.one_process import run_in_one_process, run_replicas
from megatron_muloco.training.start import initialize_replicas
from tests.support.byte_runs import byte_config, byte_dataset, byte_sections, run_here
from tests.support.faults import count_calls
from tests.support.rank_worker import WORKER_ENV
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import (
    ADAMW,
    MUON,
    NESTEROV,
    TinyRun,
    build_tiny,
    finish_tiny,
    tiny_config,
)

REPLICAS = 4
DETERMINISTIC = {"compression": {"kind": "none", "deterministic": True}}
STREAMING = {"fragments": {"count": 2}, "sync_interval": 4, "overlap_steps": 1}

CASES: dict[str, dict[str, Any]] = {
    "muloco-deterministic": {"inner": MUON, "outer": {**NESTEROV, **DETERMINISTIC}},
    "diloco": {"inner": ADAMW, "outer": {**NESTEROV, **DETERMINISTIC}},
    "muloco-bf16": {
        "inner": MUON,
        "training": {"precision": "bf16"},
        "outer": {**NESTEROV, "compression": {"kind": "none", "wire_dtype": "bf16"}},
    },
    "statistical-with-feedback": {
        "inner": MUON,
        "outer": {**NESTEROV, "compression": {"kind": "statistical", "bits": 4}},
    },
    "topk": {
        "inner": MUON,
        "outer": {
            **NESTEROV,
            "compression": {"kind": "topk", "density": 0.1, "block_size": 64, "value_bits": 4},
        },
    },
    "streaming-mixing": {
        "inner": MUON,
        "outer": {**NESTEROV, **STREAMING, **DETERMINISTIC, "mixing_weight": 0.5},
    },
    # A reduction with two phases, which K ranks run in a thread, while another is in flight.
    "streaming-statistical-in-flight": {
        "inner": ADAMW,
        "outer": {
            **NESTEROV,
            **STREAMING,
            "overlap_steps": 3,
            "max_in_flight": 2,
            "apply": "additive",
            "compression": {"kind": "statistical", "bits": 4},
        },
    },
}


def config_of(replicas: int, case: dict[str, Any], **sections: Any) -> RunConfig:
    return tiny_config(
        **case
        | {
            "parallel": {"num_replicas": replicas},
            "training": {"global_batch_size": 2 * replicas, "train_iters": 10}
            | case.get("training", {}),
            "monitor": {"debug_digests": True},
        }
        | sections
    )


def trained(config: RunConfig, groups: Groups, poisoned_step: int | None) -> dict[str, Any]:
    """Train and flush; replica 1 becomes NaN before the outer step of ``poisoned_step``."""
    run = build_tiny(config, groups)
    synchronizer = run.optimizer.synchronizer
    assert synchronizer is not None
    if poisoned_step is not None and groups.coords.replica == 1:
        _poison(run, poisoned_step)
    weights = []
    for _ in range(config.training.train_iters or 0):
        run.train(1)
        report = run.optimizer.last_outer
        weights.append([part.weights.tolist() for part in report.applied] if report else [])
    before_flush = _copies(synchronizer.state_dict()["tensors"])
    report = run.optimizer.flush()
    assert report is not None
    return {
        "losses": run.losses,
        "norms": run.grad_norms,
        "weights": weights,
        "before flush": before_flush,
        "end": _copies(synchronizer.state_dict()["tensors"]),
        "masters": {name: tensor for name, (_, tensor) in run.masters().items()},
        "wire bytes": report.metrics().get("muloco/wire_bytes"),
    }


def _poison(run: TinyRun, step: int) -> None:
    inner_step = run.optimizer.inner_step

    def broken() -> Any:
        report = inner_step()
        if report.step == step:
            for master in run.optimizer.view.masters.values():
                master.fill_(torch.nan)
        return report

    run.optimizer.inner_step = broken  # type: ignore[method-assign]


def _copies(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        kind: {name: tensor.clone() for name, tensor in sorted(named.items())}
        for kind, named in tensors.items()
    }


def on_ranks(config: RunConfig, poisoned_step: int | None = None) -> dict[str, Any]:
    result = trained(config, initialize_replicas(config), poisoned_step)
    finish_tiny()
    return result


def in_one_process(config: RunConfig, poisoned_step: int | None = None) -> list[dict[str, Any]]:
    return run_replicas(config, lambda groups: trained(config, groups, poisoned_step))


def flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path} / {key}")
    else:
        yield path, tree


def assert_same_run(config: RunConfig, poisoned_step: int | None = None) -> list[dict[str, Any]]:
    """Compare both ways to run; return the replicas."""
    (together,) = run_ranks(in_one_process, 1, config, poisoned_step)
    apart = run_ranks(on_ranks, config.parallel.num_replicas, config, poisoned_step)
    for replica, (mine, theirs) in enumerate(zip(together, apart, strict=True)):
        for (path, actual), (same_path, expected) in zip(flat(mine), flat(theirs), strict=True):
            assert path == same_path
            if isinstance(expected, Tensor):
                assert_equal(actual, expected, f"replica {replica} {path}")
            else:
                assert repr(actual) == repr(expected), f"replica {replica} {path}"  # nan is nan
    return together


@pytest.mark.parametrize("case", CASES)
def test_one_process_is_the_run_of_as_many_ranks(case: str) -> None:
    """Anchors, momentum, residuals, masters, losses, and what is in flight before the flush."""
    together = assert_same_run(config_of(REPLICAS, CASES[case]))
    assert len({tuple(replica["losses"]) for replica in together}) == REPLICAS
    kinds = together[0]["end"].keys()
    assert ("residual" in kinds) == ("statistical" in case or case == "topk")


def test_the_guard_excludes_the_same_replica() -> None:
    config = config_of(REPLICAS, CASES["statistical-with-feedback"])
    replicas = assert_same_run(config, poisoned_step=4)
    assert replicas[2]["weights"][3] == [[1.0, 0.0, 1.0, 1.0]]
    assert replicas[2]["weights"][5] == [[1.0, 1.0, 1.0, 1.0]]


# ---- the whole program ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return byte_dataset(tmp_path_factory.mktemp("data"))


def program_config(dataset: str, replicas: int, **sections: Any) -> RunConfig:
    return byte_config(
        dataset,
        **{
            "parallel": {"num_replicas": replicas},
            "training": {"global_batch_size": replicas, "eval_interval": 4, "eval_iters": 2},
            "inner": MUON,
            "outer": {**NESTEROV, **DETERMINISTIC},
        }
        | sections,
    )


@dataclass
class Said:
    """What the program on one rank has written."""

    losses: list[float]
    held_out: dict[int, float]
    test: list[tuple[int, float]]
    digest: str
    wire_bytes: int


def program_on_ranks(config: RunConfig) -> Said:
    """Run the program on this rank."""
    calls: dict[str, list[Any]] = {}

    @contextmanager
    def noted(context: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for method in ("say", "evaluation", "test", "outer_step"):
                noted = count_calls(context.monitor, method)
                calls[method] = stack.enter_context(noted)
            yield

    ended = run_here(config, around=noted)
    digests = [text.split()[-1] for (text,) in calls["say"] if "anchor digest" in text]
    reports = [report.metrics() for (report,) in calls["outer_step"]]
    return Said(
        list(ended.losses.values()),
        {step: float(loss) for step, loss in calls["evaluation"]},
        [(step, float(loss)) for step, loss in calls["test"]],
        digests[-1],
        sum(int(metrics.get("muloco/wire_bytes", 0)) for metrics in reports),
    )


def test_the_program_gives_losses_digest_and_bytes_of_ranks(dataset: str) -> None:
    test_split = {**byte_sections(dataset)["data"], "test": ({"path": dataset},)}
    config = program_config(dataset, 3, data=test_split)
    (together,) = run_ranks(run_in_one_process, 1, config)
    apart = run_ranks(program_on_ranks, 3, config)
    assert [replica.losses for replica in together.replicas] == [rank.losses for rank in apart]
    assert together.wire_bytes == [rank.wire_bytes for rank in apart]
    assert together.wire_bytes[0] > 0
    for rank in apart:
        assert together.held_out == rank.held_out
        assert [(7, together.test_loss)] == rank.test  # once, after the last step
        assert together.anchor_digest == rank.digest
    assert together.losses[0] == sum(rank.losses[0] for rank in apart) / 3


def test_the_command_prints_the_result(dataset: str, tmp_path: Path) -> None:
    """In a fresh process, without a launcher and without a job to join."""
    config = program_config(dataset, 2)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "tools/one_process.py", "--config", str(path), "--quiet"]
    environment = {**os.environ, **WORKER_ENV}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (expected,) = run_ranks(run_in_one_process, 1, config)
    assert f"anchor digest: {expected.anchor_digest}\n" in done.stdout
    last = max(expected.held_out)
    assert f"after iteration {last}: {expected.held_out[last]:.6f}\n" in done.stdout
    assert len(done.stdout.splitlines()) == len(expected.held_out) + 3  # no line of the run itself
    command += ["--set", "parallel.tensor_model_parallel_size=2"]
    refused = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "one process" in refused.stderr


def sixteen(config: RunConfig) -> tuple[Any, float]:
    """Run twice; return the result and how many MiB the second run, with 16 replicas, added."""
    few = run_in_one_process(RunConfig.model_validate(two_replicas(config)), writes=False)
    assert len(few.replicas) == 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run_in_one_process(config, writes=False)
    return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def two_replicas(config: RunConfig) -> dict[str, Any]:
    return config.model_dump() | {"parallel": {"num_replicas": 2}}


def test_sixteen_replicas_train_on_one_core(dataset: str) -> None:
    """They learn, and the memory that 14 more replicas need is the documented one."""
    config = program_config(
        dataset, 16, training={"global_batch_size": 16, "train_iters": 12, "eval_interval": 12}
    )
    ((result, grown_mib),) = run_ranks(sixteen, 1, config)
    assert len(result.replicas) == 16
    assert result.held_out[12] < result.held_out[0] - 0.1
    parameters = derive(config).parameters.total
    # Weights, gradients, two moments, anchor, momentum, and what the outer step needs at its peak:
    # 16 values of 4 bytes for each parameter, and Python objects of at most 4 MiB.
    assert grown_mib <= 16 * (16 * 4 * parameters / 2**20 + 4)


# ---- what cannot work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"parallel": {"num_replicas": 2, "tensor_model_parallel_size": 2}}, "tp 2 x pp 1"),
        ({"parallel": {"num_replicas": 2, "pipeline_model_parallel_size": 2}}, "tp 1 x pp 2"),
        ({"checkpoint": {"dir": "runs/x"}}, "checkpoint.dir: runs/x"),
        ({"checkpoint": {"init_from": "runs/x"}}, "checkpoint.init_from: runs/x"),
        ({"monitor": {"dir": "runs/x", "profile": {"steps": (1, 2)}}}, "monitor.profile.steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    dataset: str, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run_in_one_process(program_config(dataset, 2, **sections))
    (problem,) = refused.value.problems
    assert words in problem
    assert "launch/pretrain.py" in problem


def test_accelerators_are_refused(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="accelerator"):
        run_in_one_process(program_config(dataset, 2))


def refused_on_two_ranks(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        run_replicas(config, lambda groups: None)
    return str(refused.value)


def test_a_job_of_several_ranks_is_refused(dataset: str) -> None:
    for message in run_ranks(refused_on_two_ranks, 2, program_config(dataset, 2)):
        assert message.startswith("2 ranks were started")


# ---- turns ---------------------------------------------------------------------------------------


def test_replicas_run_one_at_a_time_until_they_wait() -> None:
    order: list[str] = []

    def body(group: InProcessGroup) -> Tensor:
        own, gathered = torch.tensor([float(group.index)]), torch.empty(3)
        pending = group.all_gather(gathered, own)
        order.append(f"start {group.index}")
        pending.wait()
        own.fill_(-1.0)  # its own again, though others have not waited yet
        order.append(f"end {group.index}")
        return gathered

    for gathered in run_in_turns(3, body):
        assert gathered.tolist() == [0.0, 1.0, 2.0]
    assert order == ["start 0", "start 1", "start 2", "end 2", "end 0", "end 1"]


def test_an_all_to_all_with_uneven_splits() -> None:
    def body(group: InProcessGroup) -> list[float]:
        sizes = [1, 2]  # rank k receives k + 1 values of each
        sent = torch.arange(3.0) + 10 * group.index
        received = torch.empty(2 * sizes[group.index])
        own = [sizes[group.index]] * 2
        group.all_to_all(received, sent, receive_splits=own, send_splits=sizes).wait()
        return received.tolist()

    assert run_in_turns(2, body) == [[0.0, 10.0], [1.0, 2.0, 11.0, 12.0]]


def test_the_first_failure_is_raised_and_ends_all() -> None:
    def body(group: InProcessGroup) -> None:
        buffer = torch.zeros(1)
        group.all_reduce(buffer).wait()
        if group.index == 1:
            raise ValueError("replica 1 broke")
        group.all_reduce(buffer).wait()

    with pytest.raises(ValueError, match="replica 1 broke"):
        run_in_turns(3, body)


def test_a_replica_that_ends_early_is_named() -> None:
    def body(group: InProcessGroup) -> None:
        if group.index != 1:
            group.all_reduce(torch.zeros(1)).wait()

    with pytest.raises(SyncError, match=r"waits in an all-reduce for replicas \[1\]"):
        run_in_turns(3, body)


def test_different_collectives_are_named() -> None:
    def body(group: InProcessGroup) -> None:
        if group.index:
            group.all_gather(torch.zeros(2), torch.zeros(1)).wait()
        else:
            group.all_reduce(torch.zeros(1)).wait()

    with pytest.raises(SyncError, match="joins an all-gather where replicas"):
        run_in_turns(2, body)
