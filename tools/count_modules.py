"""Count the package's files that execute during one outer step and one checkpoint save.

    python -m tools.count_modules [--functions]

Traces a tiny model on two CPU ranks, without compression and with it, and prints the files beside
their limits; ``--functions`` adds the functions that were entered. Exits with 1 when a limit is
broken. The traced run and the rank processes are those of the tests, hence ``tests.support``.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

WORKER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace every method and print what it crosses; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--functions", action="store_true", help="print the functions too")
    options = parser.parse_args(arguments)
    os.environ.update(WORKER_ENVIRONMENT)  # before torch and DeepSpeed are imported
    from tests.support import spawn
    from tests.support.crossed import METHODS, Method, trace

    def crossed(method: Method) -> dict[str, dict[str, set[str]]]:
        with tempfile.TemporaryDirectory() as directory:
            return spawn.run_ranks(trace, 2, method, Path(directory), timeout_s=300)[0]

    broken = False
    try:
        for method in METHODS:
            for event, files in crossed(method).items():
                limit = method.limits[event]
                broken |= len(files) > limit
                verdict = "BROKEN" if len(files) > limit else "ok"
                print(f"{event}, {method.name}: {len(files)} files, at most {limit}   {verdict}")
                for file, functions in sorted(files.items()):
                    print(f"    {file}")
                    if options.functions:
                        print(*(f"        {name}" for name in sorted(functions)), sep="\n")
    finally:
        spawn.shutdown()
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
