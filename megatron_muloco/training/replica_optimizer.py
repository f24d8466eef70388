"""`ReplicaOptimizer`: a Megatron optimizer whose step also makes the outer steps that are due.

It delegates to Megatron's optimizer and never lives inside it: the inner step and its skip decision
come first, then the outer step writes masters and publishes them, before the next forward pass::

    step()  =  inner_step()                clip, skip if not finite, update theta_k
               outer_step()                launch and apply what the schedule says
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.consistency import check_equal
from megatron_muloco.comm.replicated import ReplicatedBroadcast
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


# ------------------------------------------------------------------------------------------
# Are replicas the same where they have to be? Asked after outer steps, never between them.


class OuterChecks:
    """Compares anchors over replicas, and in debug mode duplicates inside them.

    Args:
        anchors: Of this rank's shards; the live tensors.
        duplicates: Of this rank's masters.
        group: The outer group.
        device: What the group's backend sends from.
        interval: Rounds between comparisons of the anchors; 0 is off.
        debug: Compare anchors and duplicates after every outer step instead.
    """

    def __init__(
        self,
        anchors: Mapping[str, Tensor],
        duplicates: ReplicatedBroadcast,
        group: ProcessGroup,
        device: torch.device,
        *,
        interval: int,
        debug: bool,
    ) -> None:
        self._anchors, self._duplicates = anchors, duplicates
        self._group, self._device = group, device
        self._interval, self._debug = interval, debug

    def after(self, report: OuterReport) -> None:
        """Compare what is due after an outer step.

        Raises:
            SyncError: Names the first differing parameter, the round and the ranks.

        Collectives: 8 bytes a parameter over the outer group where a comparison is due; in debug
        mode also the duplicates over their ranks. Every rank calls it after every outer step.
        """
        # Each fragment is launched once a round; the first one stands for its round.
        in_turn = any(
            self._interval and part.fragment == 0 and part.round_index % self._interval == 0
            for part in report.applied
        )
        if in_turn or (self._debug and report.applied):
            self._compare_anchors(report.round_index)
        if self._debug and report.applied:
            self._duplicates.check(report.round_index)

    def at_the_end(self, report: OuterReport) -> None:
        """Compare once more after the flush, also in runs that are shorter than the interval."""
        if self._interval or self._debug:
            self._compare_anchors(report.round_index)
        if self._debug:
            self._duplicates.check(report.round_index)

    def _compare_anchors(self, round_index: int) -> None:
        check_equal(
            self._anchors, self._group, self._device, what="the anchor", round_index=round_index
        )


# ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InnerReport:
    """What one inner step did on this replica.

    Attributes:
        step: The inner step, 1-based; skipped steps count.
        grad_norm: Global gradient norm of the replica before clipping.
        lr: Learning rate of the step.
        skipped: The norm was not finite and nothing was updated.
    """

    step: int
    grad_norm: float
    lr: float
    skipped: bool


class ReplicaOptimizer:
    """Inner and outer steps of one rank behind Megatron's optimizer interface.

    Attributes that it does not have itself (``param_groups``, ``zero_grad``,
    ``chained_optimizers``, checkpoint calls) are those of the optimizer it was built around.
    Learning rate and weight decay of every inner step are set here from the configuration, so no
    parameter scheduler is needed beside it.

    Args:
        optimizer: What Megatron built; its distributed optimizer holds ``inner``.
        view: Masters of this rank.
        inner: The bound inner optimizer.
        synchronizer: The outer step; ``None`` for plain data parallelism.
        checks: What compares replicas after outer steps; with a synchronizer only.
        config: The run.
        derived: What follows from it in this world.
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
        """When outer steps are due; ``None`` for plain data parallelism."""
        return None if self.synchronizer is None else self.synchronizer.schedule

    def waits_after(self, step: int) -> bool:
        """Whether this replica may wait for others after inner step ``step``.

        A launch counts too: whatever waits for the whole device afterwards waits for its peers.
        """
        schedule = self.schedule
        return schedule is not None and bool(schedule.events(step))

    def __getattr__(self, name: str) -> Any:
        """Answer for the optimizer underneath."""
        return getattr(self.__dict__["_optimizer"], name)

    def step(self) -> tuple[bool, float, int | None]:
        """Make one inner step and the outer steps due after it.

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
        """Clip, and update this replica's parameters unless its gradient norm is not finite.

        The norm is the replica's, so all its ranks skip together; a skipped step changes no moment
        and no parameter, and counts, so that replicas stay in step.

        Collectives: gradient statistics over the replica, the inner optimizer's exchange over the
        stage group, parameter all-gather over dp x cp.
        """
        if self.steps == 0:
            self._check_start()
        self.steps += 1
        lr = self._set_hyperparameters(self.steps)
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
        """Make the outer steps due after the last inner step; ``None`` when nothing was due.

        A replica found non-finite has taken the anchor; its moments are forgotten with it.

        Args:
            line_values: fp32 numbers to send to the other replicas; the same count at every call.

        Collectives: over outer groups and replicas when something is due, none otherwise.
        """
        if self.synchronizer is None:
            return None
        skipped = self.last_inner is not None and self.last_inner.skipped
        self.last_outer = self.synchronizer.after_inner_step(
            self.steps, line_values, trained=0.0 if skipped else 1.0
        )
        if self.last_outer is not None:
            if self.last_outer.restarted_from_anchor:
                self.inner.zero_moments()
            if self._checks is not None:
                self._checks.after(self.last_outer)
        return self.last_outer

    def flush(self) -> OuterReport | None:
        """Bring all replicas together after the last inner step of the run."""
        if self.synchronizer is None:
            return None
        report = self.synchronizer.flush()
        if self._checks is not None:
            self._checks.at_the_end(report)
        return report

    def _check_start(self) -> None:
        """Refuse weights that were loaded after the anchor was taken from the masters.

        Raises:
            RuntimeMismatch: The first pseudogradient would be the difference of two models.
        """
        anchors = {} if self.synchronizer is None else self.synchronizer.anchors()
        for name, anchor in anchors.items():
            master = self.view.masters[name].to(anchor.device)
            if not torch.equal(anchor.view(torch.int32), master.view(torch.int32)):
                raise RuntimeMismatch(
                    f"{name} changed between wrap_optimizer and the first step, so the anchor "
                    "holds other values than the model. Load weights before wrap_optimizer."
                )

    def _set_hyperparameters(self, step: int) -> float:
        """Write learning rate and weight decay of ``step`` into every parameter group."""
        lr = learning_rate(self._config.inner, self.derived.train_iters, step)
        for group in self.inner.param_groups:
            group["lr"] = lr * group["lr_mult"]
            group["weight_decay"] = self.derived.weight_decay * group["wd_mult"]
        return lr
