"""Run the whole test matrix and write docs/performance/test_matrix.md.

    python -m tools.matrix [--match TEXT] [--page FILE]

Every method x replicas x layout x precision of `tests.support.matrix`, held to what
`tests/distributed/test_cover.py` holds a cover to. Exits with 1 when a case fails.

It imports `tests.support` because cases, checks and rank processes are those of that test: `make
test` runs a pairwise cover of the list, and this program all of it.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.matrix import Case

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance" / "test_matrix.md"
WORKER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

HEADER = """# Test matrix

<!-- Written by `make test-matrix` (tools/matrix.py). -->

{count} cases, {passed} passed, in {minutes:.1f} minutes. Every case trains a model of two layers
(three for stages of two and one) for four steps with an outer step after the second and the fourth
(none for the baselines), on made-up tokens. It is ok when losses are finite and those of the same
method on the same samples with one rank a replica, within {fp32:.1e} (fp32) or {bf16:.1e} (bf16)
relative, and when all replicas and data-parallel ranks end with the same bits in every parameter.

- commit {commit}, {date}
- {versions}
- {machine}

*loss*: of the last step, mean over replicas. *difference*: the largest relative one to one rank a
replica, over steps and replicas; empty where the case is that reference.

| method | K | tp | pp | dp | cp | precision | ranks | loss | difference | result |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One line of the result table."""

    cells: tuple[object, ...]
    failure: str

    def __str__(self) -> str:
        return "| " + " | ".join(map(str, (*self.cells, self.failure or "ok"))) + " |\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="run only cases whose names contain this text")
    parser.add_argument("--page", type=Path, help="file to write; by default none with --match")
    options = parser.parse_args(arguments)
    os.environ.update(WORKER_ENVIRONMENT)
    from tests.support import spawn
    from tests.support.matrix import matrix

    cases = [case for case in matrix() if options.match in case.name]
    started = time.monotonic()
    rows = []
    try:
        for number, case in enumerate(cases, start=1):
            rows.append(_row(case))
            print(f"{number}/{len(cases)} {case.name}: {rows[-1].failure or 'ok'}", flush=True)
    finally:
        spawn.shutdown()
    page = options.page or (None if options.match else PAGE)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(_page(rows, (time.monotonic() - started) / 60), encoding="utf-8")
    return int(any(row.failure for row in rows))


def _row(case: "Case") -> Row:
    """Run one case."""
    from tests.support.matrix import check, run_case

    loss = difference = ""
    failure = ""
    try:
        outcomes = run_case(case)
        last = {outcome.coords[0]: outcome.losses[-1] for outcome in outcomes}
        loss = f"{sum(last.values()) / len(last):.6f}"
        worst = check(case, outcomes)
        difference = "" if case == case.reference else f"{worst:.1e}"
    except AssertionError as error:  # also raised for a rank that died
        failure = " ".join(str(error).split())[:300].replace("|", "/")
    sizes = (case.num_replicas, case.tensor, case.stages, case.data, case.context)
    return Row((case.method, *sizes, case.precision, case.world_size, loss, difference), failure)


def _page(rows: Sequence[Row], minutes: float) -> str:
    from megatron_muloco.monitor.build import program_commit
    from tests.support.matrix import TOLERANCE

    names = ("megatron-core", "torch", "deepspeed")
    head = HEADER.format(
        count=len(rows),
        passed=sum(not row.failure for row in rows),
        minutes=minutes,
        fp32=TOLERANCE["fp32"],
        bf16=TOLERANCE["bf16"],
        commit=program_commit(),
        date=datetime.datetime.now(datetime.UTC).date(),
        versions=", ".join(
            [f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]
        ),
        machine=f"{os.cpu_count()} CPU cores, gloo, one process a rank",
    )
    return head + "".join(map(str, rows))


if __name__ == "__main__":
    sys.exit(main())
