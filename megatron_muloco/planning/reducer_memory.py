"""Memory that reducing one fragment takes, as the reducers of `comm` hold it.

In bytes for each of the rank's n values, with w bytes on the wire, p bytes of payload a value, K
replicas, and u values in the largest unit that is encoded at once::

                        kept between rounds    at launch     while it is waited for
    fp32 all-reduce     4                      0             0, the result is in the buffer
    in chunks           3w                     0             bf16 8; fp32 4 + about 2
    linear, statistical,
    e3m0                2p                     13 u / n      4 + p (1 + 1/K), or p / K + 17 u / n
    topk                (1 + K) p              10 u / n      4 + 6 u / n

Transport through the host keeps what travels there too. Rows of riders are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_muloco.comm.chunks import chunk_length, chunk_pieces, row_places
from megatron_muloco.config.compression import (
    CodeConfig,
    CompressionConfig,
    NoCompression,
    TopKCompression,
)
from megatron_muloco.planning.outer_traffic import chunk_payloads
from megatron_muloco.planning.slices import BYTES
from megatron_muloco.shards import Shard

__all__ = ["ReducerMemory", "reducer_memory", "residual_bytes"]

# Most that encoding a large unit takes, in bytes for each of its values: with error feedback two
# fp32 copies, codes, and what packs them. Measured on a CPU: 9 to 12.02. Blocks of a megabyte or
# two come on top; they are not counted.
_ENCODING = 13
# Top-k: 9, and 20 for each value that is kept; its place alone takes 8.
_SELECTING, _KEEPING = 10, 24


@dataclass(frozen=True, slots=True)
class ReducerMemory:
    """Bytes for one fragment.

    Attributes:
        buffers: What travels; kept between rounds.
        launching: On top while it is launched, the pseudogradients not included.
        waiting: On top while it is waited for, the result included.
        staged: Of ``buffers``, what transport through the host keeps in host memory once more.
    """

    buffers: int
    launching: int
    waiting: int
    staged: int


def reducer_memory(
    code: CompressionConfig, shards: Sequence[Shard], num_replicas: int
) -> ReducerMemory:
    """Return the bytes for a fragment of these shards."""
    elements = sum(shard.numel for shard in shards)
    if not isinstance(code, NoCompression):
        return _coded(code, shards, elements, num_replicas)
    fp32, wire = BYTES["fp32"] * elements, BYTES[code.wire_dtype] * elements
    if code.is_all_reduce:
        return ReducerMemory(buffers=fp32, launching=0, waiting=0, staged=fp32)
    pairs = num_replicas // 2  # first sums of neighbours, beside all chunks in fp32
    summing = fp32 * (num_replicas + pairs) // num_replicas
    waiting = summing if code.wire_dtype == "fp32" else 2 * fp32  # bf16: before and after weighing
    return ReducerMemory(buffers=3 * wire, launching=0, waiting=waiting, staged=2 * wire)


def _coded(
    code: CodeConfig, shards: Sequence[Shard], elements: int, num_replicas: int
) -> ReducerMemory:
    sizes = chunk_payloads(code, shards, num_replicas)
    fp32, payload = BYTES["fp32"] * elements, sum(sizes)
    unit = _largest_unit(code, shards, num_replicas)
    if isinstance(code, TopKCompression):
        buffers = (1 + num_replicas) * payload
        kept = round(_KEEPING * code.density * unit)
        return ReducerMemory(
            buffers=buffers,
            launching=_SELECTING * unit + kept,
            waiting=fp32 + 6 * unit + kept,  # the mean; one replica's values and what decodes them
            staged=buffers,
        )
    own = max(sizes)
    buffers = payload + num_replicas * own
    # The owner's encoding of its mean, or everybody's payloads and the decoded mean.
    waiting = own + max((4 + _ENCODING) * unit, payload + fp32 + 4 * unit)
    return ReducerMemory(buffers, _ENCODING * unit, waiting, staged=buffers)


def _largest_unit(code: CodeConfig, shards: Sequence[Shard], num_replicas: int) -> int:
    """Return the values of the largest unit that is encoded at once."""
    chunks = chunk_pieces(
        [(shard.name, shard.numel) for shard in shards],
        1 if isinstance(code, TopKCompression) else num_replicas,
        row_places(shards),
    )
    return max((piece.unit.numel for pieces in chunks for piece in pieces), default=0)


def residual_bytes(
    code: CompressionConfig, fragments: Sequence[Sequence[Shard]], num_replicas: int
) -> int:
    """Return what error feedback keeps, in fp32.

    e of all the rank's values; except for top-k, which is encoded once, f of the chunks it owns.
    """
    if isinstance(code, NoCompression) or not code.error_feedback:
        return 0
    kept = 0
    for shards in fragments:
        sizes = [(shard.name, shard.numel) for shard in shards]
        elements = sum(size for _, size in sizes)
        kept += elements
        if not isinstance(code, TopKCompression):
            kept += min(elements, chunk_length(sizes, num_replicas))
    return BYTES["fp32"] * kept
