"""Bytes that the exchange of matrices keeps between steps: `optim.exchange`'s buffers."""

from megatron_muloco.config.inner import MuonInner
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.optim.assignment import assign
from megatron_muloco.optim.chunks import divide, largest_batch
from megatron_muloco.planning.slices import BYTES
from megatron_muloco.planning.stage_units import stage_units
from megatron_muloco.planning.traffic import planned_on_accelerator
from megatron_muloco.topology import Topology

__all__ = ["exchange_bytes"]


def exchange_bytes(config: RunConfig, topology: Topology) -> int:
    """Return the bytes of the fullest rank; 0 without Muon.

    Updates come back in fp32, for each element that the rank holds, taken as an even share. On the
    wire's side are what it sends (as many elements), what it gets as an owner (those of its units),
    and the matrices of the largest batch that it computes. A stage of one rank sends nothing. All
    pipeline stages have equal matrices.
    """
    if not isinstance(config.inner, MuonInner):
        return 0
    accelerator = planned_on_accelerator(config)
    wire = BYTES[config.inner.muon.wire_dtype(accelerator=accelerator)]
    units = stage_units(config, topology, accelerator=accelerator)
    ranks = topology.stage_size
    held = -(-sum(unit.numel for unit in units) // ranks)
    if ranks == 1:
        return 4 * held + wire * largest_batch(units)
    owners = assign(units, ranks).owners
    chunks = divide(units, owners, config.inner.muon.exchange_chunks)
    as_owner = 0
    for rank in range(ranks):
        owned = [[units[i] for i in chunk if owners[i] == rank] for chunk in chunks]
        received = sum(unit.numel for chunk in owned for unit in chunk)
        as_owner = max(as_owner, received + max(map(largest_batch, owned), default=0))
    return (4 + wire) * held + wire * as_owner
