"""`Reading`: the measurements of one run, as plain numbers that are stored and loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .commands import Link
from .counters import bytes_at
from .runs import Run

__all__ = ["Links", "Reading", "Window", "load", "read_run", "store"]

_DIGEST = re.compile(r"final anchor digest: ([0-9a-f]+)")
_SERIES = {
    "step_s": "iteration-time",
    "round_ms": "muloco/round_ms",
    "exposed_ms": "muloco/exposed_ms",
    "wire_bytes": "muloco/wire_bytes",
    "validation": "lm loss validation",
}

Points = list[tuple[int, float]]
"""(inner step, value), in order."""


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a run that is measured: after inner step ``first``, up to ``last``."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Links:
    """Shape and measured rates of a run's links.

    Attributes:
        mbit: Nominal rate, ``None`` for unshaped ones.
        delay_ms: Delay added between two ranks, one way.
        loss: Share of frames that is dropped between two ranks.
        impaired_by: Program that delays and drops frames: ``netem``, ``relay``, or nothing.
        achieved: Rank -> (up, down) as probed before the run, in Mbit/s.
        round_trip_ms: Rank -> median of echoes from the next rank, as probed before the run; empty
            without delay and loss.
        congestion_control: Congestion control of TCP.
    """

    mbit: float | None
    delay_ms: float = 0.0
    loss: float = 0.0
    impaired_by: str = ""
    achieved: list[tuple[float, float]]
    round_trip_ms: list[float] = field(default_factory=list)
    congestion_control: str

    @property
    def link(self) -> Link:
        """How each was shaped."""
        return Link(self.mbit, self.delay_ms, self.loss)


@dataclass(frozen=True, kw_only=True)
class Reading(Links):
    """One run.

    Attributes:
        method: Name of the method.
        changes: Changes to the config.
        window: Measured part of the run.
        digest: Digest of the anchor at the end.
        series: Name of a series -> its points: seconds of inner steps (``step_s``), milliseconds of
            rounds and of exposed communication, bytes in outer steps by rank 0, held-out loss.
        sent: Bytes that the kernel counted out of each rank within the window.
        received: Bytes that the kernel counted into each rank within the window.
        seconds: Duration of the whole run, start-up included.
        commit: Commit of the program.
    """

    method: str
    changes: list[str]
    window: Window
    digest: str
    series: dict[str, Points]
    sent: list[float] = field(default_factory=list)
    received: list[float] = field(default_factory=list)
    seconds: float = 0.0
    commit: str = ""

    def within(self, name: str) -> Points:
        """Return the points of a series within the window."""
        first, last = self.window.first, self.window.last
        return [point for point in self.series.get(name, []) if first < point[0] <= last]


def read_run(
    run: Run, links: Links, *, method: str, changes: Sequence[str], window: Window, commit: str
) -> Reading:
    """Read events, console and counters of a finished run.

    Raises:
        ValueError: The run wrote no digest, or nothing at the borders of the window.
    """
    found = _DIGEST.search(run.console)
    if found is None:
        raise ValueError("the run did not print the digest of its final anchor")
    points, times = _events(run.events)
    begin, end = (_when(times, step) for step in (window.first, window.last))
    moved = {
        rank: [b - a for a, b in zip(bytes_at(s, begin), bytes_at(s, end), strict=True)]
        for rank, s in run.samples.items()
    }
    return Reading(
        **vars(links),
        method=method,
        changes=list(changes),
        window=window,
        digest=found.group(1),
        series={name: points.get(tag, []) for name, tag in _SERIES.items()},
        sent=[moved[rank][0] for rank in sorted(moved)],
        received=[moved[rank][1] for rank in sorted(moved)],
        seconds=run.seconds,
        commit=commit,
    )


def _events(directory: Path) -> tuple[dict[str, Points], dict[str, dict[int, float]]]:
    """Return the points of every tag, and when they were written (seconds since the epoch)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    points = {tag: [(e.step, e.value) for e in found] for tag, found in scalars.items()}
    return points, {tag: {e.step: e.wall_time for e in found} for tag, found in scalars.items()}


def _when(times: Mapping[str, Mapping[int, float]], step: int) -> float:
    """Return when a round or, without rounds, an inner step ended.

    The lines of inner steps wait for the outer step that sends their values, so only
    ``muloco/round_ms`` is written when its round ends; without replicas every line is.
    """
    ends = times.get("muloco/round_ms") or times["iteration-time"]
    if step not in ends:
        raise ValueError(f"nothing was written after inner step {step}, only after {sorted(ends)}")
    return ends[step]


def store(path: Path, reading: Reading) -> None:
    """Write a reading, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(reading), indent=1), encoding="utf-8")
    temporary.replace(path)


def load(path: Path) -> Reading | None:
    """Return a stored reading, ``None`` where there is none."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    values["window"] = Window(**values["window"])
    values["achieved"] = [tuple(link) for link in values["achieved"]]
    values["series"] = {
        name: [(int(step), value) for step, value in points]
        for name, points in values["series"].items()
    }
    return Reading(**values)
