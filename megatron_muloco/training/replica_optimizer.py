"""`ReplicaOptimizer`: a Megatron optimizer whose step also makes the outer steps that are due.

It wraps Megatron's optimizer and is not a part of it. The inner step and its skip decision come
first. Then the outer step writes master weights and copies them to the model parameters, before the
next forward pass::

    step()  =  inner_step()                clip, skip if not finite, update theta_k
               outer_step()                launch and apply what the schedule says

A gradient spike is skipped as well (`SpikeWatch`). `OuterChecks` compares the replicas after outer
steps.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.collectives import ReplicatedBroadcast, gather_objects
from megatron_muloco.comm.consistency import check_equal
from megatron_muloco.comm.reducers import OuterPeers
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived
from megatron_muloco.config.inner import learning_rate
from megatron_muloco.errors import NumericsError, RuntimeMismatch, SyncError
from megatron_muloco.optim.muon import MuonAdamW
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.synchronizer import Synchronizer
from megatron_muloco.runtime.megatron import MasterView
from megatron_muloco.training.spikes import SkipLimit, SpikeWatch

__all__ = ["InnerReport", "OuterChecks", "ReplicaOptimizer", "WeightChecks"]


class OuterChecks:
    """Checks after outer steps that all replicas hold the same anchor and outer momentum.

    It also compares the replicated parameters within this replica: those of the fragments that were
    just applied, in debug mode all. Between outer steps nothing is checked, because replicas differ
    there.

    Args:
        shared: Words for a kind of tensor -> the tensors of this rank's shards that all replicas
            share, by name; those that the outer step updates.
        replicated: Broadcast of the replicated parameters, which can compare them.
        fragments: Names of the parameters of each fragment.
        group: The outer group.
        device: Device of the tensors that the group's backend sends.
        interval: Rounds between comparisons; 0 is off.
        debug: Compare after every outer step.
    """

    def __init__(
        self,
        shared: Mapping[str, Mapping[str, Tensor]],
        replicated: ReplicatedBroadcast,
        fragments: Sequence[Collection[str]],
        group: OuterPeers,
        device: torch.device,
        *,
        interval: int,
        debug: bool,
    ) -> None:
        self._shared, self._replicated, self._fragments = shared, replicated, fragments
        self._group, self._device = group, device
        self._interval, self._debug = interval, debug

    def after(self, report: OuterReport) -> None:
        """Make the comparisons that are due after an outer step.

        Raises:
            SyncError: Replicas differ; the message names the first differing parameter, the round
                and the ranks.

        Collectives: 8 bytes per parameter and kind over the outer group when a comparison is due,
        and a comparison of replicated parameters over the ranks that hold them. Every rank calls it
        after every outer step.
        """
        due = [
            part.fragment
            for part in report.applied
            if self._interval and part.round_index % self._interval == 0
        ]
        # Each fragment is applied once per round, so fragment 0 is due once per round, too.
        if 0 in due or (self._debug and report.applied):
            self._compare_shared(report.round_index)
        if self._debug and report.applied:
            self._replicated.check(report.round_index)
        elif due:
            names = {name for fragment in due for name in self._fragments[fragment]}
            self._replicated.check(report.round_index, names)

    def at_the_end(self, report: OuterReport) -> None:
        """Compare after the flush, so that runs shorter than the interval are checked once."""
        if self._interval or self._debug:
            self._compare_shared(report.round_index)
        if self._debug:
            self._replicated.check(report.round_index)

    def _compare_shared(self, round_index: int) -> None:
        for what, tensors in self._shared.items():
            check_equal(tensors, self._group, self._device, what=what, round_index=round_index)


class WeightChecks:
    """Checks between outer steps of the weights inside one replica.

    The data-parallel ranks of a replica must hold the same model parameters, and these must be the
    master weights in the precision of the model. Masters and moments have no copy inside a replica,
    so nothing can be compared with them.

    Args:
        view: Masters and model parameters of this rank.
        group: The ranks of the replica that hold copies of the parameters (dp x cp).
        device: Device of the tensors that the group's backend sends.
        interval: Inner steps between checks; 0 is off.
    """

    def __init__(
        self, view: MasterView, group: ProcessGroup, device: torch.device, *, interval: int
    ) -> None:
        self._view, self._group = view, group
        self._device, self._interval = device, interval

    def after(self, step: int) -> None:
        """Make the checks that are due after inner step ``step``.

        Raises:
            SyncError: Ranks differ, or a rank's parameters are not its rounded masters. All ranks
                of the group raise; the message names the first parameter, the step and the ranks.

        Collectives: 8 bytes per parameter and one small object over dp x cp when a check is due,
        and with ``overlap_param_gather`` an all-gather of the parameters; every rank calls it.
        """
        if not self._interval or step % self._interval:
            return
        with self._view.gathered():
            parameters = self._view.parameters()
            check_equal(parameters, self._group, self._device, what="the parameter", step=step)
            own = (torch.distributed.get_rank(), self._view.differing())
        stale = [(rank, names) for rank, names in gather_objects(self._group, own) if names]
        if stale:
            rank, names = stale[0]
            raise SyncError(
                f"inner step {step}: rank {rank}: {names[0]} is not its master weight in the "
                f"precision of the model; {len(names)} parameters of {len(parameters)} differ. "
                "Resume from an earlier checkpoint; if it happens again, suspect this rank's "
                "hardware."
            )


@dataclass(frozen=True, slots=True)
class InnerReport:
    """The result of one inner step of this replica.

    Attributes:
        step: Number of the inner step, counted from 1; skipped steps count.
        grad_norm: Global gradient norm of the replica before clipping.
        lr: Learning rate of the step.
        skipped: Whether nothing was updated, because the norm was not finite or a spike.
    """

    step: int
    grad_norm: float
    lr: float
    skipped: bool


class ReplicaOptimizer:
    """Inner and outer steps of one rank, with the interface of Megatron's optimizers.

    Other attributes (``param_groups``, ``zero_grad``, ``chained_optimizers``, checkpoint calls) are
    forwarded to the wrapped optimizer. The wrapper sets learning rate and weight decay of every
    inner step from the configuration, so the loop needs no parameter scheduler.

    Args:
        optimizer: The optimizer that Megatron built; its distributed optimizer holds ``inner``.
        view: Master weights of this rank.
        inner: The inner optimizer, bound to this rank's shards.
        synchronizer: The outer step; ``None`` for plain data parallelism.
        checks: Comparison of replicas after outer steps; ``None`` without a synchronizer.
        weight_checks: Comparison of weights inside the replica.
        config: The configuration of the run.
        derived: Values that follow from the configuration and the number of ranks.
    """

    def __init__(
        self,
        optimizer: Any,
        view: MasterView,
        inner: MuonAdamW,
        synchronizer: Synchronizer | None,
        checks: OuterChecks | None,
        weight_checks: WeightChecks,
        config: RunConfig,
        derived: Derived,
    ) -> None:
        self._optimizer = optimizer
        self._distributed: DistributedOptimizer = view.optimizer
        self._config = config
        self.derived = derived
        self.view = view
        self.inner = inner
        self.synchronizer = synchronizer
        self._checks, self._weight_checks = checks, weight_checks
        self.steps = 0
        self.skipped_steps = 0
        self.spikes = SpikeWatch(config.training.spikes)
        self._skips = SkipLimit(config.training.max_skipped_steps)
        self._rolled_back_at = 0
        self.last_inner: InnerReport | None = None
        self.last_outer: OuterReport | None = None

    @property
    def schedule(self) -> SyncSchedule | None:
        """The schedule of outer steps; ``None`` for plain data parallelism."""
        return None if self.synchronizer is None else self.synchronizer.schedule

    def waits_after(self, step: int) -> bool:
        """Return whether this replica may wait for other replicas after inner step ``step``.

        A launch counts as well as an apply: it only enqueues a collective, but any later
        synchronisation with the device waits for that collective, and so for the other replicas.
        While a fragment is in flight, `Reducer.advance` may enqueue its next one after any step.
        """
        schedule = self.schedule
        return schedule is not None and bool(schedule.events(step) or schedule.in_flight(step - 1))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped optimizer."""
        return getattr(self.__dict__["_optimizer"], name)

    def step(self) -> tuple[bool, float, int | None]:
        """Make one inner step and the outer steps that are due after it.

        Returns:
            Megatron's triple: whether parameters were updated, the gradient norm before clipping,
            and the number of zero gradients (not counted here: ``None``).

        Raises:
            NumericsError: `stalled` says why; the state is that after the step and may be saved.

        Collectives: those of `inner_step` and `outer_step`; every rank of every replica calls it.
        """
        report = self.inner_step()
        self.outer_step()
        if reason := self.stalled():
            raise NumericsError(reason)
        return not report.skipped, report.grad_norm, None

    @torch.no_grad()
    def inner_step(self) -> InnerReport:
        """Clip gradients and update this replica's parameters, or skip the step.

        A step is skipped if its gradient norm is not finite or a spike. The norm is over the whole
        replica, so all its ranks skip together. A skipped step changes no moment and no parameter.
        It counts as a step, so that the schedules of all replicas stay aligned.

        Collectives: gradient statistics over the replica, the inner optimizer's exchange over the
        stage group, parameter all-gather over dp x cp, and those of `WeightChecks.after`.
        """
        if self.steps == 0:
            self._check_start()
        self.steps += 1
        lr = self._set_hyperparameters(self.steps)
        # The parts of Megatron's own `step`, so that the skip decision is made between the gradient
        # norm and the update.
        optimizer = self._distributed
        optimizer.prepare_grads()
        clip = optimizer.config.clip_grad
        norm = optimizer.clip_grad_norm(clip) if clip > 0 else optimizer.get_grad_norm()
        grad_norm = float(norm)
        skipped = self.spikes.is_spike(grad_norm) or not math.isfinite(grad_norm)
        self._skips.count(skipped=skipped)
        if skipped:
            self.skipped_steps += 1
        else:
            optimizer.step_with_ready_grads()
        self._weight_checks.after(self.steps)
        self.last_inner = InnerReport(self.steps, grad_norm, lr, skipped)
        return self.last_inner

    @torch.no_grad()
    def outer_step(self, line_values: Tensor | None = None) -> OuterReport | None:
        """Make the outer steps that are due after the last inner step; ``None`` if none was due.

        Args:
            line_values: Metrics of this replica to send with a launch, fp32; the same number of
                values in every call.

        Collectives: over outer groups and replicas when an outer step is due, none otherwise.
        """
        if self.synchronizer is None:
            return None
        skipped = self.last_inner is not None and self.last_inner.skipped
        lost = skipped or self._rolled_back_at == self.steps
        self.last_outer = self.synchronizer.after_inner_step(
            self.steps, line_values, trained=0.0 if lost else 1.0
        )
        if self.last_outer is not None:
            if self.last_outer.restarted_from_anchor:
                # The replica was not finite and its parameters are now the anchor's. Its moments
                # come from the non-finite trajectory.
                self.inner.zero_moments()
            if self._checks is not None:
                self._checks.after(self.last_outer)
        return self.last_outer

    def watch_loss(self, loss: float) -> bool:
        """Judge the loss of the inner step just made; go back to the anchor if it asks for that.

        The inner moments become zero: they come from the steps that are lost. Called before the
        outer step, and once in every inner step of a run with ``training.spikes.max_loss_ratio``.

        Args:
            loss: Mean loss of the step over the replica, equal on all its ranks.

        Returns:
            Whether the replica went back.

        Collectives: those of `Synchronizer.roll_back` if it did, none otherwise; every rank of the
        replica calls it.
        """
        if self.synchronizer is None or not self.spikes.asks_for_anchor(loss):
            return False
        self.synchronizer.roll_back()
        self.inner.zero_moments()
        self._rolled_back_at = self.steps
        return True

    @property
    def advances(self) -> bool:
        """Whether the last step of the run trained something, the same on all ranks of the job.

        With an outer step: whether the last mean had enough replicas.
        """
        if self.synchronizer is None:
            return not self._skips.in_a_row
        return not self.synchronizer.empty_rounds

    def stalled(self) -> str:
        """Return why the run has to stop after the last step, alike on all ranks; else ``""``."""
        if self.last_outer is not None and self.last_outer.exhausted:
            assert self.synchronizer is not None
            return (
                f"{self.synchronizer.empty_rounds} rounds in a row had too few usable replicas "
                "(outer.guard.max_empty_rounds), so the anchor has not learned since"
            )
        if self.synchronizer is None and self._skips.reached:
            return (
                f"{self._skips.in_a_row} inner steps in a row were skipped "
                "(training.max_skipped_steps), because their gradient norms were not finite or "
                "spikes, so nothing was trained since"
            )
        return ""

    def flush(self) -> OuterReport | None:
        """Average all replicas after the last inner step; return ``None`` without an outer step.

        Collectives: over outer groups and replicas; every rank of every replica calls it once.
        """
        if self.synchronizer is None:
            return None
        report = self.synchronizer.flush()
        if self._checks is not None:
            self._checks.at_the_end(report)
        return report

    def _check_start(self) -> None:
        """Check that no weights were loaded after the anchor was copied from the masters.

        Raises:
            RuntimeMismatch: Masters and anchor differ, so the first pseudogradient would be the
                difference of two models.
        """
        anchors = {} if self.synchronizer is None else self.synchronizer.anchors()
        for name, anchor in anchors.items():
            master = self.view.masters[name].to(anchor.device)
            # Compared as bits, so that NaN equals NaN and 0.0 differs from -0.0.
            if not torch.equal(anchor.view(torch.int32), master.view(torch.int32)):
                raise RuntimeMismatch(
                    f"{name} changed between wrap_optimizer and the first step, so the anchor "
                    "differs from the model. Load weights before wrap_optimizer."
                )

    def _set_hyperparameters(self, step: int) -> float:
        """Set learning rate and weight decay of ``step`` in all groups; return the rate."""
        lr = learning_rate(self._config.inner, self.derived.train_iters, step)
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.derived.weight_decay * group["wd_mult"]
        return lr
