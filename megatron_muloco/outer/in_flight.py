"""A fragment between its launch and its apply, in memory and in a checkpoint."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.errors import CheckpointError
from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.optimizer import check_names
from megatron_muloco.outer.reducer import Handle, Reduced, Reducer, ReductionStats, ReplicaMetadata
from megatron_muloco.outer.schedule import Apply

__all__ = ["InFlight", "InFlightTable"]


@dataclass
class InFlight:
    """A launched fragment.

    Attributes:
        fragment: Index of the fragment.
        launched_at: Inner step after which it was launched.
        verdict: The guard's word on this replica.
        norm: Norm of this replica's pseudogradient; NaN if not finite.
        at_launch: Copy of the local parameters at the launch; ``None`` without overlap, where they
            cannot change before the apply.
        handle: The running reduction; ``None`` once it was waited for.
        reduced: Its result, once it was waited for.
        sketch_size: Numbers of this rank's sketch at the end of the metadata; ``None`` where the
            round does not compare replicas.
        exposed_ms: Host time spent on it so far.
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

    def wait(self, reducer: Reducer) -> Reduced:
        """Return the result; the first call waits for it, and borrows the reducer's memory."""
        if self.reduced is None:
            assert self.handle is not None
            started = time.perf_counter()
            self.reduced = reducer.wait(self.handle)
            self.exposed_ms += (time.perf_counter() - started) * 1e3
            self.handle = None
        return self.reduced

    def wait_and_clone(self, reducer: Reducer) -> Reduced:
        """Return the result in memory of its own, so that it outlives later launches."""
        if self.handle is None:
            assert self.reduced is not None
            return self.reduced
        reduced = self.wait(reducer)
        if not reducer.returns_views:
            return reduced
        own = {name: tensor.clone() for name, tensor in reduced.mean.items()}
        self.reduced = Reduced(own, reduced.stats)
        return self.reduced

    def metadata(self) -> ReplicaMetadata:
        """Return what every replica showed beside the tensors; after `wait`."""
        assert self.reduced is not None
        return ReplicaMetadata.unpack(self.reduced.stats.metadata, self.sketch_size or 0)

    def scalars(self) -> dict[str, Any]:
        """Return everything but the tensors, as plain numbers; settled fragments only.

        Bytes, times, sketches and the caller's metadata are left out: they belong to this start.
        """
        assert self.reduced is not None
        shown = self.metadata()
        return {
            "fragment": self.fragment,
            "launched_at": self.launched_at,
            "verdict": self.verdict.name,
            "norm": self.norm,
            "weights": self.reduced.stats.weights.tolist(),
            "norms": shown.norms.tolist(),
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
        """Return the fragment that `scalars` described; its tensors are copied to ``device``."""
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
    """The fragments in flight on one rank; a fragment is in it at most once."""

    def __init__(self) -> None:
        self._flights: dict[int, InFlight] = {}

    def add(self, flight: InFlight) -> None:
        """Enter a fragment that was just launched."""
        assert flight.fragment not in self._flights, flight.fragment
        self._flights[flight.fragment] = flight

    def pop(self, event: Apply) -> InFlight:
        """Remove and return the fragment that is due."""
        flight = self._flights.pop(event.fragment)
        assert flight.launched_at == event.launched_at, (flight.launched_at, event)
        return flight

    def restart_from(self, anchor: Mapping[str, Tensor]) -> None:
        """Pretend that all were launched from the anchor: this replica's progress is forgotten."""
        for flight in self._flights.values():
            for name, tensor in (flight.at_launch or {}).items():
                tensor.copy_(anchor[name])

    def state_dict(self, reducer: Reducer) -> tuple[dict[str, dict[str, Tensor]], list[Any]]:
        """Wait for all; return their tensors (``mean``, ``at_launch``) and their plain numbers."""
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
            tensors: By kind and name.
            entries: The plain numbers.
            expected: What the schedule has in flight at that time.
            names: This rank's names, by fragment.
            device: Where the masters are.

        Raises:
            CheckpointError: The saved fragments are not the expected ones, or hold other names.
        """
        saved = sorted((entry["fragment"], entry["launched_at"]) for entry in entries)
        wanted = sorted((apply.fragment, apply.launched_at) for apply in expected)
        if saved != wanted:
            raise CheckpointError(
                f"outer state: the fragments in flight, as (fragment, launched at), are {saved}, "
                f"where this schedule has {wanted}. Their results could not be applied in time. "
                "Resume with the sync_interval, fragments and overlap_steps of the saved run."
            )
        travelling = [name for apply in expected for name in names[apply.fragment]]
        check_names("mean", tensors["mean"], travelling)
        check_names("at_launch", tensors["at_launch"], travelling)
        self._flights = {
            entry["fragment"]: InFlight.restore(
                entry, names[entry["fragment"]], tensors["mean"], tensors["at_launch"], device
            )
            for entry in entries
        }
