"""The JSONL log of points: what a reader sees after resumes, kills and failing disks."""

import errno
import io
import json
import math
import os
import resource

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import topology_of
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.build import build_monitor
from megatron_muloco.monitor.console import Console
from megatron_muloco.monitor.writers import POINTS_FILE, EventWriter, PointLog
from tools.run_points import read_log, read_run

CPU = torch.device("cpu")


def refuse(message):
    raise AssertionError(message)


@pytest.fixture
def start(tmp_path):
    """Start a run that writes points at some steps; every start has its own loss."""

    def start_at(resumed_step, steps, loss=1.0):
        log = PointLog(str(tmp_path), {"loss": loss}, resumed_step=resumed_step, report=refuse)
        for step in steps:
            log.scalars(step, {"lm loss": loss})
        log.close()

    return start_at


def seen(directory):
    return dict(read_log(directory / POINTS_FILE).points.get("lm loss", []))


def test_the_last_start_wins_and_later_points_of_earlier_starts_disappear(start, tmp_path):
    start(0, [0, 10, 20, 30], 1.0)
    start(10, [20], 2.0)  # step 30 was never reached again
    assert seen(tmp_path) == {0: 1.0, 10: 1.0, 20: 2.0}
    assert read_run(tmp_path).facts == {"loss": 2.0}
    assert read_run(tmp_path).last_step == 20


def test_a_step_that_one_start_writes_twice_has_its_last_value(start, tmp_path):
    start(0, [10])
    with (tmp_path / POINTS_FILE).open("a") as file:
        file.write('{"step":10,"time":1.0,"values":{"lm loss":7}}\n')
    assert seen(tmp_path) == {10: 7.0}


def test_a_new_run_in_an_old_directory_hides_the_old_run(start, tmp_path):
    start(0, [0, 10, 20], 1.0)
    start(0, [5], 2.0)
    assert seen(tmp_path) == {5: 2.0}


def test_what_a_kill_left_of_a_line_is_skipped_and_said(start, tmp_path):
    start(0, [10, 20])
    path = tmp_path / POINTS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert seen(tmp_path) == {10: 1.0}
    (note,) = read_run(tmp_path).notes
    assert f"{path}: line 3 is no whole record" in note
    start(10, [20], 2.0)  # its first line does not continue the torn one
    assert seen(tmp_path) == {10: 1.0, 20: 2.0}
    assert len(read_run(tmp_path).notes) == 1


def test_every_line_is_json_and_numbers_that_are_not_finite_come_back(tmp_path):
    log = PointLog(str(tmp_path), {}, resumed_step=0, report=refuse)
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}
    log.scalars(1, values)
    log.text("run/sample", 'two "lines"\nof text')
    lines = (tmp_path / POINTS_FILE).read_text().splitlines()  # flushed, though still open

    def strict(name):
        raise AssertionError(f"{name} is not JSON")

    assert [set(json.loads(line, parse_constant=strict)) for line in lines] == [
        {"run", "resumed_step", "time"},
        {"step", "time", "values"},
        {"tag", "text"},
    ]
    log.close()
    points = read_run(tmp_path).points
    assert math.isnan(points["a"][0][1])
    assert {tag: points[tag] for tag in "bcd"} == {tag: [(1, values[tag])] for tag in "bcd"}


def test_a_full_disk_is_reported_once_and_points_come_back_later(tmp_path):
    reports, now = [], [1000.0]
    log = PointLog(str(tmp_path), {}, resumed_step=0, report=reports.append, clock=lambda: now[0])
    log.scalars(1, {"lm loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    try:
        for step in (2, 3):
            log.scalars(step, {"lm loss": 1.0, "grad-norm": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.scalars(4, {"lm loss": 1.0})  # too early to try again
    assert log.lost_points == 5
    now[0] += 601.0
    log.scalars(5, {"lm loss": 1.0})
    log.close()
    assert log.lost_points == 5
    (report,) = reports
    assert str(log.path) in report
    assert "only part of the line" in report or os.strerror(errno.EFBIG) in report
    assert seen(tmp_path) == {1: 1.0, 5: 1.0}
    assert len(read_run(tmp_path).notes) == 1  # ten bytes of step 2


def test_facts_that_could_not_be_written_come_before_the_first_points(tmp_path):
    occupied = tmp_path / "run"
    occupied.write_text("not a directory")
    reports, now = [], [0.0]
    log = PointLog(
        str(occupied), {"loss": 3}, resumed_step=0, report=reports.append, clock=lambda: now[0]
    )
    log.scalars(1, {"lm loss": 1.0})
    assert (log.lost_points, len(reports)) == (1, 1)
    occupied.unlink()
    now[0] = 601.0
    log.scalars(2, {"lm loss": 1.0})
    log.close()
    assert read_run(occupied).facts == {"loss": 3}
    assert seen(occupied) == {2: 1.0}


@pytest.mark.parametrize(
    ("directories", "place"),
    [
        (["monitor.dir={}/events", "checkpoint.dir={}/saved"], "events"),
        (["monitor.dir=null", "checkpoint.dir={}/saved"], "saved"),
        (["monitor.dir=null", "checkpoint.dir=null", "checkpoint.save_interval=0"], None),
    ],
)
def test_the_log_is_beside_event_files_or_checkpoints(tmp_path, directories, place):
    config = load_config("configs/cpu_k2.yaml", [value.format(tmp_path) for value in directories])
    console = Console((tmp_path / "console").open("w"))
    for writes in (False, True):  # only one rank writes
        monitor = build_monitor(
            config, topology_of(config, 2), None, device=CPU, writes=writes, console=console
        )
        monitor.close()
    found = [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(POINTS_FILE)]
    assert found == ([] if place is None else [place])


def test_the_writing_rank_says_what_the_configuration_warns_of(tmp_path):
    config = load_config("configs/cpu_k2.yaml", ["inner.kind=adamw", f"monitor.dir={tmp_path}"])
    stream = io.StringIO()
    for writes in (False, True):
        build_monitor(
            config,
            topology_of(config, 2),
            None,
            device=CPU,
            writes=writes,
            console=Console(stream),
        ).close()
    assert stream.getvalue().count("warning: inner.lr (") == 1


def test_a_run_without_a_log_is_read_from_its_event_files(tmp_path):
    writer = EventWriter(str(tmp_path / "tensorboard"), resumed_step=0, report=refuse)
    writer.text("run/config", "model:\n  num_layers: 4\n")
    writer.scalars(10, {"lm loss": 2.5})
    writer.close()
    with SummaryWriter(str(tmp_path / "tensorboard" / "hparams")) as other:
        other.add_scalar("other", 1.0, 0)
    run = read_run(tmp_path)
    assert run.facts == {"config": {"model": {"num_layers": 4}}}
    assert run.points == {"lm loss": [(10, 2.5)]}


def test_a_directory_that_is_not_one_run_is_refused_with_a_remedy(start, tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"neither points\.jsonl nor event files"):
        read_run(tmp_path)
    for name in ("a", "b"):
        PointLog(str(tmp_path / name), {}, resumed_step=0, report=refuse).close()
    with pytest.raises(ConfigError, match=r"2 logs are below it \(a/points.jsonl, b/points.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no points; the run ended before its first line"):
        read_run(tmp_path / "a")
