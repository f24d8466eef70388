"""The study's table resumes, and its page says what the rows say."""

from pathlib import Path

import pytest

from megatron_muloco.errors import ConfigError
from tools.pseudogradient.page import write_page
from tools.pseudogradient.study import COLUMNS, Cell, read_rows, run_study

# Cosine of (method, K, seed): MuLoCo is ahead at K = 4 in every seed, and behind at K = 2.
COSINES = {
    ("muloco", 2): (0.80, 0.81, 0.82),
    ("diloco", 2): (0.90, 0.92, 0.91),
    ("muloco", 4): (0.70, 0.71, 0.72),
    ("diloco", 4): (0.40, 0.42, 0.43),
}


def table(path: Path, cosines: dict[tuple[str, int], tuple[float, ...]]) -> Path:
    lines = [",".join(COLUMNS)]
    for (method, replicas), values in cosines.items():
        for seed, value in enumerate(values, 1):
            row = dict.fromkeys(COLUMNS, "1")
            row |= {"method": method, "replicas": str(replicas), "seed": str(seed)}
            row |= {f"cosine_{which}": str(value) for which in ("mean", "min", "max")}
            row |= {"outer.sync_interval": "30", "warm_steps": "300"}
            lines.append(",".join(row.values()))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_verdict_names_where_the_claim_fails(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path / "table.csv", COSINES))
    text = write_page(rows, tmp_path / "page.md")
    (verdict,) = [line for line in text.splitlines() if line.startswith("| after 300 steps")]
    # Differences at K = 2: -0.10, -0.11, -0.09; t(0.975, 2) = 4.303, times 0.01 / sqrt(3).
    cells = [cell.strip() for cell in verdict.strip("|").split("|")]
    assert cells[:2] == ["after 300 steps, H = 30", "yes"]
    assert cells[2].startswith("4: +0.29")
    assert cells[3:] == ["2: -0.100 (-0.125 to -0.075)", "-"]
    assert "in 0 of 1 settings" in " ".join(text.split())
    assert "higher for Muon in 1, lower in 1, and undecided in 0" in " ".join(text.split())
    assert (tmp_path / "page.png").stat().st_size > 0


def test_one_seed_in_which_the_cosine_rises_is_enough(tmp_path: Path) -> None:
    rising = {**COSINES, ("muloco", 4): (0.70, 0.71, 0.83)}
    text = write_page(read_rows(table(tmp_path / "table.csv", rising)), tmp_path / "page.md")
    assert "| after 300 steps, H = 30 | no | " in text


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    cell = Cell("muloco", seed=1, warm_steps=0, lr=0.1, batch=32)
    path = tmp_path / "table.csv"
    row = dict.fromkeys(COLUMNS, "1") | {"run": cell.key(2, 30)}
    path.write_text(",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n")
    before = path.read_text()
    run_study(path, [cell], [2], [30])
    assert path.read_text() == before


def test_a_table_that_is_cut_short_or_of_another_version_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "table.csv", COSINES)
    path.write_text(path.read_text() + "abc,def\n")
    with pytest.raises(ConfigError, match=r"table.csv:14 is cut short"):
        read_rows(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="other columns"):
        read_rows(path)


def test_replicas_have_to_divide_the_batch(tmp_path: Path) -> None:
    cell = Cell("diloco", seed=1, warm_steps=0, lr=0.1, batch=32)
    with pytest.raises(ConfigError, match=r"\[3\] replicas do not divide the batch of 32"):
        run_study(tmp_path / "table.csv", [cell], [3], [10])
