"""The tutorial runs as it is written, in a copy of what a clone has."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guides/tutorial.md"
INSTALL = "make venv\nsource .venv/bin/activate\n"


def clone(target: Path) -> None:
    """Copy the files that git tracks or would add: no data, no runs, no environment."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks.pop(0) == INSTALL  # in place of which the environment of this run is used
    repository = tmp_path / "clone"
    repository.mkdir()
    clone(repository)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
    }
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=repository, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block}\nsaid:\n{done.stdout}"
        said += done.stdout
    steps = [int(step) for step in re.findall(r" iteration +(\d+)/", said)]
    assert steps == sorted(set(steps)), "a step was repeated by the resume"
    assert steps[-1] == 80
    assert "data\n  no problem found" in said
    assert (repository / "exported/config.json").is_file()
    held_out = repository / "data/mine/text_valid.idx"
    assert held_out.is_file()
