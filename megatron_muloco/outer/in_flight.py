"""`InFlight`, a fragment between its launch and its apply, in memory and in a checkpoint.

Lifetime of what a fragment in flight holds::

    launch                        wait                             apply, next launch
      at_launch (own copies) ------------------------------------>  freed after the merge
      handle ------------------->   mean (may be views of the       freed, or overwritten by the
                                    reducer's buffers) ---------->  reducer's next launch

A checkpoint between launch and apply waits for the result and stores it. Other launches may follow
before its apply, so `InFlight.wait_and_clone` moves the mean into memory of its own.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_muloco.errors import CheckpointError
from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.optimizer import check_names
from megatron_muloco.outer.reducer import Handle, Reduced, Reducer, ReductionStats, ReplicaMetadata
from megatron_muloco.outer.schedule import Apply

__all__ = ["InFlight", "InFlightTable"]


@dataclass
class InFlight:
    """A launched fragment on one rank.

    Invariant: exactly one of ``handle`` and ``reduced`` is set.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        verdict: The guard's decision for this replica.
        norm: Norm of this replica's pseudogradient; NaN if not finite.
        at_launch: Copies of the local parameters at the launch; ``None`` without overlap, where
            they cannot change before the apply.
        handle: The running reduction; ``None`` after the wait.
        reduced: The result; ``None`` before the wait.
        sketch_size: Length of the sketch at the end of this rank's metadata; ``None`` in rounds
            that do not compare replicas.
        exposed_ms: Host time spent in launch, advance and wait so far.
    """

    fragment: int
    launched_at: int
    verdict: Verdict
    norm: float
    at_launch: dict[str, Tensor] | None
    handle: Handle | None
    reduced: Reduced | None = None
    sketch_size: int | None = None
    exposed_ms: float = 0.0

    def advance(self, reducer: Reducer) -> None:
        """Let the reducer do what is due after an inner step; nothing once the result is there."""
        if self.handle is not None:
            started = time.perf_counter()
            reducer.advance(self.handle)
            self.exposed_ms += (time.perf_counter() - started) * 1e3

    def wait(self, reducer: Reducer) -> Reduced:
        """Return the result; the first call waits for it.

        The mean may be views of the reducer's buffers (`Reducer.returns_views`), which its next
        launch overwrites.
        """
        if self.reduced is None:
            assert self.handle is not None
            started = time.perf_counter()
            with record_function("muloco/wait"):
                self.reduced = reducer.wait(self.handle)
            self.exposed_ms += (time.perf_counter() - started) * 1e3
            self.handle = None
        return self.reduced

    def wait_and_clone(self, reducer: Reducer) -> Reduced:
        """Return the result in memory of its own, which later launches do not overwrite."""
        if self.handle is None:  # waited for, hence cloned, or restored from a checkpoint
            assert self.reduced is not None
            return self.reduced
        reduced = self.wait(reducer)
        if not reducer.returns_views:
            return reduced
        own = {name: tensor.clone() for name, tensor in reduced.mean.items()}
        self.reduced = Reduced(own, reduced.stats)
        return self.reduced

    def metadata(self) -> ReplicaMetadata:
        """Return the metadata of all replicas; only after `wait`."""
        assert self.reduced is not None
        return ReplicaMetadata.unpack(self.reduced.stats.metadata, self.sketch_size or 0)

    def scalars(self) -> dict[str, Any]:
        """Return everything but the tensors as plain numbers; only after `wait`.

        Bytes, times, sketches and line values are left out: they describe this start of the run.
        """
        assert self.reduced is not None
        return {
            "fragment": self.fragment,
            "launched_at": self.launched_at,
            "verdict": self.verdict.name,
            "norm": self.norm,
            "weights": self.reduced.stats.weights.tolist(),
            "norms": self.metadata().norms.tolist(),
        }

    @classmethod
    def restore(
        cls,
        scalars: Mapping[str, Any],
        names: Sequence[str],
        mean: Mapping[str, Tensor],
        at_launch: Mapping[str, Tensor],
        device: torch.device,
    ) -> "InFlight":
        """Return the fragment that `scalars` describes, with its tensors copied to ``device``."""
        weights = torch.tensor(scalars["weights"], dtype=torch.float32)
        norms = torch.tensor(scalars["norms"], dtype=torch.float32)
        stats = ReductionStats(weights, norms[:, None], wire_bytes=0)
        return cls(
            fragment=int(scalars["fragment"]),
            launched_at=int(scalars["launched_at"]),
            verdict=Verdict[scalars["verdict"]],
            norm=float(scalars["norm"]),
            at_launch={name: at_launch[name].to(device, copy=True) for name in names},
            handle=None,
            reduced=Reduced({name: mean[name].to(device, copy=True) for name in names}, stats),
        )


class InFlightTable:
    """The fragments in flight on one rank.

    Invariant: a fragment is in the table at most once.
    """

    def __init__(self) -> None:
        self._flights: dict[int, InFlight] = {}

    def add(self, flight: InFlight) -> None:
        """Add a fragment that was just launched."""
        assert flight.fragment not in self._flights, flight.fragment
        self._flights[flight.fragment] = flight

    def advance(self, reducer: Reducer) -> None:
        """Let the reducer do what is due after an inner step.

        Collectives: those of `Reducer.advance`, in the order of launches, which is the same on all
        ranks of an outer group.
        """
        for flight in self._flights.values():
            flight.advance(reducer)

    def pop(self, event: Apply) -> InFlight:
        """Remove and return the fragment that ``event`` applies."""
        flight = self._flights.pop(event.fragment)
        assert flight.launched_at == event.launched_at, (flight.launched_at, event)
        return flight

    def restart_from(self, anchor: Mapping[str, Tensor]) -> None:
        """Set all launch-time parameters to the anchor, for a replica that restarts from it.

        The replica's progress is lost, so the additive merge rule must not add the difference of
        the restarted parameters and the discarded ones.
        """
        for flight in self._flights.values():
            for name, tensor in (flight.at_launch or {}).items():
                tensor.copy_(anchor[name])

    def state_dict(self, reducer: Reducer) -> tuple[dict[str, dict[str, Tensor]], list[Any]]:
        """Wait for all fragments; return their tensors by kind and name, and their plain numbers.

        Kinds: ``mean`` and ``at_launch``.

        Collectives: `Reducer.wait` of every fragment, in the order of fragments, which is the same
        on all ranks of an outer group.
        """
        tensors: dict[str, dict[str, Tensor]] = {"mean": {}, "at_launch": {}}
        flights = [flight for _, flight in sorted(self._flights.items())]
        for flight in flights:
            tensors["mean"].update(flight.wait_and_clone(reducer).mean)
            tensors["at_launch"].update(flight.at_launch or {})
        return tensors, [flight.scalars() for flight in flights]

    def load_state_dict(
        self,
        tensors: Mapping[str, Mapping[str, Tensor]],
        entries: Sequence[Mapping[str, Any]],
        *,
        expected: Sequence[Apply],
        names: Sequence[Sequence[str]],
        device: torch.device,
    ) -> None:
        """Restore what `state_dict` returned.

        Args:
            tensors: Saved tensors by kind and name.
            entries: Saved plain numbers.
            expected: Applies that the schedule still owes after the saved step.
            names: Names of this rank's shards, by fragment.
            device: Device of the masters.

        Raises:
            CheckpointError: The saved fragments are not the expected ones, or have other names.
        """
        saved = sorted((entry["fragment"], entry["launched_at"]) for entry in entries)
        wanted = sorted((apply.fragment, apply.launched_at) for apply in expected)
        if saved != wanted:
            raise CheckpointError(
                f"outer state: the fragments in flight, as (fragment, launched at), are {saved}, "
                f"where this schedule has {wanted}. Their results could not be applied in time. "
                "Resume with the sync_interval, fragments and overlap_steps of the saved run."
            )
        in_flight = [name for apply in expected for name in names[apply.fragment]]
        check_names("mean", tensors["mean"], in_flight)
        check_names("at_launch", tensors["at_launch"], in_flight)
        self._flights = {
            entry["fragment"]: InFlight.restore(
                entry, names[entry["fragment"]], tensors["mean"], tensors["at_launch"], device
            )
            for entry in entries
        }
