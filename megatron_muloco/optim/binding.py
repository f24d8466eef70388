"""What each flat tensor of the inner optimizer is, checked from both sides before the first step.

The param groups hold the masters of Megatron's DistributedOptimizer; the plan (table and exchange)
is built from names and ranges. A shard that one of them knows and the other does not would silently
stay behind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.exchange import ShardExchange
from megatron_muloco.optim.parameter_table import ParameterTable
from megatron_muloco.shards import Shard, coverage

__all__ = ["BoundShard", "bind_shards", "check_exchange"]


@dataclass(frozen=True, slots=True)
class BoundShard:
    """One flat tensor that the optimizer updates, and what it is a piece of."""

    name: str
    tensor: Tensor
    matrix: bool

    @property
    def exchanged(self) -> bool:
        """Whether elements of it take part in the exchange."""
        return self.matrix and self.tensor.numel() > 0


def bind_shards(
    groups: Sequence[Sequence[Tensor]],
    shards: Iterable[tuple[Tensor, Shard]],
    table: ParameterTable,
) -> list[list[BoundShard]]:
    """Return what each tensor of each param group is.

    Args:
        groups: The tensors of the param groups.
        shards: The same tensor objects with their shards, in any order.
        table: The stage's parameters.

    Raises:
        RuntimeMismatch: A tensor without shard, a shard without tensor, or one of a wrong shape.
    """
    by_id = {id(tensor): shard for tensor, shard in shards}
    bound = [[_bind(tensor, by_id, table) for tensor in group] for group in groups]
    flat = list(chain.from_iterable(bound))
    held = {id(b.tensor) for b in flat}
    missing = sorted(shard.name for key, shard in by_id.items() if key not in held)
    names = [b.name for b in flat]
    _, repeated = coverage(names, names)
    if missing or repeated:
        raise RuntimeMismatch(
            "the inner optimizer's param groups do not hold each shard of this rank once: missing "
            f"{missing}, more than once {repeated}"
        )
    return bound


def _bind(tensor: Tensor, by_id: Mapping[int, Shard], table: ParameterTable) -> BoundShard:
    """Return what a tensor of a param group is, or say why it cannot be that."""
    if id(tensor) not in by_id:
        raise RuntimeMismatch(
            f"a tensor of shape {tuple(tensor.shape)} in the inner optimizer's param groups has no "
            "shard; every tensor must be bound."
        )
    shard = by_id[id(tensor)]
    if shard.name not in table.routes:
        raise RuntimeMismatch(f"{shard.name} is not in the parameter table of this stage")
    if tensor.shape != (shard.numel,) or tensor.dtype != torch.float32:
        raise RuntimeMismatch(
            f"{shard.name}: the master must be a flat float32 tensor of {shard.numel} elements, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return BoundShard(shard.name, tensor, table.routes[shard.name] == "matrix")


def check_exchange(
    table: ParameterTable, exchange: ShardExchange | None, bound: Iterable[Sequence[BoundShard]]
) -> None:
    """Refuse an exchange that moves other units than the table plans or other shards than bound.

    Raises:
        RuntimeMismatch: Units or shards missing or unknown, or owned by another rank than planned.
    """
    moved = [unit.name for unit in exchange.units] if exchange else []
    missing, surplus = coverage(moved, [unit.name for unit in table.units])
    owned = [unit.name for unit in exchange.owned] if exchange else []
    planned = table.owned_by(exchange.rank) if exchange else ()
    absent, foreign = coverage(owned, planned)
    if missing or surplus or absent or foreign:
        raise RuntimeMismatch(
            "exchange and parameter table disagree, so a matrix would be left without Muon: units "
            f"missing {missing}, not planned {surplus}; of this rank, missing {absent}, of others "
            f"{foreign}"
        )
    held = exchange.shard_names if exchange else ()
    lost, unknown = coverage((b.name for b in chain.from_iterable(bound) if b.exchanged), held)
    if lost or unknown:
        raise RuntimeMismatch(
            "param groups and exchange disagree about the matrix shards of this rank: without "
            f"tensor {lost}, unknown to the exchange {unknown}"
        )
