"""`Synchronizer`, which launches and applies fragments on one rank when the schedule says so.

Each rank works on the shards whose masters it holds, and exchanges data only with the ranks at the
same position of the other replicas. The order of an inner step is::

    optimizer.step() -> synchronizer.after_inner_step(t) -> next forward

For each due event (`reference.py` has the same lines for whole replicas)::

    launch   D_k = anchor - local;  w_k = guard(D_k);  reducer.launch(w_k, D_k)
    apply    D = reducer.wait();  u, anchor = optimizer(u, anchor, D);  local = merge(local, anchor)

Then, once for all events of the step, replicated parameters are broadcast from their primary rank
and masters are copied to model parameters. `ReplicaPort` is the access to the replica that this
needs.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_muloco.errors import ConfigError
from megatron_muloco.outer.diagnostics import (
    FragmentDiagnostics,
    FragmentReport,
    OuterReport,
    PseudogradientSketch,
)
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard, Progress, Verdict
from megatron_muloco.outer.in_flight import InFlight, InFlightTable
from megatron_muloco.outer.optimizer import (
    AnchorState,
    MergeRule,
    OuterOptimizer,
    check_names,
    copy_to,
    overwrite,
)
from megatron_muloco.outer.reducer import Reducer, metadata_count, pack_metadata
from megatron_muloco.outer.schedule import Apply, Average, Launch, SyncSchedule
from megatron_muloco.params import Shard

__all__ = ["LaunchObserver", "ReplicaPort", "Synchronizer"]


class LaunchObserver(Protocol):
    """Sees what this rank trained, before it is sent; it changes nothing and does not communicate.

    Tensors are live: the observer copies what it keeps.
    """

    def inner_step(
        self, step: int, masters: Mapping[str, Tensor], anchors: Mapping[str, Tensor]
    ) -> None:
        """See masters and anchors after inner step ``step``, before its launches and applies."""

    def launch(
        self, step: int, fragment: int, pseudogradients: Mapping[str, Tensor], *, finite: bool
    ) -> None:
        """See the pseudogradient of a fragment; ``finite`` is the guard's verdict on it."""


@dataclass(frozen=True)
class ReplicaPort:
    """One rank's access to its replica: master parameters and the collectives inside the replica.

    All callables are collective over the replica: all its ranks call them in the same order, also
    ranks without shards of the current fragment.

    Attributes:
        device: Device of the masters.
        shards: This rank's shards, in the same order at equal positions of all replicas. Shards of
            replicated parameters are synchronised on their primary rank only.
        masters: Flat fp32 tensors of ``shard.numel`` elements by name; possibly views of
            parameters.
        total: Sums a small fp64 tensor over the ranks of the replica; the result is bitwise equal
            on all of them.
        broadcast_replicated: Copies the masters of the named replicated parameters from their
            primary rank to the masters of the other ranks that hold them.
        publish: Copies masters to model parameters and all-gathers them where ranks need more than
            their own shards.
    """

    device: torch.device
    shards: Sequence[Shard]
    masters: Mapping[str, Tensor]
    total: Callable[[Tensor], Tensor]
    broadcast_replicated: Callable[[Collection[str]], None]
    publish: Callable[[], None]

    def owned_names(self) -> tuple[str, ...]:
        """Return the names that this rank synchronises, in the order of ``shards``."""
        return tuple(shard.name for shard in self.shards if shard.param.is_primary)


