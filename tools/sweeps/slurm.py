"""`write_wave`: the runs that can start now, as a SLURM array; and the rows that its tasks leave.

A sweep goes on in waves, because what comes next depends on losses. A wave is an array of one run a
task. Each task writes its row to a file of its own, so tasks on many nodes never write to the
table. The next call of ``slurm`` puts these rows into the table and makes the next wave.
"""

import csv
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from megatron_muloco.errors import ConfigError
from tools.sweeps.runs import Run
from tools.sweeps.table import ResultTable

__all__ = ["Wave", "collect_rows", "read_wave", "submit", "write_row", "write_wave"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Wave:
    """A SLURM array.

    Attributes:
        script: The batch script.
        keys: Runs, in the order of the array's indices.
    """

    script: Path
    keys: tuple[str, ...]


def rows_directory(table: ResultTable) -> Path:
    """Return the directory of the tasks' rows, waves and logs, beside the table."""
    return table.path.with_name(f"{table.path.stem}.rows")


def write_wave(
    study: Path, table: ResultTable, runs: Sequence[Run], options: Sequence[str]
) -> Wave:
    """Write the batch script of an array and the list of its runs.

    Args:
        study: The study file.
        table: Its table.
        runs: Runs that can start now.
        options: Further ``#SBATCH`` options, for instance ``--partition=cpu``.

    Raises:
        ConfigError: The same wave was made before, and none of its runs has left a row.
    """
    directory = rows_directory(table)
    directory.mkdir(parents=True, exist_ok=True)
    keys = tuple(run.key for run in runs)
    name = sha256(" ".join(keys).encode()).hexdigest()[:8]
    listing, script = directory / f"wave-{name}.txt", directory / f"wave-{name}.sbatch"
    if listing.exists():
        raise ConfigError(
            f"{listing}: the array with these {len(keys)} runs was made before, and none of them "
            f"has left a row. See the logs in {directory}; to submit it again, delete this file."
        )
    command = [sys.executable, "tools/sweep.py", "task", str(study.resolve()), "--wave"]
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name=sweep-{study.stem}",
        f"#SBATCH --array=0-{len(keys) - 1}",
        "#SBATCH --ntasks=1",
        f"#SBATCH --chdir={_ROOT}",
        f"#SBATCH --output={directory}/%A_%a.log",
        *(f"#SBATCH {option}" for option in options),
        f'exec {shlex.join([*command, str(listing.resolve())])} --index "$SLURM_ARRAY_TASK_ID"',
    ]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    listing.write_text("\n".join(keys) + "\n", encoding="utf-8")
    return Wave(script, keys)


def submit(wave: Wave) -> str:
    """Submit a wave and return what sbatch said.

    Raises:
        ConfigError: There is no sbatch here, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--submit: there is no sbatch here. Submit the script where there is one."
        )
    done = subprocess.run(["sbatch", str(wave.script)], capture_output=True, text=True, check=False)
    if done.returncode:
        wave.script.with_suffix(".txt").unlink()
        raise ConfigError(f"sbatch refused {wave.script}: {done.stderr.strip()}")
    return done.stdout.strip()


def read_wave(listing: Path, index: int) -> str:
    """Return the key of a task's run.

    Raises:
        ConfigError: The list is missing or shorter.
    """
    try:
        return listing.read_text(encoding="utf-8").split()[index]
    except (OSError, IndexError) as error:
        raise ConfigError(f"{listing}: no run with index {index} ({error}).") from None


def write_row(table: ResultTable, row: dict[str, str]) -> Path:
    """Write the row of one task, all of it or nothing."""
    directory = rows_directory(table)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{row['run']}.csv"
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)
    partial.replace(target)
    return target


def collect_rows(table: ResultTable) -> int:
    """Put the tasks' rows into the table, delete their files, and return how many there were.

    To be called while `ResultTable.writing`.
    """
    files = sorted(rows_directory(table).glob("*.csv"))
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                table.merge(row)
        path.unlink()
    return len(files)
