"""`Results`: everything that a page shows, computed from the stored readings of a campaign."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .compose import exposed_per_round, relative_difference, step_seconds
from .methods import OVERLAP, SYNC_INTERVAL, TABLE, Method
from .model import costs
from .phases import Campaign
from .readings import Points, Reading, load
from .table import Row, row

__all__ = ["Overlapped", "Results", "WholeRun", "results"]

# The method without the network that computes what a data-parallel one does: same inner optimizer,
# same sequences a rank, same cores.
_LEARNS_LIKE = {"muon_dp_bf16": "muon_dp"}  # not trained: bf16 takes a CPU many times as long
_COMPUTES_LIKE = {"adamw_dp": "diloco", "muon_dp": "muloco", "muon_dp_bf16": "muloco"}


@dataclass(frozen=True, slots=True)
class Overlapped:
    """Outer steps of one method on the link of the overlap comparison.

    Attributes:
        title: Title of the method.
        round_ms: Duration of a round.
        exposed_ms: Part of a round in which training waits.
        losses: Seed -> last held-out loss.
        against_blocking: Mean paired relative difference of the losses, and half of its interval;
            ``None`` without pairs.
    """

    title: str
    round_ms: float
    exposed_ms: float
    losses: Mapping[int, float]
    against_blocking: tuple[float, float | None] | None


@dataclass(frozen=True, slots=True)
class WholeRun:
    """A training wholly on shaped links, against the composition of a short one.

    Attributes:
        title: Title of the method.
        mbit: Rate.
        measured: Seconds of the rounds after the first.
        composed: Seconds of as many steps of the short run.
        same_digest: Whether it learnt what the unshaped training learnt, bit for bit.
    """

    title: str
    mbit: float
    measured: float
    composed: float
    same_digest: bool


@dataclass(frozen=True)
class Results:
    """Contents of the page.

    Attributes:
        target: Held-out loss to reach.
        curves: Method -> held-out loss against steps.
        rows: Rate -> rows, in the order of the methods.
        overlapped: Results of phase overlap, the blocking method first; empty where it has not run.
        whole: Result of phase whole; ``None`` where it has not run.
        readings: Readings on unshaped links and on links shaped as the campaign asks.
    """

    target: float | None
    curves: Mapping[str, Points]
    rows: Mapping[float, list[Row]]
    overlapped: list[Overlapped]
    whole: WholeRun | None
    readings: list[Reading]

    @property
    def links(self) -> list[Reading]:
        """The readings on shaped links."""
        return [reading for reading in self.readings if reading.mbit is not None]


def results(campaign: Campaign, target: float | None) -> Results:
    """Return what the stored readings show; what is missing is left out.

    Args:
        campaign: Settings and place of the readings.
        target: Held-out loss to reach; ``None`` uses the largest last one, which all methods reach.
    """
    seed = campaign.seeds[0]
    trained = {m.name: load(campaign.trained(m, seed)) for m in TABLE}
    curves = {n: r.series["validation"] for n, r in trained.items() if r is not None}
    curves |= {bf16: curves[fp32] for bf16, fp32 in _LEARNS_LIKE.items() if fp32 in curves}
    if target is None and curves:
        target = max(curve[-1][1] for curve in curves.values())
    readings = [
        reading
        for path in sorted(_paths(campaign))
        if (reading := load(path)) is not None and reading.link == campaign.shaped(reading.mbit)
    ]
    return Results(
        target=target,
        curves=curves,
        rows={rate: _rows(campaign, rate, curves, target) for rate in campaign.rates},
        overlapped=_overlapped(campaign),
        whole=_whole(campaign),
        readings=readings,
    )


def _paths(campaign: Campaign) -> list[Path]:
    return [
        path
        for phase in ("train", "measure", "whole")
        for path in (campaign.out / phase).glob("*.json")
    ]


def _rows(
    campaign: Campaign, rate: float, curves: Mapping[str, Points], target: float | None
) -> list[Row]:
    rows = []
    for method in TABLE:
        reading = load(campaign.measured(method, rate))
        unshaped = load(campaign.measured(method, None))
        compute = _compute(campaign, method)
        if reading is None or unshaped is None or compute is None:
            continue
        rows.append(
            row(
                method.title,
                reading,
                unshaped,
                cost=costs(reading.changes),
                compute=compute,
                validation=curves.get(method.name, []),
                target=target,
                link_alone=method.is_bf16,
            )
        )
    return rows


def _compute(campaign: Campaign, method: Method) -> float | None:
    """Return the seconds of a step without the network.

    On a machine with fewer cores than ranks these wait for each other at every exchange, however
    fast it is. So it is the whole step on unshaped links: its own for a method with replicas; for
    data parallelism, which exchanges in every step, that of the same inner optimizer with replicas,
    but never more than its own.
    """
    own = load(campaign.measured(method, None))
    like = next((m for m in TABLE if m.name == _COMPUTES_LIKE.get(method.name)), method)
    reading = load(campaign.measured(like, None))
    if own is None or reading is None:
        return None
    seconds = step_seconds(reading, SYNC_INTERVAL)
    return min(seconds, step_seconds(own, 1)) if method.is_data_parallel else seconds


def _overlapped(campaign: Campaign) -> list[Overlapped]:
    found: list[Overlapped] = []
    for method in OVERLAP:
        reading = load(campaign.measured(method, campaign.overlap_rate))
        if reading is None and not found:
            return []  # nothing to compare with
        if reading is None:
            continue
        trained = {seed: load(campaign.trained(method, seed)) for seed in campaign.seeds}
        losses = {s: r.series["validation"][-1][1] for s, r in trained.items() if r is not None}
        pairs = sorted(losses.keys() & found[0].losses.keys()) if found else []
        difference = (
            relative_difference([losses[s] for s in pairs], [found[0].losses[s] for s in pairs])
            if pairs
            else None
        )
        round_ms = step_seconds(reading, SYNC_INTERVAL) * SYNC_INTERVAL * 1e3
        exposed = exposed_per_round(reading, SYNC_INTERVAL)
        found.append(Overlapped(method.title, round_ms, exposed, losses, difference))
    return found


def _whole(campaign: Campaign) -> WholeRun | None:
    method = OVERLAP[0]
    reading = load(campaign.whole(method))
    short = load(campaign.measured(method, campaign.whole_rate))
    trained = load(campaign.trained(method, campaign.seeds[0]))
    if reading is None or short is None or trained is None:
        return None
    steps = reading.window.last - reading.window.first
    return WholeRun(
        title=method.title,
        mbit=campaign.whole_rate,
        measured=steps * step_seconds(reading, SYNC_INTERVAL),
        composed=steps * step_seconds(short, SYNC_INTERVAL),
        same_digest=reading.digest == trained.digest,
    )