class Synchronizer:
    """Makes the outer steps of one rank; owns its anchor, outer momentum and fragments in flight.

    Invariant: between two calls the anchor of every shard is bitwise the same at this position of
    all replicas, and ``step`` inner steps have been counted.

    Args:
        replica: Masters, and the collectives inside the replica.
        plan: Fragments; may also contain parameters that only other ranks hold.
        schedule: Launches and applies by inner step.
        optimizer: The outer optimizer.
        merge: Rule by which local parameters take a new anchor.
        reducer: Weighted mean over the outer group.
        plain_reducer: Uncompressed fp32 mean, for the flush; may be the same object.
        guard: Decides which replicas enter a mean.
        state_device: Device of anchor and momentum, by default that of the masters. On the host of
            an accelerator the memory is pinned, and one shard at a time is copied to the device.
        sketch: Sketch for comparing the replicas' pseudogradients; ``None`` does not compare.
        learning_rate: Inner learning rate of an inner step, by which the guard divides norms; a
            constant by default. A pure function, equal on all ranks.
        weigh_by_tokens: Whether a replica's weight is the share of the interval's tokens that it
            trained on; otherwise all usable replicas have weight 1.
        observer: Sees inner steps and launches; ``None`` without one.

    Collectives: all ranks of all replicas call `after_inner_step`, `flush` and `state_dict` after
    the same inner step; all ranks of one replica call `anchor_loaded`. Each event uses a collective
    of the replica (the guard's or the report's sum) and one of the outer group (the reduction). If
    two ranks disagreed on the order of events, one would wait in its replica's sum for a rank that
    waits in an outer group for its peers, and neither would return. The order is therefore a
    function of the inner step, never of data, time or what a rank holds.
    """

    def __init__(
        self,
        replica: ReplicaPort,
        plan: FragmentPlan,
        schedule: SyncSchedule,
        optimizer: OuterOptimizer,
        merge: MergeRule,
        reducer: Reducer,
        plain_reducer: Reducer,
        guard: Guard,
        *,
        state_device: torch.device | None = None,
        sketch: PseudogradientSketch | None = None,
        learning_rate: Callable[[int], float] = lambda step: 1.0,
        weigh_by_tokens: bool = False,
        observer: LaunchObserver | None = None,
    ) -> None:
        if plan.count != schedule.fragment_count:
            raise ConfigError(
                f"the plan has {plan.count} fragments and the schedule {schedule.fragment_count}"
            )
        self._replica, self._plan, self._schedule = replica, plan, schedule
        self._optimizer, self._merge, self._guard = optimizer, merge, guard
        self._reducer, self._plain_reducer = reducer, plain_reducer
        self._sketch = sketch
        owned = frozenset(replica.owned_names())
        self._owned = tuple(
            tuple(name for name in group if name in owned)
            for group in plan.members(shard.name for shard in replica.shards)
        )
        masters = {name: replica.masters[name] for name in replica.owned_names()}
        self._state = AnchorState(masters, state_device or replica.device)
        self._sizes = [{name: masters[name].numel() for name in group} for group in self._owned]
        self._in_flight = InFlightTable()
        self._learning_rate = learning_rate
        self._weigh_by_tokens = weigh_by_tokens
        self._observer = observer
        self._progress = [Progress() for _ in self._owned]
        self.step = 0
        self._began = 0

    @property
    def schedule(self) -> SyncSchedule:
        """Launches and applies by inner step."""
        return self._schedule

    # ---- entry points -----------------------------------------------------------------------

    @torch.no_grad()
    def after_inner_step(
        self, step: int, line_values: Tensor | None = None, *, trained: float = 1.0
    ) -> OuterReport | None:
        """Make the launches and applies due after inner step ``step``; report them, if any.

        Args:
            step: The inner step just made, 1-based; one more than at the previous call.
            line_values: 1-D fp32 numbers sent to the other replicas with this step's launches, for
                instance the loss; the same count at every launch.
            trained: Share of the step's tokens that this replica trained on; 0 for a skipped step.
                A replica that trained on nothing in an interval has weight 0 in its mean.

        Returns:
            The report; ``None`` if nothing was due.

        Raises:
            SyncError: A reduction failed.

        Collectives: `Reducer.advance` of the fragments in flight; those of the events over replica
        and outer group, then `ReplicaPort`'s broadcast and publish once.
        """
        assert step == self.step + 1, f"inner step {step} follows {self.step}"
        self.step = step
        for progress in self._progress:
            progress.add(trained)
        if self._observer is not None:
            self._observer.inner_step(step, self._replica.masters, self._state.anchor)
        # Before the events, and whether or not there are any: its collectives then come at the same
        # place among all others on every rank.
        self._in_flight.advance(self._reducer)
        events = [event for event in self._schedule.events(step) if self._is_owed(event)]
        if not events:
            return None
        launched: list[InFlight] = []
        applied: list[FragmentReport] = []
        for event in events:  # their order is part of the algorithm: `SyncSchedule.events`
            if isinstance(event, Launch):
                with record_function("muloco/launch"):
                    launched.append(self._launch(event.fragment, line_values))
            else:
                with record_function("muloco/apply"):
                    applied.append(self._apply(event))
        # Parameters are published once for all events: publishing is an all-gather over the
        # replica. Whether it happens is the same on all ranks of a replica, because the verdict is.
        restarted_from_anchor = any(flight.verdict is Verdict.NON_FINITE for flight in launched)
        changed = self._plan.names() if restarted_from_anchor else self._names_of(applied)
        if changed:
            self._publish(changed)
        return OuterReport(
            step=step,
            round_index=self._schedule.round(step),
            launched=tuple(flight.fragment for flight in launched),
            applied=tuple(applied),
            restarted_from_anchor=restarted_from_anchor,
            exhausted=self._guard.exhausted(report.fragment for report in applied),
        )

    @property
    def empty_rounds(self) -> int:
        """Rounds in a row, up to now, with fewer usable replicas than the guard needs."""
        return self._guard.empty_rounds

    @torch.no_grad()
    def roll_back(self) -> None:
        """Set this replica's parameters to the anchor, in all fragments, between two inner steps.

        What it trained since the last apply is lost, and does not count as trained. Residuals of
        error feedback stay: they are of rounds that the other replicas have.

        Collectives: broadcast and publish over the replica; all its ranks call it after the same
        inner step, before `after_inner_step`.
        """
        self._take_anchor()
        self._publish(self._plan.names())

    @torch.no_grad()
    def flush(self) -> OuterReport:
        """Leave all replicas with the same parameters after the last inner step of the run.

        Runs `SyncSchedule.flush_events`; the report's ``applied`` also has the averaged fragments.

        Collectives: as `after_inner_step`; called once, by all ranks of all replicas.
        """
        assert self.step == self._schedule.train_iters, f"flush after inner step {self.step}"
        applied = [
            self._average(event.fragment) if isinstance(event, Average) else self._apply(event)
            for event in self._schedule.flush_events()
            if self._is_owed(event)
        ]
        if applied:
            self._publish(self._names_of(applied))
        return OuterReport(
            step=self.step,
            round_index=self._schedule.round(self.step),
            launched=(),
            applied=tuple(applied),
            restarted_from_anchor=any(report.verdict is Verdict.NON_FINITE for report in applied),
        )

    # ---- events -----------------------------------------------------------------------------

    def _launch(self, fragment: int, line_values: Tensor | None) -> InFlight:
        """Start the reduction of a fragment's pseudogradient."""
        round_index = self._schedule.round(self.step)
        sketches = self._sketch if self._sketch and self._sketch.is_due(round_index) else None
        # D_k = theta - theta_k in the reducer's memory. It may read that until the wait, while
        # training changes the masters, and model parameters may be views of those.
        sketch_size = sketches.width if sketches and self._owned[fragment] else 0
        sizes = {name: self._replica.masters[name].numel() for name in self._owned[fragment]}
        deltas = self._reducer.memory(sizes, metadata_count(line_values, sketch_size))
        for name, delta in deltas.items():
            self._state.pseudogradient(name, self._replica.masters[name], out=delta)
        verdict, norm = self._guard.judge_replica(
            fragment,
            deltas,
            self._replica.total,
            self._replica.device,
            lr_sum=self._lr_sum(self.step, fragment)
            if self._guard.has_band and self._schedule.repeats_interval(self.step, fragment)
            else None,
        )
        if self._observer is not None:  # before the launch, from which on the reducer has them
            finite = verdict is not Verdict.NON_FINITE
            self._observer.launch(self.step, fragment, deltas, finite=finite)
        # Start counting the next interval even where the share is not used as a weight.
        share = self._progress[fragment].take()
        if verdict is Verdict.GOOD and not share:
            verdict = Verdict.IDLE
        sketch = sketches(deltas) if sketches else None
        started = time.perf_counter()
        handle = self._reducer.launch(
            fragment,
            deltas,
            verdict.weight * (share if self._weigh_by_tokens else 1.0),
            # The norm of a replica that did not train is no norm for the guard's median.
            pack_metadata(math.nan if verdict is Verdict.IDLE else norm, line_values, sketch),
            round_index=round_index,
        )
        flight = InFlight(
            fragment=fragment,
            launched_at=self.step,
            verdict=verdict,
            norm=norm,
            # Only with overlap can the local parameters change before the apply.
            at_launch=self._snapshot(fragment) if self._schedule.overlap_steps else None,
            handle=handle,
            sketch_size=None if sketch is None else sketch.numel(),
            exposed_ms=(time.perf_counter() - started) * 1e3,
        )
        self._in_flight.add(flight)
        # After the launch and after `add`: this replica still takes part in the collective, with
        # weight 0, and its own launch-time copy of the parameters must become the anchor too.
        if verdict is Verdict.NON_FINITE:
            self._restart_from_anchor()
        return flight

    def _apply(self, event: Apply) -> FragmentReport:
        """Wait for a fragment's mean, step its anchor, and merge it into the local parameters."""
        flight = self._in_flight.pop(event)
        # From here to the end of this method the mean may alias the reducer's buffers. Nothing is
        # launched in between, so they are not overwritten, and the outer step may work in them.
        reduced = flight.wait(self._reducer)
        # After the wait, not at the launch: all replicas then see the same norms, hence all ranks
        # keep the same medians. The first, shorter intervals would set them too low.
        if self._guard.has_band and self._is_full_interval(flight):
            norms = flight.metadata().norms.tolist()
            lr_sum = self._lr_sum(flight.launched_at, flight.fragment)
            weights = reduced.stats.weights.tolist()
            self._guard.observe(flight.fragment, norms, lr_sum=lr_sum, weights=weights)
        usable = bool(reduced.stats.weights.any())
        self._guard.count_usable(flight.fragment, int((reduced.stats.weights > 0).sum()))
        # lr and momentum of the round of the launch: with overlap the apply may be in the next one.
        round_index = self._schedule.round(flight.launched_at)
        diagnostics = FragmentDiagnostics(flight, self._sketch, self._replica.device)
        for name in self._owned[flight.fragment]:
            local = self._replica.masters[name]
            at_launch = local if flight.at_launch is None else flight.at_launch[name]
            mean = reduced.mean[name]
            # D_k again, for the cosine: the anchor has not changed since the launch, as a fragment
            # is never in flight twice. Cheaper than keeping the launched buffer alive.
            own = self._state.pseudogradient(name, at_launch)
            dot, mean_square = torch.dot(own, mean), torch.dot(mean, mean)
            if usable:  # overwrites ``mean`` with the amount subtracted from the anchor
                anchor = self._state.step(name, mean, self._optimizer, round_index)
            else:  # no usable replica: neither anchor nor momentum changes; ``mean`` is zero
                anchor = self._state.anchor_on(local.device, name)
            diagnostics.add(dot, mean_square, torch.dot(mean, mean))
            self._merge.merge(local, anchor, at_launch)
        return diagnostics.report(
            self._replica.total, round_index, empty_rounds=self._guard.empty(flight.fragment)
        )

    def _average(self, fragment: int) -> FragmentReport:
        """Set anchor and local parameters of a fragment to the mean of the local parameters.

        The parameters themselves are reduced, not pseudogradients: the result is exactly the mean,
        without the rounding of ``theta - (theta - mean)``.
        """
        deltas = {
            name: self._state.pseudogradient(name, self._replica.masters[name])
            for name in self._owned[fragment]
        }
        verdict, norm = self._guard.judge_replica(
            fragment, deltas, self._replica.total, self._replica.device, lr_sum=None
        )
        if verdict is Verdict.GOOD and not self._progress[fragment].trained:
            verdict = Verdict.IDLE
        round_index = self._schedule.round(self.step)
        flight = InFlight(
            fragment=fragment,
            launched_at=self.step,
            verdict=verdict,
            norm=norm,
            at_launch=None,
            handle=self._plain_reducer.launch(
                fragment,
                {name: self._replica.masters[name] for name in self._owned[fragment]},
                verdict.weight,
                pack_metadata(norm, None),
                round_index=round_index,
            ),
        )
        reduced = flight.wait(self._plain_reducer)
        diagnostics = FragmentDiagnostics(flight, self._sketch, self._replica.device)
        for name in self._owned[fragment]:
            if reduced.stats.weights.any():
                mean = reduced.mean[name]
                update = self._state.pseudogradient(name, mean)
                square = torch.dot(update, update)
                diagnostics.add(torch.dot(deltas[name], update), square, square)
                self._state.anchor[name].copy_(mean)
            self._replica.masters[name].copy_(self._state.anchor[name])
        return diagnostics.report(self._replica.total, round_index)

    # ---- parts of events --------------------------------------------------------------------

    def _is_owed(self, event: Launch | Apply | Average) -> bool:
        """Whether an event is due; the applies of launches before the first step here are not."""
        return not isinstance(event, Apply) or event.launched_at > self._began

    def _is_full_interval(self, flight: InFlight) -> bool:
        """Whether a launch covers a full interval that was trained with outer steps."""
        before = self._schedule.last_launch(flight.launched_at - 1, flight.fragment)
        return self._schedule.is_full_interval(flight.launched_at) and before >= self._began

    def _lr_sum(self, launched_at: int, fragment: int) -> float:
        """Return the sum of the inner learning rates whose steps a launched pseudogradient holds.

        Steps between the previous launch and its apply count by the share that the merge kept.
        """
        launch = self._schedule.last_launch(launched_at - 1, fragment)
        before = max(launch, self._began)
        applied = launch + self._schedule.overlap_steps if launch > self._began else before
        kept = self._merge.kept_progress
        return math.fsum(
            self._learning_rate(step) * (1.0 if step > applied else kept)
            for step in range(before + 1, launched_at + 1)
        )

    def _snapshot(self, fragment: int) -> dict[str, Tensor]:
        return {name: self._replica.masters[name].clone() for name in self._owned[fragment]}

    def _restart_from_anchor(self) -> None:
        """Restart this replica from the anchor in all fragments.

        In all, not only in the one that was found: a model with one fragment of the anchor and the
        rest not finite would stay broken. Fragments in flight keep the weight that was sent.
        """
        self._take_anchor()
        self._reducer.forget_residual()

    def _take_anchor(self) -> None:
        overwrite(self._replica.masters, self._state.anchor)
        self._in_flight.restart_from(self._state.anchor)
        for progress in self._progress:
            progress.restart()

    def _load_residuals(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the residuals of a checkpoint; kinds that it does not have start from zeros."""
        found = {k: tensors[k] for k in self._reducer.residual_names if tensors.get(k)}
        for kind, residuals in found.items():
            check_names(kind, residuals, self._state.anchor)
        self._reducer.load_residuals(found, self._sizes)

    def _publish(self, names: tuple[str, ...]) -> None:
        """Copy changed masters to the replicated parameters of other ranks, then to the model."""
        with record_function("muloco/publish"):
            self._replica.broadcast_replicated(names)
            self._replica.publish()

    def _names_of(self, applied: list[FragmentReport]) -> tuple[str, ...]:
        fragments = self._plan.fragments
        return tuple(name for report in applied for name in fragments[report.fragment])

    # ---- state ------------------------------------------------------------------------------

    def anchors(self) -> Mapping[str, Tensor]:
        """Return the anchor of the shards that this rank synchronises, by name, flat; read only."""
        return self._state.anchor

    def momenta(self) -> Mapping[str, Tensor]:
        """Return the outer momentum of these shards, by name, flat; read only."""
        return self._state.momentum

    @contextmanager
    def anchor_loaded(self) -> Iterator[None]:
        """Put the anchor into masters and model; restore local parameters bit for bit afterwards.

        After an exception only the masters are restored, without a collective: the other ranks may
        not have failed at the same place.

        Collectives: broadcast and publish over the replica, at entry; publish at exit.
        """
        masters = self._replica.masters
        # Kept in host memory, so that evaluation needs no second set of masters on the device.
        kept = {name: copy_to(torch.device("cpu"), local) for name, local in masters.items()}
        try:
            overwrite(masters, self._state.anchor)
            self._publish(self._plan.names())
            yield
        finally:
            overwrite(masters, kept)
        self._replica.publish()

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"tensors": {kind: {name: flat tensor}}, "scalars": plain numbers}``.

        Kinds: ``anchor`` and ``momentum`` of every shard synchronised here; ``mean`` and
        ``at_launch`` of fragments in flight, for which this call waits; with error feedback
        ``residual``, and ``owner_residual``, which is the same on all replicas. The tensors are the
        live ones, not copies.

        Collectives: those of `Reducer.wait` and `Reducer.residuals`; called by all ranks of all
        replicas after the same inner step.
        """
        # First wait for what is in flight: the residuals are complete only after that.
        tensors, entries = self._in_flight.state_dict(self._reducer)
        tensors |= {"anchor": dict(self._state.anchor), "momentum": dict(self._state.momentum)}
        tensors |= {k: dict(each) for k, each in self._reducer.residuals(self._sizes).items()}
        return {"tensors": tensors, "scalars": self._scalars(entries)}

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of tensors that `state_dict` returns."""
        return ("anchor", "momentum", "mean", "at_launch", *self._reducer.residual_names)

    def scalars(self) -> dict[str, Any]:
        """Return the plain numbers of `state_dict`; waits for the fragments in flight.

        Collectives: those of `Reducer.wait`.
        """
        _, entries = self._in_flight.state_dict(self._reducer)
        return self._scalars(entries)

    def _scalars(self, in_flight: list[Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "began": self._began,
            "guard": self._guard.state_dict(),
            "in_flight": in_flight,
            "progress": [progress.state_dict() for progress in self._progress],
        }

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Begin outer steps after inner step ``step``: the anchor is the masters as they are.

        Momentum and residuals are zero and nothing is in flight. `SyncSchedule` stays a function of
        the step alone, so the first round may be shorter, and results of launches before it are
        never applied.
        """
        anchor = {name: self._replica.masters[name].detach() for name in self._state.anchor}
        self._state.load(anchor, {name: torch.zeros_like(t) for name, t in anchor.items()})
        self._in_flight = InFlightTable()
        self._reducer.load_residuals({}, self._sizes)
        self._guard.load_state_dict({})
        self._progress = [Progress() for _ in self._owned]
        self.step = self._began = step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy what `state_dict` returned into this object's own memory.

        Raises:
            CheckpointError: Names differ, or the saved fragments in flight are not those of this
                schedule after the saved step.
        """
        tensors, scalars = state["tensors"], state["scalars"]
        step = int(scalars["step"])
        self._began = int(scalars.get("began", 0))
        self._state.load(tensors["anchor"], tensors["momentum"])
        self._in_flight.load_state_dict(
            tensors,
            scalars["in_flight"],
            expected=[apply for apply in self._schedule.in_flight(step) if self._is_owed(apply)],
            names=self._owned,
            device=self._replica.device,
        )
        self._load_residuals(tensors)
        self._guard.load_state_dict(scalars["guard"])
        self._progress = [Progress(**entry) for entry in scalars["progress"]]
        self.step = step
