"""`run_in_one_process`: a run of K small replicas on one core, bit for bit the run of K ranks.

Every replica has its own model, optimizers, residuals and samples, built by the same code as on a
rank of its own. `run_in_turns` lets one replica run at a time. Megatron's groups have one rank and
serve all replicas; the outer group is an `InProcessGroup`.

The bits are those of K ranks wherever the order of the mean's sum is this package's: with
``outer.compression.deterministic``, bf16 or a codec. The default all-reduce of three or more
replicas rounds differently, because a library chooses its order.

Memory is that of K replicas, without K interpreters. Anchor and outer momentum, which are the same
on all replicas, are kept by each of them as on K ranks. With Muon, fp32 and the deterministic
reducer, the peak was about 60 bytes for each parameter and replica, and at least 5 MiB a replica.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

from megatron_muloco.checkpoint.io import digests_of
from megatron_muloco.checkpoint.state import ANCHOR
from megatron_muloco.comm.groups import Groups, build_control, build_groups
from megatron_muloco.comm.in_process import InProcessGroup, run_in_turns
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import smallest_topology
from megatron_muloco.config.messages import Problem
from megatron_muloco.config.rules import check
from megatron_muloco.data.checks import check_run_data
from megatron_muloco.errors import ConfigError, NumericsError
from megatron_muloco.monitor.monitor import Monitor, Value
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.runtime.accelerator import CpuDeviceMode, training_device
from megatron_muloco.runtime.distributed import start_distributed
from megatron_muloco.runtime.parallel_state import mirror_groups, require_unset, unmirror_groups
from megatron_muloco.topology import Coords, Topology
from megatron_muloco.training.build import RunData, build_context, load_data
from megatron_muloco.training.loop import Outcome, train
from megatron_muloco.training.start import seed_ranks
from megatron_muloco.training.stopping import StopAgreement, StopRequest

__all__ = ["OneProcessResult", "ReplicaResult", "run_in_one_process", "run_replicas"]

Result = TypeVar("Result")

_ELSEWHERE = "or use launch/pretrain.py."


@dataclass
class ReplicaResult:
    """The course of one replica.

    Attributes:
        losses: Mean loss of each inner step, in nats per token.
        held_out: Loss of the anchor on held-out data, by inner step, equal on all replicas.
        test_loss: Loss of the last anchor on ``data.test``; ``None`` without it.
        wire_bytes: Bytes that the replica's rank would have sent in outer steps.
        anchor_digest: Digest of the anchor at the end, equal on all replicas.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    test_loss: float | None = None
    wire_bytes: int = 0
    anchor_digest: str = ""


@dataclass(frozen=True)
class OneProcessResult:
    """The result of a run in one process.

    Attributes:
        replicas: The course of each replica.
    """

    replicas: tuple[ReplicaResult, ...]

    @property
    def losses(self) -> list[float]:
        """Loss of each inner step, averaged over the replicas."""
        columns = zip(*(replica.losses for replica in self.replicas), strict=True)
        return [sum(column) / len(column) for column in columns]

    @property
    def held_out(self) -> dict[int, float]:
        """Loss of the anchor on held-out data, by inner step; empty without evaluation."""
        return self.replicas[0].held_out

    @property
    def test_loss(self) -> float | None:
        """Loss of the last anchor on ``data.test``; ``None`` without it."""
        return self.replicas[0].test_loss

    @property
    def anchor_digest(self) -> str:
        """Digest of the anchor at the end; the one that a run of K ranks prints."""
        return self.replicas[0].anchor_digest

    @property
    def wire_bytes(self) -> list[int]:
        """Bytes that each of K ranks would have sent in outer steps."""
        return [replica.wire_bytes for replica in self.replicas]


def run_in_one_process(config: RunConfig, *, writes: bool = True) -> OneProcessResult:
    """Train all replicas of a run in this process, on one core, and return what they learned.

    It may be called again for another run.

    Args:
        config: The configuration of the run.
        writes: Whether console lines and TensorBoard events are written, as rank 0 of K ranks does.

    Raises:
        ConfigError: The configuration needs more than one rank for a replica, an accelerator is
            present, or the run saves or profiles. Nothing has been trained.
        SyncError: As on K ranks.
        NumericsError: The run stopped because nothing was trained any more, or ended with weights
            that are not finite.
    """
    problems = [*_problems(config), *check_run_data(config)]
    if problems:
        raise ConfigError(problems)
    data: RunData | None = None

    def body(groups: Groups) -> ReplicaResult:
        nonlocal data
        # The first replica loads the data for all: samples are only read.
        if data is None:
            data = load_data(config, groups.topology)
        return _train(config, groups, data, writes=writes and not groups.coords.replica)

    return OneProcessResult(tuple(run_replicas(config, body)))


def run_replicas(config: RunConfig, body: Callable[[Groups], Result]) -> list[Result]:
    """Return ``body(groups)`` of every replica, in replica order.

    The process becomes a job of one rank, with one thread for computing. The generator is seeded
    for every replica as on a rank of its own.

    Args:
        config: The configuration of the run.
        body: The program of one replica, for instance a loop around `build_replica_optimizer`. With
            its groups it is the only rank of its replica. It waits for other replicas in outer
            steps and evaluations only.

    Raises:
        ConfigError: As `run_in_one_process`.
        RuntimeMismatch: Megatron's ``parallel_state`` is already initialised.
    """
    topology, alone = _start(config)

    def replica(group: InProcessGroup) -> Result:
        with CpuDeviceMode():
            coords = Coords(replica=group.index, pp=0, dp=0, cp=0, tp=0)
            groups = replace(alone, topology=topology, coords=coords, outer=group, exchange=group)
            seed_ranks(config.training.seed, groups)
            return body(groups)

    try:
        return run_in_turns(topology.num_replicas, replica)
    finally:
        unmirror_groups()
        # Models and their hooks refer to each other. Without a collection the next run of a study
        # would be built beside this one.
        gc.collect()


