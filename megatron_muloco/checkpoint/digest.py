"""64-bit digest of named fp32 tensors that does not depend on how they are sharded.

Every element contributes ``mix(name, index in the whole parameter, bits)``, and the contributions
are added modulo 2**64. Addition commutes, so the partial sums of any layout add up to the same
number. The digest detects differences, also after a change of layout. It does not resist an
adversary.

Source: the mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014); adding up mixed elements is a multiset hash.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_muloco.checkpoint.sharding import Cut
from megatron_muloco.params import Shard

__all__ = ["digest_sum", "model_digests", "render", "whole_index"]

# Elements hashed at a time: 8 MiB for each of the few int64 temporaries.
_CHUNK = 1 << 20


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned value; torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def model_digests(
    kinds: Mapping[str, Mapping[str, Tensor]],
    shards: Sequence[Shard],
    *,
    tensor_rank: int,
    tensor_size: int,
    all_reduce: Callable[[Tensor], None],
) -> dict[str, str]:
    """Return a digest of 16 hexadecimal digits for each kind of tensor, equal on every rank.

    Args:
        kinds: Kind -> parameter name -> this rank's flat fp32 values; the same kinds on every rank
            of the replica.
        shards: This rank's shards. Those of a replicated parameter count on its primary rank only.
        tensor_rank: This rank's index among the tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
        all_reduce: Function that sums an int64 tensor over all ranks of the replica, in place.

    Collectives: ``all_reduce`` once, 8 bytes a kind; every rank of the replica must call it.
    """
    sums = [
        digest_sum(
            [(shard, tensors[shard.name]) for shard in shards if shard.name in tensors],
            tensor_rank=tensor_rank,
            tensor_size=tensor_size,
        )
        for tensors in kinds.values()
    ]
    total = torch.cat(sums) if sums else torch.zeros(0, dtype=torch.int64)
    all_reduce(total)
    return dict(zip(kinds, map(render, total.tolist()), strict=True))


def render(total: int) -> str:
    """Return a sum as 16 hexadecimal digits."""
    return f"{total % (1 << 64):016x}"


@torch.no_grad()
def digest_sum(
    pieces: Iterable[tuple[Shard, Tensor]], *, tensor_rank: int, tensor_size: int
) -> Tensor:
    """Return this rank's part of the digest: one int64 number modulo 2**64, on the host."""
    total = torch.zeros(1, dtype=torch.int64)
    for shard, values in pieces:
        if not shard.param.is_primary:
            continue
        assert values.dtype == torch.float32, f"{shard.name} is {values.dtype}"
        cut = Cut(shard.param, tensor_rank, tensor_size)
        name = _name_hash(shard.name)
        # In chunks, because an index and a hash of 8 bytes each per element of a whole embedding
        # would not fit beside it.
        for first in range(0, shard.numel, _CHUNK):
            chunk = values.detach().view(-1)[first : first + _CHUNK]
            local = torch.arange(first, first + chunk.numel(), device=chunk.device) + shard.start
            total += _contribution(name, whole_index(cut, local), chunk).sum().cpu()
    return total


def whole_index(cut: Cut, local: Tensor) -> Tensor:
    """Return the flat index in the whole parameter of flat indices into this rank's piece."""
    # Seen from the cut dimension a flat index is (outer, along, inner). Only ``along`` changes: the
    # local one becomes (block, offset), and slice ``index`` of that block starts further in.
    shape = cut.param.local_shape
    inner = 1
    for size in shape[cut.dim + 1 :]:
        inner *= size
    length, slices = cut.slice_length, cut.slices
    rest, along = local % inner, local // inner
    outer, along = along // shape[cut.dim], along % shape[cut.dim]
    block, offset = along // length, along % length
    along = (block * slices + cut.index) * length + offset
    return (outer * (shape[cut.dim] * slices) + along) * inner + rest


def _name_hash(name: str) -> int:
    raw = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


def _contribution(name: int, index: Tensor, values: Tensor) -> Tensor:
    # The index is mixed before the bits come in; a plain sum of the two would let a change of one
    # cancel a change of the other.
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    return _mix(_mix(index * _GOLDEN + name) ^ bits)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's shift of an int64 repeats the sign bit."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
