"""Every tool that has options prints its help."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "tools").rglob("*.py"))
    if ".parse_args(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_prints_its_help(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))  # as if run as a script
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(tool).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
