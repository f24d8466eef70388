"""Are these tensors the same bits on all ranks of a group? Cheap enough to ask every few rounds.

Eight bytes a tensor travel. Replicas must agree on the anchor bit for bit: a difference of one
rounding would grow silently for the rest of the run.
"""

import hashlib
from collections.abc import Mapping, Sequence

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_process_group_ranks

from megatron_muloco.errors import SyncError

__all__ = ["check_equal", "digests"]

_AT_THE_START = (
    "Replicas have to start from the same weights, or their mean is of unrelated models. Use the "
    "same training.seed or load the same checkpoint on all ranks."
)
_AFTER_A_ROUND = (
    "From here on replicas would drift apart. Resume from a checkpoint before this round; if it "
    "happens again, suspect the minority's hardware."
)


def digests(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return one int64 a tensor, a hash of its bytes, in the order of the sorted names.

    Tensors are visited one at a time and copied to the host for it.
    """
    values = [_digest(tensors[name]) for name in sorted(tensors)]
    return torch.tensor(values, dtype=torch.int64)


def check_equal(
    tensors: Mapping[str, Tensor],
    group: ProcessGroup,
    device: torch.device,
    *,
    what: str,
    round_index: int,
) -> None:
    """Raise on every rank of ``group`` unless all its ranks hold the same bits.

    Args:
        tensors: The same names on each rank, for instance the anchor of equal positions.
        group: The outer group, or the holders of a duplicate inside a replica.
        device: What the group's backend sends from.
        what: For the message, for instance ``"the anchor"``.
        round_index: For the message; 0 before the first round.

    Collectives: a blocking all-gather over ``group`` of 8 bytes a tensor; all its ranks call it.

    Raises:
        SyncError: Names the first differing parameter, the round and the ranks.
    """
    size = dist.get_world_size(group)
    if size == 1 or not tensors:
        return
    own = digests(tensors).to(device)
    gathered = own.new_empty(size * own.numel())
    dist.all_gather_into_tensor(gathered, own, group=group)
    by_rank = gathered.view(size, -1).cpu()
    differing = (by_rank != by_rank[0]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        column = by_rank[:, differing[0]].tolist()
        raise SyncError(
            f"{f'round {round_index}' if round_index else 'before the first round'}: {what} of "
            f"{sorted(tensors)[differing[0]]} differs between ranks "
            f"({_camps(column, get_process_group_ranks(group))}); {len(differing)} parameters of "
            f"{len(tensors)} differ. {_AFTER_A_ROUND if round_index else _AT_THE_START}"
        )


def _camps(values: Sequence[int], ranks: Sequence[int]) -> str:
    """Return ``ranks [0, 1] against [2]``."""
    camps: dict[int, list[int]] = {}
    for value, rank in zip(values, ranks, strict=True):
        camps.setdefault(value, []).append(rank)
    return "ranks " + " against ".join(map(str, camps.values()))


def _digest(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    value = hashlib.blake2b(flat.numpy().data, digest_size=8).digest()
    return int.from_bytes(value, "little", signed=True)
