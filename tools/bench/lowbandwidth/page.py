"""Result page of a campaign, as Markdown with a plot."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from textwrap import fill

from .commands import Link
from .methods import RANKS, SYNC_INTERVAL
from .model import parameters
from .phases import Campaign
from .plot import draw
from .probe import ALLOWED, PINGS
from .results import Overlapped, Results, WholeRun, results
from .table import Row, markdown, methods_table

__all__ = ["bars_at", "render", "write_page"]

_FAST, _BASELINE = "muloco_4bit", "muon_dp_bf16"
_BLOCKING_BAR, _EXPOSED_BAR, _LOSS_BAR = 0.30, 0.10, 0.005
_WHOLE_BAR = 0.05


def write_page(campaign: Campaign, path: Path | None, target: float | None) -> str:
    """Return the page; write it, and its plot where methods were trained, if asked."""
    found = results(campaign, target)
    drawn = path is not None and bool(found.curves)  # without trainings there is nothing to draw
    plot = path.with_suffix(".png") if path is not None and drawn else None
    page = render(campaign, found, None if plot is None else plot.name)
    if plot is not None:
        draw(found, plot)
    if path is not None:
        path.write_text(page + "\n", encoding="utf-8")
    return page


def render(campaign: Campaign, found: Results, plot: str | None) -> str:
    """Return the page as Markdown."""
    parts = ["# Training over low-bandwidth links", _introduction(campaign, found)]
    if plot is not None and any(found.rows.values()):
        parts.append(f"![loss against wall-clock, bytes sent, utilisation]({plot})")
    for rate, rows in found.rows.items():
        if rows:
            table = methods_table(rows, with_target=found.target is not None)
            parts += [f"## {rate:g} Mbit/s", table, bars_at(rows)]
    if any(found.rows.values()):
        parts.append(_prose(_COLUMNS + ("" if found.target is None else _TARGET) + _BF16))
    if found.overlapped:
        parts += [f"## Overlap, at {campaign.overlap_rate:g} Mbit/s", _overlap(found.overlapped)]
    if found.whole is not None:
        parts += ["## One training wholly on shaped links", _whole(found.whole)]
    parts += ["## Links and machine", _links(campaign, found)]
    return "\n\n".join(part for part in parts if part)


_COLUMNS = (
    "Times are milliseconds an inner step. *planned*, *counted*: kB a step that one rank sends, by "
    "the planner (`--dry-run`) and by the kernel's interface counters, which also count "
    "headers, acknowledgements and repeats, mean over the ranks; a round divided by its steps for "
    "the methods with replicas. *unshaped*: the step on links as fast as the machine. *compute*: "
    "the same with replicas; for data parallelism the unshaped step of the same inner optimizer "
    "with replicas, or its own where that is less. *floor*: compute, then the planned "
    "bytes at the nominal rate; overlap may go below it. *step*: as measured, outer steps "
    "included. *used*: utilisation, compute over step, from two runs: above 100 % the machine was "
    "faster in the second. *exposed*: share of the time that "
    "`muloco/exposed_ms` counts as waiting, slower peers and encoding included."
)
_TARGET = " *steps*, *min*: to the held-out loss above; minutes are steps times *step*."
_BF16 = (
    " (*) bf16 is slow on a CPU, which is no matter of links: its *step* is the compute time of "
    "fp32 and what the link adds to its own unshaped step, and its losses are those of the fp32 "
    "variant."
)


def _prose(text: str) -> str:
    """Return a paragraph or an item of a list in lines of at most 100 columns."""
    indent = "  " if text.startswith("- ") else ""
    return fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _introduction(campaign: Campaign, found: Results) -> str:
    changes = found.links[0].changes if found.links else []
    size = f"{parameters(changes) / 1e6:.2f}M parameters, " if changes else ""
    text = _prose(
        f"`{_command(campaign)}`: the demo's model and text, {size}{RANKS} ranks in one network "
        f"namespace each, {campaign.batch} sequences a step in all; replicas synchronise every "
        f"{SYNC_INTERVAL} steps. How to run and read it: [the guide](../guides/low_bandwidth.md)."
    )
    if found.target is None:
        return text
    return f"{text}\n\n" + _prose(
        f"Every method was trained once for {campaign.steps} steps on unshaped links and evaluated "
        f"every {SYNC_INTERVAL}; the loss to reach is {found.target:.4f} nats per token. Times are "
        "measured on shaped links and multiplied: what is learnt does not depend on the link, "
        "which the runs assert by equal digests of their final anchors."
    )


def _command(campaign: Campaign) -> str:
    options = [
        f"--steps {campaign.steps}",
        f"--batch {campaign.batch}",
        f"--seeds {' '.join(map(str, campaign.seeds))}",
        f"--rates {' '.join(f'{rate:g}' for rate in campaign.rates)}",
    ]
    if campaign.link.is_impaired:
        options += [f"--delay-ms {campaign.link.delay_ms:g}", f"--loss {campaign.link.loss:g}"]
    return f"python tools/bench/low_bandwidth.py {' '.join(options)}"


def bars_at(rows: list[Row]) -> str:
    """Return what 4 bits gain over data parallelism, and the best utilisation."""
    lines = []
    by_name = {r.name: r for r in rows}
    fast, slow = by_name.get(_FAST), by_name.get(_BASELINE)
    if fast is not None and slow is not None:
        ratio = slow.timing.wall / fast.timing.wall
        model = slow.timing.floor / fast.timing.floor
        lines.append(
            f"- {fast.title} against {slow.title}: **{ratio:.1f}x** per step; the byte model "
            f"allows {model:.1f}x, of which this is {ratio / model:.2f}. Against the floor of "
            f"{slow.title}, which collectives of least bytes would reach: "
            f"{slow.timing.floor / fast.timing.wall:.1f}x."
        )
        if fast.seconds_to_target and slow.seconds_to_target:
            gain = slow.seconds_to_target / fast.seconds_to_target
            lines.append(f"- To the held-out loss: **{gain:.1f}x**.")
    best = max(rows, key=lambda r: r.timing.utilisation)
    lines.append(f"- Best utilisation: {best.timing.utilisation:.1%}, {best.title}.")
    return "\n".join(map(_prose, lines))


def _overlap(overlapped: list[Overlapped]) -> str:
    blocking = overlapped[0]
    rows = []
    for method in overlapped:
        difference = method.against_blocking
        losses = ", ".join(f"{loss:.4f}" for loss in method.losses.values())
        cells = (
            method.title,
            f"{method.round_ms / 1e3:.2f}",
            f"{method.exposed_ms:,.0f}",
            f"{method.exposed_ms / method.round_ms:.1%}",
            f"{method.exposed_ms / blocking.exposed_ms:.1%}",
            losses or "n/a",
            "n/a" if difference is None else _difference(*difference),
        )
        rows.append(cells)
    head = ["", "round s", "exposed ms", "of the round", "of blocking", "losses", "difference"]
    seeds = ", ".join(map(str, blocking.losses)) or "n/a"
    return f"{markdown(head, rows)}\n\n" + _prose(
        f"Bars: blocking waits at least {_BLOCKING_BAR:.0%} of a round, the others at most "
        f"{_EXPOSED_BAR:.0%} of what it waits; the mean of paired differences of the last held-out "
        f"loss (seeds {seeds}; 95 % interval by Student's t) is at most {_LOSS_BAR:.1%}."
    )


def _difference(mean: float, half: float | None) -> str:
    return f"{mean:+.2%}" if half is None else f"{mean:+.2%} ± {half:.2%}"


def _whole(whole: WholeRun) -> str:
    off = whole.measured / whole.composed - 1
    digest = "equal to" if whole.same_digest else "DIFFERENT from"
    return _prose(
        f"{whole.title} at {whole.mbit:g} Mbit/s, rounds after the first: {whole.measured:.1f} s, "
        f"composed {whole.composed:.1f} s, {off:+.1%} (bar: {_WHOLE_BAR:.0%}). The digest of its "
        f"final anchor is {digest} that of the unshaped training."
    )


def _links(campaign: Campaign, found: Results) -> str:
    rows = []
    for rate in sorted({r.mbit for r in found.links if r.mbit is not None}, reverse=True):
        readings = [r for r in found.links if r.mbit == rate]
        achieved = [mbit for r in readings for link in r.achieved for mbit in link]
        echoes = [ms for r in readings for ms in r.round_trip_ms]
        algorithms = ", ".join(sorted({r.congestion_control for r in readings}))
        low, high = f"{min(achieved):.2f}", f"{max(achieved):.2f}"
        echo = f"{min(echoes):.2f} to {max(echoes):.2f}" if echoes else "n/a"
        rows.append((f"{rate:g} Mbit/s", low, high, echo, str(len(readings)), algorithms))
    head = ["link", "lowest", "highest", "echo ms", "runs", "TCP"]
    table = markdown(head, rows) if rows else ""
    commits = ", ".join(sorted({r.commit for r in found.readings}))
    machine = _prose(
        f"{platform.machine()}, {os.cpu_count()} cores for {RANKS} ranks, Linux "
        f"{platform.release()}, Python {platform.python_version()}; measured at {commits}; "
        f"{datetime.now(UTC):%Y-%m-%d}. Written by phase `report`."
    )
    return "\n\n".join(
        part for part in (table, _prose(_checks(campaign.link, found)), machine) if part
    )


def _checks(link: Link, found: Results) -> str:
    transfers = "datagrams" if link.is_impaired else "TCP"
    rates = (
        "Rates are those of Ethernet frames as the kernel counts them, all links loaded both ways "
        f"by {transfers} before each run; one that is more than {ALLOWED:.0%} off ends the "
        "measurement. "
    )
    if not link.is_impaired:
        return f"{rates}Delay and loss are not added; what there is of both is the machine's own."
    means = ", ".join(sorted({r.impaired_by for r in found.links if r.impaired_by}))
    return (
        f"{rates}{link.delay_ms:g} ms one way and a loss of {link.loss:.2%} of frames are added by "
        f"{means}, and are checked with {PINGS} echoes a rank; *echo* is their median there and "
        "back."
    )
