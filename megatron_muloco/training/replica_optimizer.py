"""`ReplicaOptimizer`: a Megatron optimizer whose step also makes the outer steps that are due.

It wraps Megatron's optimizer and is not a part of it. The inner step and its skip decision come
first. Then the outer step writes master weights and copies them to the model parameters, before the
next forward pass::

    step()  =  inner_step()                clip, skip if not finite, update theta_k
               outer_step()                launch and apply what the schedule says

`OuterChecks` compares the replicas after outer steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_muloco.comm.collectives import ReplicatedBroadcast
from megatron_muloco.comm.consistency import check_equal
from megatron_muloco.comm.reducers import OuterPeers
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import Derived
from megatron_muloco.config.inner import learning_rate
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.muon import MuonAdamW
from megatron_muloco.outer.diagnostics import OuterReport
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.synchronizer import Synchronizer
from megatron_muloco.runtime.megatron import MasterView

__all__ = ["InnerReport", "OuterChecks", "ReplicaOptimizer"]


class OuterChecks:
    """Checks after outer steps that all replicas hold the same anchor.

    In debug mode it also compares the replicated parameters within this replica. Between outer
    steps nothing is checked, because replicas differ there.

    Args:
        anchors: Anchor of this rank's shards, by name; the tensors that the outer step updates.
        replicated: Broadcast of the replicated parameters, which can compare them.
        group: The outer group.
        device: Device of the tensors that the group's backend sends.
        interval: Rounds between comparisons of the anchors; 0 is off.
        debug: Compare anchors and replicated parameters after every outer step.
    """

    def __init__(
        self,
        anchors: Mapping[str, Tensor],
        replicated: ReplicatedBroadcast,
        group: OuterPeers,
        device: torch.device,
        *,
        interval: int,
        debug: bool,
    ) -> None:
        self._anchors, self._replicated = anchors, replicated
        self._group, self._device = group, device
        self._interval, self._debug = interval, debug

    def after(self, report: OuterReport) -> None:
        """Make the comparisons that are due after an outer step.

        Raises:
            SyncError: Replicas differ; the message names the first differing parameter, the round
                and the ranks.

        Collectives: 8 bytes per parameter over the outer group when a comparison is due; in debug
        mode also a comparison of replicated parameters over the ranks that hold them. Every rank
        calls it after every outer step.
        """
        # Each fragment is applied once per round, so fragment 0 is due once per round, too.
        in_turn = any(
            self._interval and part.fragment == 0 and part.round_index % self._interval == 0
            for part in report.applied
        )
        if in_turn or (self._debug and report.applied):
            self._compare_anchors(report.round_index)
        if self._debug and report.applied:
            self._replicated.check(report.round_index)

    def at_the_end(self, report: OuterReport) -> None:
        """Compare after the flush, so that runs shorter than the interval are checked once."""
        if self._interval or self._debug:
            self._compare_anchors(report.round_index)
        if self._debug:
            self._replicated.check(report.round_index)

    def _compare_anchors(self, round_index: int) -> None:
        check_equal(
            self._anchors, self._group, self._device, what="the anchor", round_index=round_index
        )


@dataclass(frozen=True, slots=True)
class InnerReport:
    """The result of one inner step of this replica.

    Attributes:
        step: Number of the inner step, counted from 1; skipped steps count.
        grad_norm: Global gradient norm of the replica before clipping.
        lr: Learning rate of the step.
        skipped: Whether the norm was not finite, so that nothing was updated.
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
        self._checks = checks
        self.steps = 0
        self.skipped_steps = 0
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

        Collectives: those of `inner_step` and `outer_step`; every rank of every replica calls it.
        """
        report = self.inner_step()
        self.outer_step()
        return not report.skipped, report.grad_norm, None

    @torch.no_grad()
    def inner_step(self) -> InnerReport:
        """Clip gradients and update this replica's parameters; skip if the norm is not finite.

        The norm is over the whole replica, so all its ranks skip together. A skipped step changes
        no moment and no parameter. It counts as a step, so that the schedules of all replicas stay
        aligned.

        Collectives: gradient statistics over the replica, the inner optimizer's exchange over the
        stage group, parameter all-gather over dp x cp.
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
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.skipped_steps += 1
        else:
            optimizer.step_with_ready_grads()
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
        self.last_outer = self.synchronizer.after_inner_step(
            self.steps, line_values, trained=0.0 if skipped else 1.0
        )
        if self.last_outer is not None:
            if self.last_outer.restarted_from_anchor:
                # The replica was not finite and its parameters are now the anchor's. Its moments
                # come from the non-finite trajectory.
                self.inner.zero_moments()
            if self._checks is not None:
                self._checks.after(self.last_outer)
        return self.last_outer

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
