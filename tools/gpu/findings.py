"""`Finding`, one line of a check on a GPU, and `ENTRIES`, what all checks are to show.

A test holds the table of docs/performance/gpu_check.md to `ENTRIES`. This module imports no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["ENTRIES", "Entry", "Finding", "key_order", "not_run", "page_table", "report"]


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        key: Id of the test or measurement, such as ``T10``.
        what: What was tried or measured.
        result: What came out, with its unit.
        passed: Whether it is as it must be; ``None`` for a measurement without a bar.
    """

    key: str
    what: str
    result: str
    passed: bool | None = None


@dataclass(frozen=True)
class Entry:
    """A test or a measurement.

    Attributes:
        key: Its id: T for tests, B for measurements.
        what: What it tries or measures.
        bar: When it passes; empty for a measurement.
        seen: What of it has run on a GPU; empty where nothing has.
        needs: What a machine must have for it, beside a GPU.
    """

    key: str
    what: str
    bar: str = ""
    seen: str = ""
    needs: str = ""


_H100 = "one H100"
ENTRIES = (
    Entry("T0", "versions, and which kernel torch takes for attention", "no slow kernel", _H100),
    Entry(
        "T1",
        "codecs: kinds, bits, granularities, top-k",
        "payloads and values equal in bits to the CPU's, twice the same",
        _H100,
    ),
    Entry(
        "T2",
        "digest, sketch, guard, pseudogradient, Nesterov step, merge rules",
        "digest equal to the CPU's, elementwise results within one unit in the last place",
    ),
    Entry(
        "T3",
        "Newton-Schulz: implementations, precisions, shapes",
        "within a derived bound of fp64",
        _H100,
    ),
    Entry(
        "T4",
        "attention: documents, grouped heads, forward and backward",
        "error to fp64 at most 2 % (bf16), nothing NaN",
        f"{_H100}, dense, forward",
    ),
    Entry(
        "T5",
        "reductions beside training: late sources, reused memory",
        "equal in bits to the foreground",
        f"{_H100}, with torch's allocator",
    ),
    Entry("T6", "synchronizations of one inner step", "only those that are known"),
    Entry("T7", "20 fp32 steps against the CPU", "losses within 1e-4", _H100),
    Entry(
        "T8",
        "150M: settings that must not change the result, one after the other",
        "equal in bits, in deterministic runs; loss falls",
        f"{_H100}, without deterministic kernels",
    ),
    Entry("T9", "fused operations against plain ones", "within a rounding of bf16"),
    Entry(
        "T10",
        "four ranks on one device over the staged backend: K 2 with tp 2, pp 2, cp 2, dp 2",
        "losses of gloo on the CPU, one anchor; equal bits on a CPU",
    ),
    Entry(
        "T11",
        "launcher, stop and resume, CPU beside a GPU, one visible GPU",
        "exit codes",
        _H100,
    ),
    Entry(
        "T12",
        "the layouts of T10 on NCCL, and a long run with a code and overlap",
        "losses of gloo on the CPU; the long run ends",
        needs="2 GPUs",
    ),
    Entry("B1", "speed, memory and kernels' time of whole models", seen=f"{_H100}, 150M and 416M"),
    Entry("B2", "one layer of the 15B model, cut as by tp 4: forward and backward"),
    Entry("B3", "rates of the card, Newton-Schulz", seen=_H100),
    Entry("B4", "outer step of 238 million values, by code and place of the state"),
    Entry("B5", "save, load, digest, initial weights"),
    Entry("B6", "time of the host against time of the device in a step"),
    Entry("B7", "gaps between kernels of a step"),
)


def key_order(key: str) -> tuple[bool, int]:
    """Return a sort key: tests before measurements, by number."""
    return key.startswith("B"), int(key[1:])


def not_run() -> list[str]:
    """Return the ids of which nothing has run on a GPU."""
    return [entry.key for entry in ENTRIES if not entry.seen]


def page_table() -> str:
    """Return the table of docs/performance/gpu_check.md."""
    lines = ["| id | what | passes when | ran on |", "|---|---|---|---|"]
    for entry in ENTRIES:
        needs = f" (needs {entry.needs})" if entry.needs else ""
        bar = entry.bar or "a measurement"
        lines.append(f"| {entry.key} | {entry.what}{needs} | {bar} | {entry.seen or 'not run'} |")
    return "\n".join(lines)


def report(findings: Iterable[Finding], left_out: Mapping[str, str]) -> str:
    """Return all findings as a table, grouped by id, with what was left out and why."""
    verdicts = {True: "ok", False: "DIFFERS", None: "-"}
    by_key: dict[str, list[Finding]] = {}
    for each in findings:
        by_key.setdefault(each.key, []).append(each)
    lines = []
    for entry in ENTRIES:
        lines.append(f"\n{entry.key:4} {entry.what}")
        lines += [
            f"  {verdicts[each.passed]:8}{each.what}: {each.result}"
            for each in by_key.get(entry.key, [])
        ]
        if entry.key in left_out:
            lines.append(f"  LEFT OUT: {left_out[entry.key]}")
    return "\n".join(lines)
