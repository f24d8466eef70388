"""K replicas as threads of one process: the synchronizer without processes or collectives.

Each thread has a `Synchronizer` over whole tensors, and `Exchange` replaces the network. It adds up
launches in replica order, as the reference does, so results can be compared bit for bit, also on
numbers that are not integers.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_muloco.comm.reducers import new_memory
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.guard import Guard
from megatron_muloco.outer.optimizer import Additive, MergeRule, Mix, OuterNesterov
from megatron_muloco.outer.reducer import Reduced, Reducer, ReductionStats, Residuals, Sizes
from megatron_muloco.outer.reference import Parameters, Settings
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.outer.synchronizer import ReplicaPort, Synchronizer
from megatron_muloco.params import ParamInfo, Shard

__all__ = [
    "Exchange",
    "ExchangeReducer",
    "Replica",
    "in_lockstep",
    "merge_rule",
    "synchronizer_of",
    "whole_shard",
]

Result = TypeVar("Result")
InnerStep = Callable[[Parameters, int], None]
WAIT_S = 30.0


@dataclass(frozen=True)
class Ticket:
    """A launched fragment: ``number`` counts the launches of this replica."""

    fragment: int
    number: int
    tensors: dict[str, Tensor]


class Exchange:
    """Network between the K replicas of this process."""

    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._sent: dict[int, dict[int, tuple[dict[str, Tensor], float, Tensor]]] = {}
        self._arrived = threading.Condition()

    def send(
        self, number: int, replica: int, data: tuple[dict[str, Tensor], float, Tensor]
    ) -> None:
        """Deliver one replica's launch."""
        with self._arrived:
            self._sent.setdefault(number, {})[replica] = data
            self._arrived.notify_all()

    def receive(self, number: int) -> list[tuple[dict[str, Tensor], float, Tensor]]:
        """Wait until all replicas have launched, and return what they sent in replica order."""
        with self._arrived:
            complete = self._arrived.wait_for(
                lambda: len(self._sent.get(number, {})) == self.num_replicas, timeout=WAIT_S
            )
            assert complete, f"launch {number} came from {sorted(self._sent.get(number, {}))} only"
            return [self._sent[number][replica] for replica in range(self.num_replicas)]


class ExchangeReducer:
    """The reducer of one replica; it keeps no residuals."""

    residual_names = ()
    returns_views = False

    def __init__(self, exchange: Exchange, replica: int) -> None:
        self.exchange, self.replica = exchange, replica
        self.launches = 0

    def memory(self, sizes: Sizes, metadata_count: int) -> dict[str, Tensor]:
        """See `Reducer.memory`."""
        return new_memory(sizes, torch.device("cpu"))

    def launch(
        self,
        fragment: int,
        tensors: Mapping[str, Tensor],
        weight: float,
        metadata: Tensor,
        *,
        round_index: int,
    ) -> Ticket:
        """See `Reducer.launch`."""
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        ticket = Ticket(fragment, self.launches, copies)
        self.exchange.send(ticket.number, self.replica, (copies, weight, metadata.clone()))
        self.launches += 1
        return ticket

    def advance(self, handle: Any) -> None:
        """See `Reducer.advance`."""

    def wait(self, handle: Any) -> Reduced:
        """See `Reducer.wait`."""
        received = self.exchange.receive(handle.number)
        mean = {}
        for name, tensor in handle.tensors.items():
            usable = [(tensors[name], weight) for tensors, weight, _ in received if weight]
            total = torch.zeros_like(tensor)
            for count, (term, weight) in enumerate(usable):
                total = total + weight * term if count else weight * term
            weight_sum = sum(weight for _, weight in usable)
            mean[name] = total / weight_sum if usable else total
        weights = torch.tensor([weight for _, weight, _ in received])
        metadata = torch.stack([metadata for _, _, metadata in received])
        return Reduced(mean, ReductionStats(weights, metadata, wire_bytes=0))

    def forget_residual(self) -> None:
        """See `Reducer.forget_residual`."""

    def residuals(self, fragments: Sequence[Sizes]) -> Residuals:
        """See `Reducer.residuals`."""
        return {}

    def load_residuals(self, residuals: Residuals, fragments: Sequence[Sizes]) -> None:
        """See `Reducer.load_residuals`."""


@dataclass
class Replica:
    """One replica of a test: its parameters, and the number of times they were published."""

    parameters: Parameters
    published: int = 0

    def port(self) -> ReplicaPort:
        """Return the port of a replica that is a single rank."""

        def publish() -> None:
            self.published += 1

        return ReplicaPort(
            device=torch.device("cpu"),
            shards=[whole_shard(name, tensor) for name, tensor in self.parameters.items()],
            masters=self.parameters,
            total=torch.clone,
            broadcast_replicated=lambda names: None,
            publish=publish,
        )


def whole_shard(name: str, tensor: Tensor, *, is_primary: bool = True) -> Shard:
    """Return the shard that is all of a flat tensor."""
    info = ParamInfo.from_name(name, tuple(tensor.shape), partition_dim=None, is_primary=is_primary)
    return Shard(info, 0, tensor.numel())


def merge_rule(settings: Settings) -> MergeRule:
    """Return the merge rule of the reference's settings."""
    return Additive() if settings.additive else Mix(settings.mixing_weight)


def synchronizer_of(
    port: ReplicaPort,
    settings: Settings,
    reducer: Reducer,
    num_replicas: int,
    plain_reducer: Reducer | None = None,
    *,
    guard: Guard | None = None,
    **options: Any,
) -> Synchronizer:
    """Return the synchronizer that has to agree with the reference with ``settings``."""
    return Synchronizer(
        port,
        FragmentPlan(tuple(tuple(group) for group in settings.fragments)),
        SyncSchedule(
            sync_interval=settings.sync_interval,
            train_iters=settings.train_iters,
            fragment_count=len(settings.fragments),
            overlap_steps=settings.overlap_steps,
        ),
        OuterNesterov(settings.outer_lr, settings.outer_momentum),
        merge_rule(settings),
        reducer,
        plain_reducer or reducer,
        guard or Guard(num_replicas),
        **options,
    )


def in_lockstep(
    body: Callable[[int, ExchangeReducer], Result], num_replicas: int
) -> Sequence[Result]:
    """Run ``body(replica, reducer)`` for all replicas at once; return their results in order."""
    exchange = Exchange(num_replicas)
    with ThreadPoolExecutor(num_replicas) as pool:
        running = [
            pool.submit(body, replica, ExchangeReducer(exchange, replica))
            for replica in range(num_replicas)
        ]
        return [future.result(timeout=WAIT_S) for future in running]
