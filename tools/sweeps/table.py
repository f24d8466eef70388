"""`ResultTable`: the finished runs of a study in a CSV file that only grows.

A row is written by one call and forced to disk before it counts. After a kill or a full disk the
file ends with a whole line: what came after the last line break is cut off when the table is opened
again. One process at a time may write; a lock file says so.
"""

import csv
import fcntl
import io
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_muloco.errors import ConfigError
from tools.sweeps.runs import Run

__all__ = ["FIXED", "Outcome", "ResultTable"]

FIXED = (
    "run", "commit", "finished", "status", "data", "size", "method", "variant", "replicas", "seed",
    "params", "params_total", "tokens", "batch_tokens", "seq_length", "steps",
)  # fmt: skip
_MEASURED = ("loss", "test_loss", "train_loss", "wire_bytes", "seconds")


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        status: ``ok`` or ``diverged``.
        loss: Held-out loss after the last step, nats per token, for tuning.
        test_loss: The same on the test split; ``nan`` where there is none.
        train_loss: Mean training loss of the last tenth of the steps.
        wire_bytes: Bytes that a rank sends in outer steps.
        seconds: Wall time of the run.
    """

    status: str
    loss: float = math.nan
    test_loss: float = math.nan
    train_loss: float = math.nan
    wire_bytes: int = 0
    seconds: float = 0.0


class ResultTable:
    """The table of a study.

    Args:
        path: CSV file; made when the first row is added.
        varied: Columns of the keys that the study varies.
        data: Digest of the study's data, which all rows share.

    Raises:
        ConfigError: The file has other columns, other data, or one run twice with other losses.
    """

    def __init__(self, path: Path, varied: list[str], data: str) -> None:
        self.path, self._data = path, data
        self.columns = (*FIXED, *varied, *_MEASURED)
        self.rows: dict[str, dict[str, str]] = {}
        if path.exists():
            self._read()

    @property
    def losses(self) -> dict[str, float]:
        """Key of each run -> loss for tuning, ``inf`` where it diverged."""
        return {
            key: float(row["loss"]) if row["status"] == "ok" else math.inf
            for key, row in self.rows.items()
        }

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to add rows.

        Raises:
            ConfigError: Another process has it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"{self.path}: another sweep is writing to this table. Wait for it, or end it."
                ) from None
            self._cut_half_a_line()
            if self.path.exists():
                self._read()
            yield

    def add(self, run: Run, outcome: Outcome, commit: str, finished: str) -> None:
        """Append a row and force it to disk; to be called while `writing`.

        Raises:
            OSError: The disk is full, say. The table is as it was before.
        """
        if run.key in self.rows:
            raise ConfigError(f"{self.path}: run {run.key} is there already.")
        self._write(self.row(run, outcome, commit, finished))

    def row(self, run: Run, outcome: Outcome, commit: str, finished: str) -> dict[str, str]:
        """Return the row of a finished run."""
        values: dict[str, Any] = {
            **dict(run.settings),
            **{name: getattr(run, name) for name in FIXED if hasattr(run, name)},
            **vars(outcome),
            "run": run.key,
            "commit": commit,
            "finished": finished,
            "data": self._data,
        }
        return {name: _text(values.get(name)) for name in self.columns}

    def merge(self, row: Mapping[str, str]) -> None:
        """Append a row that another process made; one that is there already must be equal."""
        known = self.rows.get(row["run"])
        if known is not None:
            _check_equal(self.path, known, row)
            return
        if tuple(row) != self.columns:
            raise ConfigError(f"{self.path}: a row has the columns {', '.join(row)}.")
        self._write(dict(row))

    def write_parquet(self) -> Path:
        """Write the same rows as Parquet beside the table, with typed columns, and return the path.

        Raises:
            ConfigError: pyarrow is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise ConfigError(
                "Parquet needs pyarrow: pip install 'megatron_muloco[analysis]'."
            ) from None
        columns = {name: _typed([row[name] for row in self.rows.values()]) for name in self.columns}
        target = self.path.with_suffix(".parquet")
        partial = target.with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)
        partial.replace(target)
        return target

    # ---- the file --------------------------------------------------------------------------

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        reader = csv.DictReader(line for line in lines if not line.startswith("#"))
        if reader.fieldnames is None:
            return
        if tuple(reader.fieldnames) != self.columns:
            missing = [name for name in self.columns if name not in reader.fieldnames]
            extra = [name for name in reader.fieldnames if name not in self.columns]
            raise ConfigError(
                f"{self.path}: its columns are not those of the study (missing: "
                f"{', '.join(missing) or 'none'}; not in the study: {', '.join(extra) or 'none'}). "
                "Give the study another table, or add the columns to this one."
            )
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            if row["data"] != self._data:
                raise ConfigError(
                    f"{self.path}: run {row['run']} was trained on data {row['data']}, and the "
                    f"study's data here is {self._data}. Losses on other texts cannot be compared. "
                    "Make the data as the study says, or give the study another table."
                )
            if row["run"] in rows:
                _check_equal(self.path, rows[row["run"]], row)
            rows[row["run"]] = row
        self.rows = rows

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _write(self, row: dict[str, str]) -> None:
        """Append one row, with the header before the first: all of it or nothing."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if not self._size():
            writer.writerow(self.columns)
        writer.writerow(row.values())
        size = self._size()
        with self.path.open("ab") as file:
            try:
                file.write(buffer.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)
                raise
        self.rows[row["run"]] = row

    def _cut_half_a_line(self) -> None:
        if not self._size():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def _check_equal(path: Path, first: Mapping[str, str], second: Mapping[str, str]) -> None:
    """Refuse two rows of one run whose losses differ."""
    if (first["status"], first["loss"]) != (second["status"], second["loss"]):
        raise ConfigError(
            f"{path}: run {first['run']} is there twice, with the losses {first['loss']} (commit "
            f"{first['commit']}) and {second['loss']} (commit {second['commit']}). Delete one row."
        )


def _text(value: Any) -> str:
    """Return a cell; floats with all their digits, nothing for what is unknown."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict):
        return ";".join(f"{key}={item}" for key, item in value.items())
    return repr(value) if isinstance(value, float) else str(value)


def _typed(cells: list[str]) -> list[int | float | str | None]:
    """Return a column as whole numbers, numbers, or text, with None for empty cells."""
    for kind in (int, float):
        try:
            return [kind(cell) if cell else None for cell in cells]
        except ValueError:
            continue
    return [cell or None for cell in cells]
