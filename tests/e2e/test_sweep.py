"""A sweep that is killed again and again ends with the table of one that never was."""

import csv
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.byte_runs import byte_config, byte_dataset
from tests.support.minislurm import MiniSlurm, why_unavailable
from tests.support.rank_worker import WORKER_ENV

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
KILLS = 5
CHANGING = ("commit", "finished", "seconds")


def study_at(directory: Path) -> Path:
    """Write a study of some 20 runs of about a second."""
    directory.mkdir()
    inner = {"kind": "muon", "lr": 0.02, "lr_warmup_iters": 1, "weight_decay": 0.0}
    config = byte_config(byte_dataset(directory), inner=inner)
    (directory / "base.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", exclude={"outer"}))
    )
    lr = {"start": [0.02], "factor": 2, "limits": [0.005, 0.08]}
    outer = {"outer.lr": {"start": [0.7], "values": [0.5, 0.7, 1.0]}}
    study = {
        "base": "base.yaml",
        "table": "table.csv",
        "tokens_per_parameter": 0.1,
        "sizes": {"s": {}},
        "methods": {
            "dp": {"outer.kind": "none"},
            "muloco": {
                "outer.kind": "nesterov",
                "outer.sync_interval": 2,
                "outer.momentum": 0.4,
            },
        },
        "slices": {
            "lr": {"methods": ["dp"], "grid": {"inner.lr": lr}, "report_seeds": [1, 2, 3]},
            "outer": {"methods": ["muloco"], "replicas": [1, 2, 4], "grid": outer},
        },
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def started(study: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "tools/sweep.py", "run", str(study), "--workers", "2"]
    log = (study.parent / "log").open("ab")
    environment = {**os.environ, **WORKER_ENV}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def rows_of(study: Path) -> list[dict[str, Any]]:
    """Return the table without what differs between two equal runs, ordered by key."""
    path = study.parent / "table.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        for name in CHANGING:
            del row[name]
    return sorted(rows, key=lambda row: str(row["run"]))


def test_kills_change_nothing(tmp_path: Path) -> None:
    killed, calm = study_at(tmp_path / "killed"), study_at(tmp_path / "calm")
    alone = started(calm)
    assert alone.wait(300) == 0, (calm.parent / "log").read_text()
    expected = rows_of(calm)
    draw = random.Random(1)
    for _ in range(KILLS):
        before = len(rows_of(killed))
        sweep = started(killed)
        # At least one run further each time, and then a moment in the middle of another.
        while len(rows_of(killed)) == before and sweep.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    last = started(killed)
    assert last.wait(300) == 0, (killed.parent / "log").read_text()
    found = rows_of(killed)
    assert [row["run"] for row in found] == sorted({row["run"] for row in found}), "a run twice"
    assert found == expected


def test_a_launched_run_gives_the_row_of_a_run_in_one_process(tmp_path: Path) -> None:
    """But for the training loss, which event files have for due steps, and rounded losses."""
    here, launched = study_at(tmp_path / "here"), study_at(tmp_path / "launched")
    for study in (here, launched):
        values = yaml.safe_load(study.read_text())
        values["slices"] = {"one": {"methods": ["dp"], "set": {"inner.lr": 0.02}}}
        if study is launched:
            values["launch"] = ["python", "launch/pretrain.py"]
        study.write_text(yaml.safe_dump(values, sort_keys=False))
        sweep = started(study)
        assert sweep.wait(300) == 0, (study.parent / "log").read_text()
    (expected,), (found,) = rows_of(here), rows_of(launched)
    # Event files hold fp32.
    assert float(found.pop("loss")) == pytest.approx(float(expected.pop("loss")), rel=2**-24)
    del found["train_loss"], expected["train_loss"]
    assert found == expected


@pytest.mark.slurm
@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_arrays_of_slurm_give_the_table_of_a_local_sweep(tmp_path: Path) -> None:
    local, arrays = study_at(tmp_path / "local"), study_at(tmp_path / "arrays")
    for study in (local, arrays):
        values = yaml.safe_load(study.read_text())
        del values["slices"]["outer"]
        study.write_text(yaml.safe_dump(values, sort_keys=False))
    alone = started(local)
    assert alone.wait(300) == 0, (local.parent / "log").read_text()
    command = [sys.executable, "tools/sweep.py", "slurm", str(arrays), "--submit"]
    with MiniSlurm(nodes=1, gpus_per_node=0) as slurm:
        for _ in range(12):  # waves: the start, neighbours until these are worse, the reports
            done = slurm.run(*command, cwd=ROOT, env=WORKER_ENV)
            assert done.returncode == 0, done.stderr
            if "nothing is missing" in done.stdout:
                break
            number = re.search(r"Submitted batch job (\d+)", done.stdout)
            assert number, done.stdout
            queue = ("squeue", "-h", "-j", number[1])
            log = arrays.parent / "table.rows" / f"{number[1]}_0.log"
            slurm.wait_for(
                "the array",
                lambda queue=queue: not slurm.run(*queue).stdout.strip(),
                timeout_s=180,
                log=log,
            )
        assert "nothing is missing" in done.stdout
    assert rows_of(arrays) == rows_of(local)
