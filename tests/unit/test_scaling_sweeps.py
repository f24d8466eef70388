"""Sweeps of other people: read with their names and units, optima, laws, regret, refusals."""

import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.observations import Observations
from megatron_muloco.scaling.optima import (
    Cell,
    cells_of,
    interior,
    optimum_laws,
    parabola_minimum,
)
from megatron_muloco.scaling.table import (
    Columns,
    Table,
    mean_of_repeats,
    points_of,
    read_runs,
    read_table,
)
from tools import scaling_laws

SEQ_LENGTH = 2048
COLUMNS = Columns("smooth", "peak_lr", "bs", "n_params", "n_tokens", (), "sequences", SEQ_LENGTH)
OPTIONS = [
    "--loss", "smooth", "--lr", "peak_lr", "--batch", "bs", "--batch-unit", "sequences",
    "--seq-length", str(SEQ_LENGTH), "--size", "n_params", "--tokens", "n_tokens",
]  # fmt: skip
# 17 cells, tokens and size not in proportion.
CELLS = [(n, d) for n in (6e7, 1.2e8, 2.5e8, 4.3e8) for d in (2e9, 8e9, 2e10, 5e10)] + [(1e9, 2e10)]
EDGES = {(6e7, 5e10): "batch", (1e9, 2e10): "lr"}


def best_lr(n: float, d: float) -> float:
    return 1.8 * n**-0.71 * d**0.31


def best_batch(d: float) -> float:
    """Tokens."""
    return 0.58 * d**0.57


def loss(n: float, d: float, lr: float, batch: float) -> float:
    """A valley that rises faster towards large learning rates, its axis turned."""
    x, y = math.log2(lr / best_lr(n, d)), math.log2(batch / best_batch(d))
    x -= 0.15 * y
    return 1.7 + 400 * n**-0.34 + 410 * d**-0.28 + 0.012 * x**2 + 0.002 * x**3 + 0.006 * y**2


def write_sweep(path: Path, noise: float = 5e-4) -> Path:
    """Write a sweep: a √2 grid of learning rates times a 2x grid of batches for every cell."""
    generator = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "n_params", "n_tokens", "peak_lr", "bs", "smooth"])
        for n, d in CELLS:
            lr = round(2 * math.log2(best_lr(n, d)))
            batch = round(math.log2(best_batch(d) / SEQ_LENGTH))
            lrs, batches = range(lr - 5, lr + 6), range(max(0, batch - 3), batch + 4)
            if EDGES.get((n, d)) == "batch":
                batches = range(max(0, batch - 4), batch - 1)
            if EDGES.get((n, d)) == "lr":
                lrs = range(lr + 2, lr + 8)
            for i in lrs:
                for j in batches:
                    value = loss(n, d, 2 ** (i / 2), SEQ_LENGTH * 2.0**j)
                    value += noise * generator.standard_normal()
                    writer.writerow([f"r{i}_{j}", n, d, 2 ** (i / 2), 2**j, value])
    return path


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "theirs.csv")


@pytest.fixture(scope="module")
def cells(sweep: Path) -> list[Cell]:
    return cells_of(read_runs(read_table(sweep), COLUMNS), COLUMNS.keys)


def test_every_cell_is_found_and_edges_are_named(cells: list[Cell]) -> None:
    assert len(cells) == len(CELLS)
    for knob in ("lr", "batch"):
        at_edge = {
            (cell.keys["n_params"], cell.keys["n_tokens"])
            for cell in cells
            if cell.optimum(knob).edge
        }
        assert at_edge == {key for key, edge in EDGES.items() if edge == knob}
        assert len(interior(cells, knob)) == 16
    (cell,) = (c for c in cells if c.optimum("batch").edge)
    assert cell.optimum("batch").edge.endswith("is the largest that was tried")


def test_interior_optima_are_those_of_the_valley(cells: list[Cell]) -> None:
    for cell, optimum in interior(cells, "lr"):
        if not cell.optimum("batch").edge:
            true = best_lr(*cell.keys.values())
            assert abs(math.log2(optimum.value / true)) < 0.5  # a step of the grid
    for cell, optimum in interior(cells, "batch"):
        if not cell.optimum("lr").edge:
            assert abs(math.log2(optimum.value / best_batch(cell.keys["n_tokens"]))) < 0.5