# ---- start ---------------------------------------------------------------------------------------


def _start(config: RunConfig) -> tuple[Topology, Groups]:
    """Return the topology of the run, and groups of this rank alone, which Megatron then uses.

    Raises:
        ConfigError: See `run_in_one_process`.
        RuntimeMismatch: See `run_replicas`.
    """
    problems = _problems(config)
    if problems:
        raise ConfigError(problems)
    require_unset()
    timeout = timedelta(minutes=config.training.distributed_timeout_minutes)
    ranks = start_distributed(timeout=timeout)
    if ranks.world_size > 1:
        raise ConfigError(
            f"{ranks.world_size} ranks were started, but all replicas of this run are in one "
            "process. Start it without a launcher, or use launch/pretrain.py."
        )
    # Small matrices gain nothing from threads, and a study runs one process on each core.
    torch.set_num_threads(1)
    topology = smallest_topology(config)
    check(config, topology)
    one_rank = Topology(num_replicas=1, tensor=1, pipeline=1, data=1)
    control = build_control(timedelta(minutes=config.training.control_timeout_minutes))
    alone = build_groups(one_rank, control=control, timeout=timeout)
    mirror_groups(alone)
    return topology, alone


def _problems(config: RunConfig) -> list[str]:
    """Return every reason why the replicas of a run cannot share a process."""
    problems = []
    topology = smallest_topology(config)
    if topology.replica_size > 1:
        problems.append(
            Problem(
                "parallel",
                f"a replica is tp {topology.tensor} x pp {topology.pipeline} x cp "
                f"{topology.context}, but in one process it is a single rank.\n"
                f"Set these sizes to 1, {_ELSEWHERE}",
            )
        )
    if config.checkpoint.dir is not None:
        problems.append(
            Problem(
                "checkpoint.dir",
                f"{config.checkpoint.dir}, but a checkpoint is written by K ranks, and replicas in "
                f"one process neither save nor resume.\nSet it to null, {_ELSEWHERE}",
            )
        )
    if config.checkpoint.init_from is not None:
        problems.append(
            Problem(
                "checkpoint.init_from",
                f"{config.checkpoint.init_from}, but replicas in one process read no checkpoint.\n"
                f"Set it to null, {_ELSEWHERE}",
            )
        )
    if config.monitor.profile.steps is not None:
        problems.append(
            Problem(
                "monitor.profile.steps",
                f"a trace would mix all replicas of the process.\nSet it to null, {_ELSEWHERE}",
            )
        )
    texts = [problem.format(config.where) for problem in problems]
    if torch.cuda.is_available():
        texts.append(
            "this machine has an accelerator, and replicas in one process are for CPUs. Hide it "
            f"(CUDA_VISIBLE_DEVICES=''), {_ELSEWHERE}"
        )
    return texts


# ---- training ------------------------------------------------------------------------------------


class _Recorder:
    """A replica's monitor that also keeps losses and bytes; other calls go to the monitor."""

    def __init__(self, monitor: Monitor, result: ReplicaResult) -> None:
        self._monitor, self._result = monitor, result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)

    def record(self, step: int, values: dict[str, Value]) -> None:
        """See `Monitor.record`."""
        self._result.losses.append(float(values["lm loss"]))
        self._monitor.record(step, values)

    def outer_step(self, report: OuterReport) -> None:
        """See `Monitor.outer_step`."""
        self._result.wire_bytes += int(report.metrics().get("muloco/wire_bytes", 0))
        self._monitor.outer_step(report)

    def evaluation(self, step: int, loss: float) -> None:
        """See `Monitor.evaluation`."""
        self._result.held_out[step] = loss
        self._monitor.evaluation(step, loss)

    def test(self, step: int, loss: float) -> None:
        """See `Monitor.test`."""
        self._result.test_loss = loss
        self._monitor.test(step, loss)


def _train(config: RunConfig, groups: Groups, data: RunData, *, writes: bool) -> ReplicaResult:
    """Train one replica to the end and flush."""
    context = build_context(config, groups, data, writes=writes)
    result = ReplicaResult()
    recorder: Any = _Recorder(context.monitor, result)
    # A request that never comes: an interrupt ends all replicas at once. A store in memory, because
    # asking the job's store at every step took 8 % of a run of 0.1M parameters.
    never = StopAgreement(
        HashStore(),
        replica=groups.coords.replica,
        num_replicas=groups.topology.num_replicas,
    )
    outcome = train(replace(context, monitor=recorder, agreement=never), StopRequest())
    context.monitor.close(outcome.value)
    if outcome is not Outcome.DONE:
        raise NumericsError(f"the run {outcome.value}")
    anchors = {ANCHOR: context.state.anchors()}
    shards = context.optimizer.view.shards
    result.anchor_digest = digests_of(groups, shards, anchors, training_device())[ANCHOR]
    return result
