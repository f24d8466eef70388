"""The README's plot shows the numbers of the measured page."""

from pathlib import Path

from tools.bench.step_time_plot import PAGE, PLOT, Bar, bars, draw

TABLE = """## 10 Mbit/s

| method | planned kB | compute | step |
| --- | ---: | ---: | ---: |
| AdamW DP | 20,297.9 | 352 | 26,561 |
| MuLoCo* | 86.4 | 600 | 796 |

"""


def test_bars_are_the_rows_of_the_page() -> None:
    assert bars(TABLE) == {
        10: [Bar("AdamW DP", 352.0, 26561.0), Bar("MuLoCo", 600.0, 796.0)],
    }


def test_the_committed_page_has_bars_and_the_plot_names_them(tmp_path: Path) -> None:
    found = bars(PAGE.read_text(encoding="utf-8"))
    assert set(found) == {10, 100}
    draw(found, tmp_path / "plot.svg")
    committed = PLOT.read_text(encoding="utf-8")
    for rows in found.values():
        for row in rows:
            # matplotlib writes each text as a comment beside its glyphs
            assert f"<!-- {row.method} -->" in committed
            assert f"{row.step / 1e3:.2f} s -->" in committed
