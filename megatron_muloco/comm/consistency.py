"""Consistency checks between ranks: equal values (`check_equal`), equal shards and programs.

`check_equal` compares digests, 8 bytes per tensor, and is cheap enough for every few rounds.
Replicas must agree on the anchor bit for bit: a difference of one rounding would grow silently for
the rest of the run. `check_same_facts` and `check_same_shards` run once, before the first value is
exchanged.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_muloco.comm.collectives import gather_objects
from megatron_muloco.comm.reducers import OuterGroup, OuterPeers
from megatron_muloco.errors import ConfigError, RuntimeMismatch, SyncError
from megatron_muloco.params import Shard

__all__ = [
    "Odd",
    "check_equal",
    "check_same_facts",
    "check_same_shards",
    "digests",
    "odd_facts",
]

_SHOWN_FACTS = 4

_AT_THE_START = (
    "Replicas have to start from the same weights, or their mean is of unrelated models. Use the "
    "same training.seed or load the same checkpoint on all ranks."
)
_AFTER_A_ROUND = (
    "From here on they would drift apart. Nothing of this state is saved: resume from an earlier "
    "checkpoint; if it happens again, suspect the minority's hardware."
)


def digests(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a 64-bit hash of the bytes of each tensor, int64, in the order of the sorted names.

    The tensors are copied to the host one at a time.
    """
    values = [_digest(tensors[name]) for name in sorted(tensors)]
    return torch.tensor(values, dtype=torch.int64)


def check_equal(
    tensors: Mapping[str, Tensor],
    group: OuterPeers,
    device: torch.device,
    *,
    what: str,
    round_index: int = 0,
    step: int | None = None,
) -> None:
    """Raise on every rank of ``group`` unless all its ranks hold the same bits.

    Args:
        tensors: Tensors with the same names on each rank, for instance the anchor.
        group: The outer group, or ranks of a replica that hold copies.
        device: Device from which the group's backend sends.
        what: Name of the tensors in the message, for instance ``"the anchor"``.
        round_index: Round in the message; 0 before the first round.
        step: Inner step in the message in place of the round.

    Collectives: a blocking all-gather of 8 bytes per tensor over ``group``; all its ranks call it.

    Raises:
        SyncError: Some ranks differ. The message names the first differing parameter, the round
            and the ranks.
    """
    outer = OuterGroup(group, device)
    if outer.size == 1 or not tensors:
        return
    own = digests(tensors).to(device)
    gathered = own.new_empty(outer.size * own.numel())
    outer.wire.all_gather(gathered, own).wait()
    by_rank = gathered.view(outer.size, -1).cpu()
    differing = (by_rank != by_rank[0]).any(dim=0).nonzero().flatten().tolist()
    if differing:
        column = by_rank[:, differing[0]].tolist()
        when = f"round {round_index}" if round_index else "before the first round"
        if step is not None:
            when = f"inner step {step}"
        raise SyncError(
            f"{when}: {what} of "
            f"{sorted(tensors)[differing[0]]} differs between ranks "
            f"({_camps(column, outer.ranks)}); {len(differing)} parameters of "
            f"{len(tensors)} differ. "
            f"{_AFTER_A_ROUND if round_index or step is not None else _AT_THE_START}"
        )


def _camps(values: Sequence[int], ranks: Sequence[int]) -> str:
    """Return the ranks grouped by value, the minority named, as ``ranks [0, 1] against [2]``.

    With three or more ranks of which more than half agree, the others are ``suspect``.
    """
    camps: dict[int, list[int]] = {}
    for value, rank in zip(values, ranks, strict=True):
        camps.setdefault(value, []).append(rank)
    words = "ranks " + " against ".join(map(str, camps.values()))
    majority = max(camps.values(), key=len)
    if len(ranks) < 3 or 2 * len(majority) <= len(ranks):
        return words
    return f"{words}; suspect: {[rank for rank in ranks if rank not in majority]}"


