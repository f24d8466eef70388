#!/usr/bin/env python
"""Trains over low-bandwidth links: one network namespace a rank, joined by links shaped with tc.

Needs root (namespaces and shaping), iproute2, and the data of `make demo`. Phases, in this order;
each stores its results under ``--out`` and does not repeat them:

    train    every method once on unshaped links: held-out loss against steps
    measure  a few steps or rounds of each method at every rate: time, bytes
    overlap  blocking against overlapped outer steps at one rate
    whole    one MuLoCo training wholly on shaped links, to check the composition
    report   the table and the plot

    python tools/bench/low_bandwidth.py --phase measure report --rates 100 10 --methods muloco
    python tools/bench/low_bandwidth.py --write docs/performance/low_bandwidth.md
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from lowbandwidth import phases
from lowbandwidth.commands import Link
from lowbandwidth.lab import LabError, sweep, why_not_here
from lowbandwidth.methods import METHODS
from lowbandwidth.page import write_page
from provenance import commit

_PHASES = {
    "train": phases.train,
    "measure": phases.measure,
    "overlap": phases.overlap,
    "whole": phases.whole,
}


def main() -> int:
    """Run the phases that were asked for; 2 where no laboratory can be built here."""
    options = _parse()
    campaign = _campaign(options)
    wanted = options.phase or [*_PHASES, "report"]
    if options.sweep or any(phase in _PHASES for phase in wanted):
        reason = why_not_here()
        if reason:
            print(f"low_bandwidth: {reason}", file=sys.stderr)
            return 2
    if options.sweep:
        print("\n".join(sweep()) or "nothing was left behind")
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        for phase, run in _PHASES.items():
            if phase in wanted:
                run(campaign)
        if "report" in wanted:
            print(write_page(campaign, options.write, options.target))
    except LabError as error:
        print(f"low_bandwidth: {error}", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--phase", nargs="+", choices=[*_PHASES, "report"], help="all by default")
    add(
        "--out",
        type=Path,
        default=Path("runs/low_bandwidth"),
        help="directory of readings, logs and events",
    )
    add("--methods", nargs="+", choices=METHODS, default=[], help="all by default")
    add("--rates", nargs="+", type=float, default=[100, 10], help="rates in the table, Mbit/s")
    add("--overlap-rate", type=float, default=20, help="rate in phase overlap, Mbit/s")
    add("--whole-rate", type=float, default=10, help="rate in phase whole, Mbit/s")
    add("--delay-ms", type=float, default=0, help="delay added between two ranks, one way")
    add("--loss", type=float, default=0, help="share of frames lost between two ranks")
    add("--steps", type=int, default=600, help="inner steps of a training; a multiple of 30")
    add("--batch", type=int, default=8, help="sequences per step over the four ranks")
    add("--dp-steps", type=int, default=20, help="data-parallel steps that are measured")
    add("--rounds", type=int, default=3, help="rounds that are measured")
    add("--seeds", nargs="+", type=int, default=[42, 43, 44], help="the table shows the first")
    add("--timeout", type=float, default=3600, help="limit of one run in seconds")
    add(
        "--target",
        type=float,
        help="held-out loss to reach; by default the largest of the last ones",
    )
    add("--write", type=Path, help="result page; its plot goes beside it")
    add("--sweep", action="store_true", help="only remove what killed laboratories left")
    return parser.parse_args()


def _campaign(options: argparse.Namespace) -> phases.Campaign:
    return phases.Campaign(
        out=options.out,
        methods=tuple(options.methods),
        rates=tuple(options.rates),
        overlap_rate=options.overlap_rate,
        whole_rate=options.whole_rate,
        seeds=tuple(options.seeds),
        steps=options.steps,
        batch=options.batch,
        dp_steps=options.dp_steps,
        rounds=options.rounds,
        link=Link(None, options.delay_ms, options.loss),
        timeout=options.timeout,
        commit=commit(),
    )


def _end(number: int, _frame: FrameType | None) -> None:
    """Leave through every ``finally``; a second signal does not cut that short."""
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
