"""Known answers of a job's process groups, of one outer step and of its links, before it trains.

A run with a wrong group trains: it averages the wrong ranks. So `wrong_members` compares every
group with the topology, `wrong_sums` makes each compute a sum that the topology predicts, and
`wrong_outer_step` compares one outer step of the real reducer with `outer.reference`. `links` sends
messages between neighbours of a group, one direction at a time::

    ranks of a group    0 --> 1    2 --> 3        then back, then 1 --> 2 and 3 --> 0

`slow_links` compares links of one kind, and names the rank at which they meet.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import get_process_group_ranks, get_rank

from megatron_muloco.comm.chunking import RowPlaces, chunk_pieces, row_places
from megatron_muloco.comm.collectives import DeviceWire, HostWire, Wire, gather_objects, sum_over
from megatron_muloco.comm.consistency import digests
from megatron_muloco.comm.groups import NAMED_AXES, Groups, sends_from_host
from megatron_muloco.compress.codecs import codec_lookup
from megatron_muloco.compress.format import CodingUnit
from megatron_muloco.config import RunConfig
from megatron_muloco.config.outer import LossyCompression, NoCompression, NoOuter
from megatron_muloco.outer.optimizer import OuterNesterov
from megatron_muloco.outer.reducer import pack_metadata
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from megatron_muloco.params import ParamInfo, ParamKind, Shard
from megatron_muloco.runtime.accelerator import training_device
from megatron_muloco.training.build_optimizer import build_reducer

__all__ = [
    "Link",
    "clock_offset",
    "links",
    "reference_keys",
    "slow_links",
    "wrong_members",
    "wrong_outer_step",
    "wrong_sums",
]

# ---- groups ------------------------------------------------------------------------------


def wrong_members(groups: Groups) -> list[str]:
    """Return a sentence for each group of this rank whose members are not those of the topology.

    Collectives: none.
    """
    wrong = []
    for name, group in groups.by_name().items():
        expected = list(groups.topology.group_of(get_rank(), *NAMED_AXES[name]))
        found = get_process_group_ranks(group)
        if found != expected:
            wrong.append(f"its {name} has the ranks {found}, and the topology says {expected}")
    return wrong


def wrong_sums(groups: Groups, names: Iterable[str] = tuple(NAMED_AXES)) -> list[str]:
    """Return a sentence for each group of this rank that computes a wrong sum.

    Every rank gives its number and the square of it, from 1, so that no other set of as many ranks
    has the same sums.

    Args:
        groups: This rank's groups; their members are those of the topology.
        names: Groups to try.

    Collectives: an all-reduce of 16 bytes over each of the groups; every rank of the job calls it
    with the same names.
    """
    wrong, seen = [], set()
    for name, group in groups.by_name().items():
        expected = groups.topology.group_of(get_rank(), *NAMED_AXES[name])
        if name not in names or id(group) in seen or len(expected) == 1:
            continue
        seen.add(id(group))
        device = torch.device("cpu") if sends_from_host(group) else training_device()
        mine = torch.tensor([get_rank() + 1, (get_rank() + 1) ** 2], device=device)
        answer = sum_over(group, mine).tolist()
        right = [sum(rank + 1 for rank in expected), sum((rank + 1) ** 2 for rank in expected)]
        if answer != right:
            wrong.append(f"the {name} of the ranks {list(expected)} computes {answer}, not {right}")
    return wrong


# ---- one outer step ----------------------------------------------------------------------

_SHAPES = {
    "decoder.layers.0.mlp.linear_fc1.weight": (16, 24),
    "decoder.layers.0.input_layernorm.weight": (24,),
}
_LARGEST_VALUE = 8  # small integers, whose sums are exact in every dtype
# bf16 values are rounded to 8 bits; the rest is the order of additions in fp32.
_TOLERANCE = {"fp32": 1e-5, "bf16": 2.0**-7}


def wrong_outer_step(config: RunConfig, groups: Groups) -> str:
    """Return how one outer step of the real reducer differs from the reference; else ``""``.

    Two small tensors, with the codec and the outer optimizer of the run.

    Collectives: those of a launch and of a wait, and a gather of one number over the outer group;
    every rank of the job calls it.
    """
    outer, replicas = config.outer, groups.topology.num_replicas
    if isinstance(outer, NoOuter):
        return ""
    device = training_device()
    infos = [ParamInfo.from_name(name, shape, None) for name, shape in _SHAPES.items()]
    shards = [Shard(info, 0, info.numel) for info in infos]
    deltas = [_delta(replica) for replica in range(replicas)]
    reducer = build_reducer(outer, groups, device, shards)
    sizes = {shard.name: shard.numel for shard in shards}
    norm = pack_metadata(0.0, None)
    tensors = reducer.memory(sizes, norm.numel())
    for name, values in deltas[groups.coords.replica].items():
        tensors[name].copy_(values)
    handle = reducer.launch(0, tensors, 1.0, norm.to(device), round_index=1)
    mean = reducer.wait(handle).mean
    step = OuterNesterov(lr=outer.lr, momentum=outer.momentum)
    anchor = {}
    for name, values in mean.items():
        anchor[name] = torch.zeros_like(values)
        step.step(anchor[name], torch.zeros_like(values), values.clone(), round_index=1)
    settings = Settings(
        sync_interval=1,
        train_iters=1,
        fragments=[list(sizes)],
        outer_lr=outer.lr,
        outer_momentum=outer.momentum,
        **reference_keys(
            outer.compression,
            row_places(shards),
            {info.name: info.kind for info in infos},
            [sizes],
            replicas,
        ),
    )
    expected = _by_reference(deltas, settings)
    found = {name: values.cpu() for name, values in anchor.items()}
    wire = outer.compression.wire_dtype if isinstance(outer.compression, NoCompression) else "fp32"
    difference = max(float((found[name] - expected[name]).abs().max()) for name in sizes)
    same = gather_objects(groups.outer, digests(found).tolist())
    if any(theirs != same[0] for theirs in same):
        return "one outer step gives other anchors on other ranks of its outer group"
    if not difference <= _TOLERANCE[wire] * _LARGEST_VALUE:  # also NaN
        return f"one outer step differs from the reference by {difference:.3g}"
    return ""


def _delta(replica: int) -> Parameters:
    """Return the pseudogradient of a replica: whole numbers that every rank can compute."""
    random = torch.Generator().manual_seed(replica)
    return {
        name: torch.randint(
            -_LARGEST_VALUE, _LARGEST_VALUE + 1, (torch.Size(shape).numel(),), generator=random
        ).float()
        for name, shape in _SHAPES.items()
    }


def _by_reference(deltas: Sequence[Parameters], settings: Settings) -> Parameters:
    """Return the anchor after the outer step, from zeros."""

    def inner_step(delta: Parameters) -> Any:
        def step(local: Parameters, t: int) -> None:
            for name, values in delta.items():
                local[name].copy_(-values)

        return step

    initial = {name: torch.zeros_like(values) for name, values in deltas[0].items()}
    reference = Reference(initial, [inner_step(delta) for delta in deltas], settings)
    reference.run()
    return reference.anchor


def reference_keys(
    compression: LossyCompression | NoCompression,
    rows: RowPlaces,
    kinds: Mapping[str, ParamKind | None],
    fragments: Sequence[Mapping[str, int]],
    num_replicas: int,
) -> dict[str, Any]:
    """Return the keys of the reference's `Settings` that describe the compression.

    Args:
        compression: The section of the configuration.
        rows: Row widths and places of the tensors at one position.
        kinds: Kinds of the same tensors.
        fragments: Sizes of these tensors, fragment by fragment.
        num_replicas: K.
    """
    if isinstance(compression, NoCompression):
        return {}
    codec_of = codec_lookup(compression, kinds)

    def round_trip(name: str, start: int, values: Tensor) -> Tensor:
        width, first = rows.get(name, (0, 0))
        unit = CodingUnit(values.numel(), width, (first + start) % width if width else 0)
        out = torch.empty_like(values)
        codec_of(name).decode(codec_of(name).encode(values, unit), unit, out)
        return out

    units: dict[str, list[tuple[int, int]]] = {}
    for sizes in fragments:
        for pieces in chunk_pieces(
            list(sizes.items()), num_replicas if compression.mean_is_encoded else 1, rows
        ):
            for piece in pieces:
                units.setdefault(piece.name, []).append((piece.start, piece.end))
    return {
        "codec": round_trip,
        "coding_units": units,
        "encode_mean": compression.mean_is_encoded,
        "error_feedback": compression.error_feedback,
        "error_decay": compression.error_decay,
    }


# ---- links -------------------------------------------------------------------------------

_FIRST_BYTES, _MOST_BYTES = 1 << 20, 64 << 20
_MEASURED_SECONDS = 0.05  # of the fastest link of a kind: long against the latency
_LONGEST_SECONDS = 2.0  # of the slowest one
_REPEATS = 3  # the best counts: others may use the link or the processor
# Chosen: links of one kind on equal machines differ by less, and a stall of a loaded host by more
# than the first is shorter than the second.
_SLOW_RATIO, _SLOW_SECONDS = 4.0, 0.1


@dataclass(frozen=True)
class Link:
    """A measured direction between two neighbours of a group.

    Attributes:
        kind: Which groups it belongs to.
        source: Rank that sends.
        target: Rank that receives.
        nbytes: Bytes of the message.
        seconds: Best time until they had arrived.
    """

    kind: str
    source: int
    target: int
    nbytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / max(self.seconds, 1e-9)


def links(config: RunConfig, groups: Groups) -> list[Link]:
    """Measure the links of all groups; return those of the whole job.

    Collectives: all-to-alls with one sender each over the groups that carry most, of 1 to 64 MiB,
    and gathers over the job; every rank of the job calls it.
    """
    by_host = not isinstance(config.outer, NoOuter) and config.outer.sends_from_host
    found: list[Link] = []
    for kind, group in _measured(groups).items():
        device = training_device()
        wire: Wire = DeviceWire(group)
        if kind == "outer link" and by_host:
            wire = HostWire(group, device)
        first = _gathered(groups, _links_of(kind, group, wire, device, _FIRST_BYTES))
        if not first:  # groups of one rank, on all ranks alike
            continue
        rates = [link.rate for link in first]
        wanted = min(max(rates) * _MEASURED_SECONDS, min(rates) * _LONGEST_SECONDS, _MOST_BYTES)
        if wanted > 2 * _FIRST_BYTES:
            first = _gathered(groups, _links_of(kind, group, wire, device, int(wanted)))
        found += first
    return found


def _measured(groups: Groups) -> dict[str, Any]:
    return {
        "tensor-parallel link": groups.pg.tp,
        "dp x cp link": groups.pg.dp_cp,
        "pipeline link": groups.pg.pp,
        "outer link": groups.exchange,
    }


def _gathered(groups: Groups, own: list[Link]) -> list[Link]:
    return [link for part in gather_objects(groups.control, own) for link in part]


def _links_of(kind: str, group: Any, wire: Wire, device: torch.device, nbytes: int) -> list[Link]:
    """Measure the links to this rank from its neighbours in one group."""
    ranks = get_process_group_ranks(group)
    index, size = ranks.index(get_rank()), len(ranks)
    found = []
    for pairs in _rounds(size):
        target = dict(pairs).get(index)
        source = {receiver: sender for sender, receiver in pairs}.get(index)
        send, receive = [0] * size, [0] * size
        if target is not None:
            send[target] = nbytes
        if source is not None:
            receive[source] = nbytes
        sent = torch.zeros(sum(send), dtype=torch.uint8, device=device)
        received = torch.empty(sum(receive), dtype=torch.uint8, device=device)
        best = float("inf")
        for _ in range(_REPEATS):
            sum_over(group, torch.zeros(1, device=_reads_from(wire, device)))  # all are ready
            began = time.perf_counter()
            wire.all_to_all(received, sent, receive_splits=receive, send_splits=send).wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
        if source is not None:
            found.append(Link(kind, ranks[source], ranks[index], nbytes, best))
    return found


def _reads_from(wire: Wire, device: torch.device) -> torch.device:
    return torch.device("cpu") if isinstance(wire, HostWire) else device


def _rounds(size: int) -> list[list[tuple[int, int]]]:
    """Return pairs (sender, receiver) of a ring, by round; a rank is in one pair of a round."""
    edges = [(index, (index + 1) % size) for index in range(size if size > 2 else size - 1)]
    last = [edges.pop()] if len(edges) % 2 and len(edges) > 1 else []
    rounds = [part for part in (edges[0::2], edges[1::2], last) if part]
    return [*rounds, *([(b, a) for a, b in pairs] for pairs in rounds)]


def slow_links(found: Sequence[Link], hosts: Sequence[str]) -> dict[tuple[int, str], str]:
    """Return the slow links: (rank, kind) -> what is slow there.

    Links of one kind are compared with the fastest, those inside a host and those between hosts
    apart. A link that is slow has two ends. The one at which more slow links meet is named, or
    both.

    Args:
        found: All links of the job.
        hosts: Host of every rank.
    """
    named: dict[tuple[int, str], str] = {}
    classes: dict[tuple[str, bool], list[Link]] = {}
    for link in found:
        inside = hosts[link.source] == hosts[link.target]
        classes.setdefault((link.kind, inside), []).append(link)
    for (kind, _), members in classes.items():
        usual = max(link.rate for link in members)
        slow = [link for link in members if _is_slow(link, usual)]
        meeting = Counter(end for link in slow for end in (link.source, link.target))
        for rank in sorted(meeting):
            mine = [link for link in slow if rank in (link.source, link.target)]
            peers = sorted({link.source + link.target - rank for link in mine})
            if meeting[rank] >= max(meeting[peer] for peer in peers):
                rate = min(link.rate for link in mine)
                named[rank, kind] = (
                    f"slow link with the ranks {peers}: {_rate(rate)}, and the fastest has "
                    f"{_rate(usual)}. Look at its network interface, cable or switch."
                )
    return named


def _is_slow(link: Link, usual: float) -> bool:
    best = link.nbytes / usual
    return link.seconds > _SLOW_RATIO * best and link.seconds - best > _SLOW_SECONDS


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"


# ---- clocks ------------------------------------------------------------------------------


def clock_offset(groups_control: Any, now: Any = time.time) -> list[float]:
    """Return how far the clock of each rank is ahead of the median, in seconds.

    Ranks read their clocks right after a gather, so the result is off by what they leave it apart:
    milliseconds, more on loaded hosts. The smallest of some readings counts.

    Collectives: gathers of one number over the job; every rank of the job calls it.
    """
    readings = []
    for _ in range(_REPEATS):
        gather_objects(groups_control, 0)
        clocks = gather_objects(groups_control, now())
        middle = statistics.median_low(clocks)
        readings.append([clock - middle for clock in clocks])
    return [min(offsets, key=abs) for offsets in zip(*readings, strict=True)]
