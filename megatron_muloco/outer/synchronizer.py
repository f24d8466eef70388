"""The outer step of one rank: launches and applies fragments when the schedule says so.

Each rank works on exactly the shards whose masters it holds and meets only the ranks at the same
position of the other replicas. The order of an inner step is

    optimizer.step() -> synchronizer.after_inner_step(t) -> next forward

and inside it, for each due event (`reference.py` has the same lines for whole replicas)::

    launch   D_k = anchor - local;  w_k = guard(D_k);  reducer.launch(w_k, D_k)
    apply    D = reducer.wait();  u, anchor = optimizer(u, anchor, D);  local = merge(local, anchor)

then, once for all events: duplicates take their owners' values, masters go to model parameters.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    OuterNesterov,
    check_names,
    copy_to,
    overwrite,
)
from megatron_muloco.outer.reducer import Reducer, pack_metadata
from megatron_muloco.outer.schedule import Apply, Average, Launch, SyncSchedule
from megatron_muloco.params import Shard

__all__ = ["ReplicaPort", "Synchronizer"]


# ------------------------------------------------------------------------------------------
# What the outer step needs from the replica that it works for.


@dataclass(frozen=True)
class ReplicaPort:
    """One rank's access to its replica.

    All callables are collective over the replica: every one of its ranks calls them in the same
    order, also ranks without shards of the fragment at hand.

    Attributes:
        device: Where the masters are.
        shards: This rank's pieces, in an order that is the same at the same position of every
            replica. Pieces of parameters marked ``duplicate`` are not synchronised here.
        masters: Name to flat fp32 tensor of ``shard.numel`` elements; possibly views of parameters.
        total: Sums a small fp64 tensor over the ranks of the replica and returns the sum; bitwise
            equal on all of them.
        broadcast_replicated: Gives the duplicates of the named parameters their owners' values,
            from masters to masters.
        publish: Copies masters to model parameters and gathers what other ranks need.
    """

    device: torch.device
    shards: Sequence[Shard]
    masters: Mapping[str, Tensor]
    total: Callable[[Tensor], Tensor]
    broadcast_replicated: Callable[[Collection[str]], None]
    publish: Callable[[], None]

    def owned_names(self) -> tuple[str, ...]:
        """Return the names that this rank synchronises, in the order of ``shards``."""
        return tuple(shard.name for shard in self.shards if not shard.param.duplicate)


# ------------------------------------------------------------------------------------------


class Synchronizer:
    """Owns anchor and outer momentum of this rank's shards, and the fragments in flight.

    Invariant: between two calls, the anchor of every shard is bitwise the same at this position of
    all replicas, and ``step`` inner steps have been seen.

    Args:
        replica: Masters, and the collectives inside the replica.
        plan: Which names travel together; may also name parameters that other ranks hold.
        schedule: When.
        optimizer: The outer optimizer.
        merge: How local parameters take a new anchor.
        reducer: How pseudogradients are averaged over replicas.
        plain_reducer: An fp32 mean without codec, for the flush; may be the same object.
        guard: Weighs replicas.
        state_device: Where anchor and momentum live; the masters' device by default. Host memory
            is pinned where the masters are on an accelerator, and visits it one shard at a time.
        sketch: Compares the replicas' pseudogradients; ``None`` does not.
        weigh_by_tokens: Weigh a replica by the share of the interval's tokens that it trained on;
            otherwise all replicas weigh the same.

    Collectives: `after_inner_step`, `flush`, `state_dict` and `anchor_loaded` are called by all
    ranks of all replicas (the last one: of a replica) after the same inner step.
    """

    def __init__(
        self,
        replica: ReplicaPort,
        plan: FragmentPlan,
        schedule: SyncSchedule,
        optimizer: OuterNesterov,
        merge: MergeRule,
        reducer: Reducer,
        plain_reducer: Reducer,
        guard: Guard,
        *,
        state_device: torch.device | None = None,
        sketch: PseudogradientSketch | None = None,
        weigh_by_tokens: bool = False,
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
        self._weigh_by_tokens = weigh_by_tokens
        self._progress = [Progress() for _ in self._owned]
        self.step = 0

    @property
    def schedule(self) -> SyncSchedule:
        """When outer steps are due."""
        return self._schedule

    # ---- time -------------------------------------------------------------------------------

    @torch.no_grad()
    def after_inner_step(
        self, step: int, line_values: Tensor | None = None, *, trained: float = 1.0
    ) -> OuterReport | None:
        """Do what is due after inner step ``step``; return what happened, ``None`` if nothing was.

        Args:
            step: The inner step that has just been made, 1-based; one more than at the last call.
            line_values: 1-D fp32 numbers to send to the other replicas with this step's launches,
                for instance the loss; always the same count.
            trained: Share of the step's tokens that this replica trained on; 0 for a skipped step.
        """
        assert step == self.step + 1, f"inner step {step} follows {self.step}"
        self.step = step
        for progress in self._progress:
            progress.add(trained)
        events = self._schedule.events(step)
        if not events:
            return None
        launched: list[InFlight] = []
        applied: list[FragmentReport] = []
        for event in events:
            if isinstance(event, Launch):
                launched.append(self._launch(event.fragment, line_values))
            else:
                applied.append(self._apply(event))
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
        )

    @torch.no_grad()
    def flush(self) -> OuterReport:
        """Bring the replicas together after the last inner step of the run; see the schedule."""
        assert self.step == self._schedule.train_iters, f"flush after inner step {self.step}"
        applied = [
            self._average(event.fragment) if isinstance(event, Average) else self._apply(event)
            for event in self._schedule.flush_events()
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
        deltas = self._pseudogradients(fragment)
        verdict, norm = self._guard.judge_replica(
            fragment,
            deltas,
            self._replica.total,
            self._replica.device,
            use_band=self._schedule.repeats_interval(self.step, fragment),
        )
        share = self._progress[fragment].take()
        round_index = self._schedule.round(self.step)
        sketch = None
        if self._sketch is not None and self._sketch.is_due(round_index):
            sketch = self._sketch(deltas)
        started = time.perf_counter()
        handle = self._reducer.launch(
            fragment,
            deltas,
            verdict.weight * (share if self._weigh_by_tokens else 1.0),
            pack_metadata(norm, line_values, sketch),
            round_index=round_index,
        )
        flight = InFlight(
            fragment=fragment,
            launched_at=self.step,
            verdict=verdict,
            norm=norm,
            at_launch=self._snapshot(fragment) if self._schedule.overlap_steps else None,
            handle=handle,
            sketch_size=None if sketch is None else sketch.numel(),
            exposed_ms=(time.perf_counter() - started) * 1e3,
        )
        self._in_flight.add(flight)
        if verdict is Verdict.NON_FINITE:
            self._take_anchor()
        return flight

    def _apply(self, event: Apply) -> FragmentReport:
        flight = self._in_flight.pop(event)
        reduced = flight.wait(self._reducer)
        if self._schedule.is_full_interval(flight.launched_at):
            self._guard.observe(flight.fragment, flight.metadata().norms.tolist())
        usable = bool(reduced.stats.weights.any())
        round_index = self._schedule.round(flight.launched_at)
        diagnostics = FragmentDiagnostics(flight, self._sketch, self._replica.device)
        for name in self._owned[flight.fragment]:
            local = self._replica.masters[name]
            at_launch = local if flight.at_launch is None else flight.at_launch[name]
            mean = reduced.mean[name]
            own = self._state.pseudogradient(name, at_launch)
            dot, mean_square = torch.dot(own, mean), torch.dot(mean, mean)
            if usable:  # leaves in ``mean`` what it takes off the anchor
                anchor = self._state.step(name, mean, self._optimizer, round_index)
            else:
                anchor = self._state.anchor_on(local.device, name)
            diagnostics.add(dot, mean_square, torch.dot(mean, mean))
            self._merge.merge(local, anchor, at_launch)
        return diagnostics.report(self._replica.total, round_index)

    def _average(self, fragment: int) -> FragmentReport:
        """Set anchor and local parameters of a fragment to the mean of the local parameters."""
        deltas = self._pseudogradients(fragment)
        verdict, norm = self._guard.judge_replica(
            fragment, deltas, self._replica.total, self._replica.device, use_band=False
        )
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

    def _pseudogradients(self, fragment: int) -> dict[str, Tensor]:
        return {
            name: self._state.pseudogradient(name, self._replica.masters[name])
            for name in self._owned[fragment]
        }

    def _snapshot(self, fragment: int) -> dict[str, Tensor]:
        return {name: self._replica.masters[name].clone() for name in self._owned[fragment]}

    def _take_anchor(self) -> None:
        """Restart this replica from the anchor everywhere; progress in flight is forgotten."""
        overwrite(self._replica.masters, self._state.anchor)
        self._in_flight.restart_from(self._state.anchor)
        self._reducer.forget_residual()
        for progress in self._progress:
            progress.restart()

    def _load_residuals(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the residuals of a checkpoint; a kind that it does not have starts from zeros."""
        found = {k: tensors[k] for k in self._reducer.residual_names if tensors.get(k)}
        for kind, residuals in found.items():
            check_names(kind, residuals, self._state.anchor)
        self._reducer.load_residuals(found, self._sizes)

    def _publish(self, names: tuple[str, ...]) -> None:
        self._replica.broadcast_replicated(names)
        self._replica.publish()

    def _names_of(self, applied: list[FragmentReport]) -> tuple[str, ...]:
        fragments = self._plan.fragments
        return tuple(name for report in applied for name in fragments[report.fragment])

    # ---- state ------------------------------------------------------------------------------

    def anchors(self) -> Mapping[str, Tensor]:
        """Return the anchor by name, flat, for the shards that this rank owns; read only."""
        return self._state.anchor

    @contextmanager
    def anchor_loaded(self) -> Iterator[None]:
        """Let the model hold the anchor, then put every local parameter back bit for bit.

        Inside, the masters hold the anchor as well. After an exception only the masters are put
        back, without a collective: the other ranks may not be in the same place.
        """
        masters = self._replica.masters
        # In host memory: the device holds no second set of masters beside the evaluation.
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

        Kinds: ``anchor`` and ``momentum`` of every shard owned here; ``mean`` and ``at_launch`` of
        fragments in flight, for which this call waits; with error feedback ``residual``, and
        ``owner_residual``, which is the same on all replicas. The tensors are the live ones.

        Collectives: those of `Reducer.wait` and `Reducer.residuals`.
        """
        tensors, entries = self._in_flight.state_dict(self._reducer)
        tensors |= {"anchor": dict(self._state.anchor), "momentum": dict(self._state.momentum)}
        tensors |= {k: dict(each) for k, each in self._reducer.residuals(self._sizes).items()}
        return {"tensors": tensors, "scalars": self._scalars(entries)}

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of tensors that `state_dict` returns."""
        return ("anchor", "momentum", "mean", "at_launch", *self._reducer.residual_names)

    def scalars(self) -> dict[str, Any]:
        """Return the plain numbers of `state_dict`; waits for the fragments in flight."""
        _, entries = self._in_flight.state_dict(self._reducer)
        return self._scalars(entries)

    def _scalars(self, in_flight: list[Any]) -> dict[str, Any]:
        return {
            "step": self.step,
            "guard": self._guard.state_dict(),
            "in_flight": in_flight,
            "progress": [progress.state_dict() for progress in self._progress],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, into this object's own memory.

        Raises:
            CheckpointError: Names differ, or the fragments in flight are not those that this
                schedule has in flight after the saved step.
        """
        tensors, scalars = state["tensors"], state["scalars"]
        step = int(scalars["step"])
        self._state.load(tensors["anchor"], tensors["momentum"])
        self._in_flight.load_state_dict(
            tensors,
            scalars["in_flight"],
            expected=self._schedule.in_flight(step),
            names=self._owned,
            device=self._replica.device,
        )
        self._load_residuals(tensors)
        self._guard.load_state_dict(scalars["guard"])
        self._progress = [Progress(**entry) for entry in scalars["progress"]]
        self.step = step