def test_laws_of_optima_are_those_of_the_valley(cells: list[Cell]) -> None:
    laws = optimum_laws(cells, ["n_params", "n_tokens"])
    assert laws["lr"].values["alpha"] == pytest.approx(-0.71, abs=0.03)
    assert laws["lr"].values["beta"] == pytest.approx(0.31, abs=0.03)
    assert laws["batch"].values["alpha"] == pytest.approx(0, abs=0.03)
    assert laws["batch"].values["beta"] == pytest.approx(0.57, abs=0.03)


def test_the_tool_gives_optima_laws_and_regret(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot, table = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "cells.csv"
    words = ["--json", str(out), "--plot", str(plot), "--cells", str(table)]
    words += ["--predict", "n_params=2e9,n_tokens=4e10"]
    assert scaling_laws.main(["optimum", str(sweep), *OPTIONS, *words]) == 0
    text = capsys.readouterr().out
    assert "16 of 17 optima of batch are interior" in text
    assert "! n_params = 1e+09, n_tokens = 2e+10: the best lr" in text
    found = json.loads(out.read_text())
    assert len(found["regrets"]) == 17
    for regret in found["regrets"]:
        assert regret["regret"] <= 0.005, regret
    assert found["predictions"][0]["batch"] == pytest.approx(best_batch(4e10), rel=0.15)
    assert plot.stat().st_size > 1000
    again = ["fit", str(table), "--x", "n_params", "--x", "n_tokens", "--y", "best_loss"]
    assert scaling_laws.main([*again, "--form", "sum_offset", "--leave-out", "n_params"]) == 0
    assert "n_params^alpha + B · n_tokens^beta + C" in capsys.readouterr().out


@pytest.mark.parametrize(("sizes", "last"), [(4, "largest regret"), (3, "no regret of left-out")])
def test_tokens_in_proportion_to_size_leave_the_law(
    sizes: int, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chinchilla.csv"
    rows = ["N,D,lr,batch,loss"]
    for n in (1e8, 2e8, 4e8, 8e8)[:sizes]:
        for i in range(-3, 4):
            for j in range(-2, 3):
                lr, batch = 2 ** (i / 2) / math.sqrt(n), 2.0**j * 1e5 * (n / 1e8) ** 0.5
                rows.append(f"{n},{20 * n},{lr},{batch},{3 + 0.01 * (i * i + j * j)}")
    path.write_text("\n".join(rows))
    words = ["--loss", "loss", "--lr", "lr", "--batch", "batch", "--size", "N", "--tokens", "D"]
    assert scaling_laws.main(["optimum", str(path), *words]) == 0
    text = capsys.readouterr().out
    assert "not in the laws: D changes together with N" in text
    assert last in text


# ---- bad tables ---------------------------------------------------------------------------------


def header_and(*rows: str) -> str:
    return "\n".join(["n_params,n_tokens,peak_lr,bs,smooth", *rows])


def good_rows() -> list[str]:
    rows = []
    for n in (100_000_000, 200_000_000):
        for i in range(5):
            for j in range(5):
                value = 3 + 0.01 * ((i - 2) ** 2 + (j - 2) ** 2)
                rows.append(f"{n},{20 * n},{0.001 * 2**i},{32 * 2**j},{value}")
    return rows


@pytest.mark.parametrize(
    ("row", "words", "sentence"),
    [
        ("1e8,2e9,0.5,64,nan", (), "smooth is not finite at theirs.csv:52"),
        ("1e8,2e9,0.5,64,inf", (), "smooth is not finite at theirs.csv:52"),
        ("100000000,2000000000,0.004,128,3.5", (), "theirs.csv:14 and theirs.csv:52 are the same"),
        ("1e8,2e9,-0.5,64,3", (), r"lr is not a positive finite number at theirs.csv:52 \(-0.5\)"),
        ("1e8,2e9,fast,64,3", (), r"peak_lr is no number at theirs.csv:52 \('fast'\)"),
        ("100,2e9,0.5,64,3", (), "n_params mixes units: 100 at theirs.csv:52 and 2e"),
        ("0.1B,2e9,0.5,1048576,3", (), "column bs mixes units: no batch is between 512 and 1.04"),
        ("1e8,2e9,0.5,64", (), r"5 columns .* another number of cells: theirs.csv:52 \(4\)"),
        ("1e8,2e9,0.5,64,3", ("--size", "N"), "has no column N; its columns are n_params"),
        ("1e8,2e9,0.5,64,3", ("--batch-unit", "tokens"), "less than one sequence of 2048"),
        ("1e8,2e9,0.5,64,3", ("--where", "bs"), "--where bs is not of the form COLUMN=VALUE"),
        ("1e8,2e9,0.5,64,3", ("--where", "bs=7"), "no row has bs = 7; it has 32, 64"),
        ("1e8,2e9,0.5,64,3", (), "2 of 2 cells have interior optima of lr and batch; .*needs 3"),
    ],
)
def test_bad_tables_are_refused_with_a_sentence(
    row: str,
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(header_and(*good_rows(), row))
    assert scaling_laws.main(["optimum", str(path), *OPTIONS, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error


def test_edges_are_named_when_too_few_cells_are_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.csv"
    rows = [row for row in good_rows() if float(row.split(",")[2]) < 0.003]
    path.write_text(header_and(*rows))
    assert scaling_laws.main(["optimum", str(path), *OPTIONS]) == 2
    error = capsys.readouterr().err
    assert "0 of 2 cells have interior optima of lr and batch" in error
    assert "Extend the grids: n_params = 1e+08, n_tokens = 2e+09: 2 values of lr" in error


def test_what_is_not_finite_can_be_left_out(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(sweep.read_text() + "r,60000000.0,2000000000.0,0.9,64,nan\n")
    assert scaling_laws.main(["optimum", str(path), *OPTIONS, "--non-finite", "drop"]) == 0
    assert "left out, loss not finite: theirs.csv:" in capsys.readouterr().out


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    empty, twice = tmp_path / "empty.csv", tmp_path / "twice.csv"
    empty.write_text("# a comment\nN,loss\n")
    twice.write_text("N,N\n1,2\n")
    with pytest.raises(ConfigError, match="has no rows"):
        read_table(empty)
    with pytest.raises(ConfigError, match="a name twice"):
        read_table(twice)
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        read_table(tmp_path / "missing.csv")


def table_of(columns: Mapping[str, list[str]]) -> Table:
    count = len(next(iter(columns.values())))
    return Table(Path("t.csv"), columns, list(range(2, 2 + count)))


def test_numbers_may_have_suffixes() -> None:
    table = table_of({"N": ["35M", "1.3B", "2.4b"], "mixed": ["35M", "1300", "7"]})
    assert table.numbers("N").tolist() == [35e6, 1.3e9, 2.4e9]
    with pytest.raises(ConfigError, match=r"mixed mixes units: t.csv:2 has a suffix \(35M\)"):
        table.numbers("mixed")


def test_separators_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("# theirs\nN;loss\n\n1e8;3\n# more\n2e8;2.8\n")
    points = points_of(read_table(path), "loss", ["N"])
    assert points.values.tolist() == [3, 2.8]
    assert list(points.rows) == ["t.csv:4", "t.csv:6"]


def test_columns_need_a_unit_and_a_key() -> None:
    with pytest.raises(ConfigError) as error:
        Columns("loss", "lr", "batch", batch_unit="sequences")
    assert len(error.value.problems) == 2
    with pytest.raises(ConfigError, match="batch unit rows is unknown"):
        Columns("loss", "lr", "batch", "N", batch_unit="rows")


def test_repeats_are_averaged() -> None:
    runs = Observations({"N": np.array([1.0, 2.0, 1.0])}, np.array([3.0, 2.0, 3.2]), "loss")
    assert mean_of_repeats(runs).values.tolist() == [3.1, 2.0]


# ---- parabolas and critical batches -------------------------------------------------------------


def test_a_parabola_is_found_exactly() -> None:
    x = np.array([17.0, 18.0, 19.0, 20.0])
    found = parabola_minimum(x, 2.3 + 0.01 * (x - 18.3) ** 2)
    assert found == pytest.approx((18.3, 2.3))
    assert parabola_minimum(x, 2.3 - 0.01 * (x - 18.3) ** 2) is None
    assert parabola_minimum(x, np.full(4, 2.3)) is None


def test_the_published_tables_are_refitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "published.json"
    assert scaling_laws.main(["published", "--plot", str(tmp_path), "--json", str(out)]) == 0
    assert "DiLoCo Table 10: loss, joint" in capsys.readouterr().out
    assert (tmp_path / "published_laws.png").stat().st_size > 1000
    assert len(json.loads(out.read_text())) > 50
