"""A checkpoint of one version of Megatron-core resumes under another one, and back.

It needs both virtual environments that the Makefile makes, and is skipped where one is missing.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.tiny_models import MUON

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
OLD, NEW = (ROOT / name / "bin" / "python" for name in (".venv", ".venv312"))
PATIENCE_S = 400.0


def trained(python: Path, directory: Path, steps: int) -> tuple[str, str]:
    """Start the run again until ``steps`` inner steps are made; return its output and digest."""
    command = [str(python), str(ROOT / "launch" / "pretrain.py"), "--config", "run.yaml"]
    ended = subprocess.run(
        [*command, "--set", f"training.train_iters={steps}"],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (digest,) = re.findall(r"final anchor digest: ([0-9a-f]{16})", ended.stdout)
    return " ".join(ended.stdout.split()), digest


def version_of(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    return subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_checkpoint_goes_to_another_version_and_back(tmp_path: Path) -> None:
    if not (OLD.exists() and NEW.exists()):
        pytest.skip("needs .venv and .venv312: make setup, make test-312")
    assert version_of(OLD) != version_of(NEW)
    # Inside a round, with a fragment in flight and residuals. One replica, so that the flush at the
    # end of a part is arithmetic on one rank alone.
    outer = {
        "kind": "nesterov",
        "lr": 0.7,
        "momentum": 0.6,
        "sync_interval": 3,
        "fragments": {"count": 2},
        "overlap_steps": 1,
        "max_in_flight": 2,
        "compression": {"kind": "statistical", "bits": 2},
    }
    checkpoint = {"dir": str(tmp_path / "saved"), "keep": 9}
    config = byte_config(byte_dataset(tmp_path), inner=MUON, outer=outer, checkpoint=checkpoint)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    before = 4
    _, digest = trained(OLD, tmp_path, before)
    for python in (NEW, OLD):
        # Nothing is left to train: what is printed is the anchor as it was loaded and flushed.
        said, again = trained(python, tmp_path, before)
        assert f"after inner step {before}" in said
        assert again == digest
        said, digest = trained(python, tmp_path, before + 3)
        assert f"after inner step {before}" in said
        before += 3