def _digest(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    value = hashlib.blake2b(flat.numpy().data, digest_size=8).digest()
    return int.from_bytes(value, "little", signed=True)


def check_same_shards(group: OuterPeers, shards: Sequence[Shard]) -> None:
    """Raise on every rank of the outer group unless all hold the same shards in the same order.

    Reducers add elements of different replicas by their place in a flat buffer. If ranks at the
    same position held different shards, the sums would be finite, plausible and wrong.

    Args:
        group: The outer group.
        shards: This rank's shards, in the order in which they are sent.

    Collectives: a blocking gather of objects over ``group``; all its ranks call it.

    Raises:
        RuntimeMismatch: Shards differ. The message names the first difference and the ranks.
    """
    outer = OuterGroup(group, torch.device("cpu"))
    by_rank = outer.gather_objects([_description(shard) for shard in shards])
    ranks = outer.ranks
    for rank, theirs in zip(ranks, by_rank, strict=True):
        if theirs == by_rank[0]:
            continue
        pairs = zip_longest(by_rank[0], theirs, fillvalue="nothing")
        here, there = next((here, there) for here, there in pairs if here != there)
        raise RuntimeMismatch(
            f"ranks {ranks[0]} and {rank} are at the same position of their replicas, but rank "
            f"{ranks[0]} holds {here} where rank {rank} holds {there}. Their pseudogradients could "
            "not be averaged. Give every replica the same model, the same parallel sizes and the "
            "same settings of Megatron's distributed optimizer."
        )


def _description(shard: Shard) -> str:
    copy = "" if shard.param.is_primary else ", a replicated parameter"
    shape = "x".join(map(str, shard.param.local_shape))
    return f"{shard.name} [{shape}] from {shard.start} to {shard.end}{copy}"


def check_same_facts(control: ProcessGroup, facts: Mapping[str, str]) -> None:
    """Raise on every rank of the job unless all ranks run the same program on the same data.

    Ranks on machines with another copy of the code or of the data train without an error, to
    another result.

    Args:
        control: `Groups.control`.
        facts: Name -> value, such as versions and digests of files.

    Collectives: one short string from every rank of the job, and the facts of all ranks only where
    the strings differ; every rank calls it.

    Raises:
        ConfigError: Ranks differ. The message names the first rank that does, and the facts.
    """
    own = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=16).hexdigest()
    if len(set(gather_objects(control, own))) == 1:
        return
    by_rank = gather_objects(control, dict(facts))
    odd = odd_facts(by_rank)
    rank = odd[0].rank
    differing = [each for each in odd if each.rank == rank]
    usual = next(r for r in range(len(by_rank)) if r not in {each.rank for each in odd})
    listed = "".join(
        f"\n  {each.name}: {each.value}, not {each.usual}" for each in differing[:_SHOWN_FACTS]
    )
    more = f"\n  and {len(differing) - _SHOWN_FACTS} more" if len(differing) > _SHOWN_FACTS else ""
    raise ConfigError(
        f"rank {rank} runs another program or reads other data than rank {usual}:{listed}{more}\n"
        "Replicas would be trained differently without an error. Give all machines the same "
        "installation, repository and data files, for instance on a shared file system."
    )


@dataclass(frozen=True, slots=True)
class Odd:
    """A fact of one rank that most ranks have otherwise.

    Attributes:
        rank: The rank.
        name: The fact.
        value: Its value there; ``nothing`` where the rank has none.
        usual: The value of most ranks.
    """

    rank: int
    name: str
    value: str
    usual: str


def odd_facts(by_rank: Sequence[Mapping[str, str]]) -> list[Odd]:
    """Return the facts of ranks that differ from those of most, in the order of ranks and names.

    The usual facts are those that most ranks have, all of them together; of two camps of one size
    those of the camp with the lowest rank.
    """
    if not by_rank:
        return []
    camps = Counter(tuple(sorted(facts.items())) for facts in by_rank)
    usual = dict(camps.most_common(1)[0][0])  # the first of equals
    return [
        Odd(rank, name, facts.get(name, "nothing"), usual.get(name, "nothing"))
        for rank, facts in enumerate(by_rank)
        for name in sorted(facts.keys() | usual.keys())
        if facts.get(name) != usual.get(name)
    ]
