"""Compare runs: python tools/compare.py RUN RUN ... [--html FILE].

A run is its directory, with the log of its points or its event files. Prints one table: held-out
loss at equal tokens, at equal training time and at equal bytes sent, and what data parallelism
would have sent. ``--html`` also writes a page with plots.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_muloco.errors import ConfigError, run_tool
from tools.comparing.courses import courses_of, warnings_of
from tools.comparing.table import Comparison
from tools.run_points import RunPoints, read_run

__all__ = ["comparison_of", "main"]


def comparison_of(directories: Sequence[Path]) -> Comparison:
    """Return the comparison of runs.

    Raises:
        ConfigError: All runs that cannot be read or compared, with the reasons.
    """
    problems: list[str] = []
    runs: list[tuple[Path, RunPoints]] = []
    for directory in directories:
        try:
            runs.append((directory, read_run(directory)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Comparison(courses_of(runs))


def compare(directories: Sequence[Path], page: Path | None) -> None:
    """Print the table of the runs, and write the page."""
    comparison = comparison_of(directories)
    warnings = list(warnings_of(comparison.courses))
    print(comparison)
    for warning in warnings:
        print(f"warning: {warning}")
    if page is not None:
        from tools.comparing.page import page_of

        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(page_of(comparison, warnings), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--html {page}: cannot be written ({error}). Give a file in a directory that you "
                "may write to."
            ) from error
        print(f"page: {page}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare runs by tokens, time and bytes.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="monitor.dir or checkpoint.dir of a run"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    arguments = parser.parse_args(argv)
    return run_tool(lambda: compare(arguments.runs, arguments.html))


if __name__ == "__main__":
    sys.exit(main())
