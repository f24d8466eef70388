"""The table of a study: whole lines, one row a run, one data."""

import errno
import math
import os
from pathlib import Path

import pytest

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.table import read_table
from tools.sweeps.runs import Run
from tools.sweeps.slurm import collect_rows, write_row, write_wave
from tools.sweeps.table import Outcome, ResultTable

VARIED = ["inner.lr", "outer.compression"]


def run_of(key: str, lr: float = 0.1) -> Run:
    settings = {"inner.lr": lr, "outer.compression": {"kind": "linear", "bits": 4}}
    return Run(key, "s", "muloco", "", 2, 1, 100, 200, 10, 512, 128, settings, ())


def table_at(path: Path, data: str = "d") -> ResultTable:
    return ResultTable(path, VARIED, data)


def add(table: ResultTable, key: str, loss: float = 3.1415926535, status: str = "ok") -> None:
    with table.writing():
        table.add(run_of(key), Outcome(status, loss=loss, wire_bytes=7), "abc", "now")


def test_what_is_written_is_read_again_exactly(tmp_path: Path):
    path = tmp_path / "table.csv"
    add(table_at(path), "a", 0.1 + 0.2)
    add(table_at(path), "b", math.nan, "diverged")
    again = table_at(path)
    assert again.losses == {"a": 0.1 + 0.2, "b": math.inf}
    assert again.rows["a"]["outer.compression"] == "kind=linear;bits=4"
    assert again.rows["b"]["loss"] == ""
    assert list(read_table(path).numbers("inner.lr")) == [0.1, 0.1]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_half_a_line_is_cut_off(tmp_path: Path, cut: int):
    path = tmp_path / "table.csv"
    add(table_at(path), "a")
    whole = path.read_bytes()
    add(table_at(path), "b")
    os.truncate(path, len(whole) + cut)
    table = table_at(path)
    assert list(table.losses) == ["a"]
    add(table, "b")
    assert list(table_at(path).losses) == ["a", "b"]


def test_a_full_disk_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.csv"
    table = table_at(path)
    add(table, "a")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            add(table, "b")
    assert path.read_bytes() == before
    assert "b" not in table.losses
    add(table, "b")


def test_two_sweeps_cannot_write_at_once(tmp_path: Path):
    path = tmp_path / "table.csv"
    with table_at(path).writing(), pytest.raises(ConfigError, match="another sweep"):
        add(table_at(path), "a")


def test_rows_of_other_data_are_refused(tmp_path: Path):
    path = tmp_path / "table.csv"
    add(table_at(path), "a")
    with pytest.raises(ConfigError, match="run a was trained on data d"):
        table_at(path, data="e")


def test_rows_of_one_run_must_agree(tmp_path: Path):
    path = tmp_path / "table.csv"
    add(table_at(path), "a")
    line = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + line + "\n")
    assert list(table_at(path).losses) == ["a"]
    path.write_text(path.read_text() + line.replace("3.1415926535", "3.2") + "\n")
    with pytest.raises(ConfigError, match=r"twice, with the losses 3.1415926535 .* and 3.2"):
        table_at(path)


def test_other_columns_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "table.csv"
    add(table_at(path), "a")
    with pytest.raises(ConfigError, match=r"missing: outer.lr; .*study: outer.compression"):
        ResultTable(path, ["inner.lr", "outer.lr"], "d")


def test_rows_of_tasks_come_into_the_table_once(tmp_path: Path):
    table = table_at(tmp_path / "table.csv")
    runs = [run_of("a"), run_of("b")]
    wave = write_wave(tmp_path / "study.yaml", table, runs, ["--partition=cpu"])
    script = wave.script.read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert "#SBATCH --partition=cpu\n" in script
    with pytest.raises(ConfigError, match="made before"):
        write_wave(tmp_path / "study.yaml", table, runs, [])
    for run in runs:
        write_row(table, table.row(run, Outcome("ok", loss=1.5), "abc", "now"))
    with table.writing():
        assert collect_rows(table) == 2
        assert collect_rows(table) == 0
    assert table_at(table.path).losses == {"a": 1.5, "b": 1.5}


def test_parquet_has_the_same_rows_with_types(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = table_at(tmp_path / "table.csv")
    add(table, "a", 2.5)
    add(table, "b", math.nan, "diverged")
    columns = parquet.read_table(table.write_parquet()).to_pydict()
    assert columns["loss"] == [2.5, None]
    assert columns["steps"] == [10, 10]
    assert columns["run"] == ["a", "b"]
