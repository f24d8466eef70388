"""`page`: the results of many trials as a page of the documentation."""

import csv
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from tests.chaos.points import ROOT

__all__ = ["PAGE", "page"]

PAGE = ROOT / "docs" / "performance" / "chaos.md"
Row = Mapping[str, str]

HEADER = """# Chaos

<!-- Written by `python -m tests.chaos report` (tests/chaos/report.py). -->

Seeded faults in real runs ([how](../guides/testing.md#chaos)).

- {machine}
- {versions}
- commits {commits}

## Disturbed runs

- trials: {trials}, seeds {seeds}
- starts of the real command: {starts}
- faults that happened: {fired}
- trials that held: {held}
- trials that ended in the undisturbed run's state: {equal}

A trial draws a tiny run (1 to 3 replicas, up to 4 ranks, Muon or AdamW, compression,
fragments, overlap), disturbs its first one to three starts, and starts it again until it is done.
It holds if

- every digest of the last checkpoint, all counters and the digest of the flushed anchor are those
  of the undisturbed run, as its files say,
- no start leaves a process behind, and no rank trains on without its launcher,
- a start without a fault ends with exit code 0, or with 85 after a stop request, and none ends
  with 0 before the run is done, but where the launcher was killed
  ([launchers](../guides/failures.md#launchers)).
"""

DAMAGE = """
## Damaged files

- trials: {trials}, seeds {seeds}
- trials that held: {held}

Each trial damages one file that the program reads, in a run of one replica that was stopped in its
middle, and starts the program again. *refused*: exit code 2 and a message, without a stack trace.
*harmless*: done, with the state and the held-out losses of the undamaged run; that is right for
files that only people read, and where an older checkpoint, a rebuilt cache or a part that is never
read made no difference. Everything else is a failure.
"""


def page(run: Path, damage: Path) -> str:
    """Return the page.

    Args:
        run: CSV file of `python -m tests.chaos run`.
        damage: CSV file of `python -m tests.chaos damage`.
    """
    runs, damages = _rows(run), _rows(damage)
    parts = [_head(runs, damages), "\n### By fault\n\n", _by_fault(runs, "acts", "fault")]
    parts += ["\n### By point\n\n", _by_fault(runs, "points", "point")]
    parts += ["\n### Failures\n\n", _failures(runs, "run", ("drawn", "faults", "codes", "result"))]
    parts.append(
        DAMAGE.format(trials=len(damages), seeds=_seeds(damages), held=_count_held(damages))
    )
    parts += ["\n### By kind of file\n\n", _by_result(damages, "kind")]
    parts += ["\n### By damage\n\n", _by_result(damages, "action")]
    shown = ("file", "action", "where", "result", "said")
    parts += ["\n### Failures of damaged files\n\n", _failures(damages, "damage", shown)]
    return "".join(parts)


def _rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["seed"]))


def _head(runs: Sequence[Row], damages: Sequence[Row]) -> str:
    packages = ("megatron-core", "torch", "deepspeed")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return HEADER.format(
        machine=f"{os.cpu_count()} CPU cores, gloo, one process a rank",
        versions=f"Python {platform.python_version()}, {versions}",
        commits=", ".join(sorted({row["commit"] for row in (*runs, *damages)})),
        trials=len(runs),
        seeds=_seeds(runs),
        starts=sum(len(row["codes"].split()) for row in runs),
        fired=sum(row["fired"].split().count("yes") for row in runs),
        held=_count_held(runs),
        equal=sum("STATE" not in row["result"] and "not done" not in row["result"] for row in runs),
    )


def _count_held(rows: Iterable[Row]) -> int:
    return sum(row["held"] == "yes" for row in rows)


def _seeds(rows: Sequence[Row]) -> str:
    """Return seeds in words: ``0 to 199, 300``."""
    spans: list[list[int]] = []
    for seed in (int(row["seed"]) for row in rows):
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans) or "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def _by_fault(rows: Sequence[Row], column: str, name: str) -> str:
    """Count faults by a column whose values are separated by slashes, like those of `fired`."""
    drawn, fired, failed = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        happened = row["fired"].split()  # a trial that was done early has fewer starts
        for value, hit in zip(row[column].split(" / "), happened, strict=False):
            drawn[value] += 1
            fired[value] += hit == "yes"
            failed[value] += hit == "yes" and row["held"] == "no"
    head = (name, "drawn", "happened", "happened in a trial that failed")
    return _table(head, ((v, drawn[v], fired[v], failed[v]) for v in sorted(drawn)))


def _by_result(rows: Sequence[Row], column: str) -> str:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row[column]][row["result"]] += 1
    found = {row["result"] for row in rows} | {"refused", "harmless", "SILENT", "RAN CODE"}
    results = sorted(found, key=lambda result: (result.isupper(), result))
    return _table(
        (column, "trials", *results),
        (
            (value, counts[value].total(), *(counts[value][result] for result in results))
            for value in sorted(counts)
        ),
    )


def _failures(rows: Sequence[Row], command: str, columns: Sequence[str]) -> str:
    """Return a table of the trials that failed, and how to replay one."""
    failed = [row for row in rows if row["held"] == "no"]
    if not failed:
        return "None.\n"
    table = _table(
        ("seed", *columns),
        ((row["seed"], *(row[c].replace("|", "/") for c in columns)) for row in failed),
    )
    example = f"python -m tests.chaos {command} --first-seed {failed[0]['seed']} --work build/chaos"
    return f"{table}\nTo replay the first one and keep its files:\n\n```\n{example}\n```\n"
