"""Event files: what readers see after a resume, and that a failing disk costs only points."""

import errno
import os
import resource

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import derive, smallest_topology
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.build import hyperparameters
from megatron_muloco.monitor.metrics import METRICS, Chart, Metric, MetricTable, applies
from megatron_muloco.monitor.writers import EventWriter, TokenAxis, layout_of


def steps_seen(directory, tag="lm loss"):
    """Return the steps of a tag as the accumulator and as TensorBoard's server read them."""
    size = {"scalars": 0, "tensors": 0}
    plain = event_accumulator.EventAccumulator(str(directory), size_guidance=size).Reload()
    served = plugin_event_accumulator.EventAccumulator(str(directory), size_guidance=size).Reload()
    seen = [event.step for event in plain.Scalars(tag)]
    assert seen == [event.step for event in served.Tensors(tag)]
    return seen


def refuse(message):
    raise AssertionError(message)


@pytest.fixture(autouse=True)
def distinct_seconds(monkeypatch):
    """Let every look at the clock be a second later: files are read in that order."""
    seconds = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr("time.time", lambda: float(next(seconds)))


@pytest.fixture
def start(tmp_path):
    """Start a run that writes points."""

    def start_at(resumed_step, steps):
        writer = EventWriter(str(tmp_path), resumed_step=resumed_step, report=refuse)
        for step in steps:
            writer.scalars(step, {"lm loss": float(step), "grad-norm": 1.0})
        writer.close()

    return start_at


def test_points_after_the_resumed_step_disappear_in_all_earlier_files(start, tmp_path):
    start(0, range(10, 60, 10))
    start(40, [50, 60, 70])
    assert steps_seen(tmp_path) == [10, 20, 30, 40, 50, 60, 70]
    start(20, [30])  # an older checkpoint: reaches back over both files
    assert steps_seen(tmp_path) == [10, 20, 30]


def test_the_point_of_the_resumed_step_itself_stays(start, tmp_path):
    start(0, [30, 40])
    start(30, [])
    assert steps_seen(tmp_path) == [30]


def test_a_new_run_in_an_old_directory_hides_the_old_run(start, tmp_path):
    start(0, [0, 10, 20])
    start(0, [0, 5])
    assert steps_seen(tmp_path) == [0, 5]


def test_an_unknown_tag_is_refused_and_nothing_is_written(tmp_path):
    writer = EventWriter(str(tmp_path), resumed_step=0, report=refuse)
    with pytest.raises(RuntimeMismatch, match="'lm los' is not in the registry"):
        writer.scalars(1, {"lm loss": 1.0, "lm los": 1.0})
    writer.scalars(2, {"lm loss": 1.0})
    writer.close()
    assert steps_seen(tmp_path) == [2]


def test_layout_and_texts_are_in_the_file(tmp_path):
    writer = EventWriter(str(tmp_path), resumed_step=0, report=refuse)
    writer.text("run/config", "model:\n  num_layers: 4")
    writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    layout = layout_pb2.Layout()
    layout.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(layout_of(METRICS))
    assert layout.category[0].title == "Loss"
    assert layout.category[0].chart[0].multiline.tag == ["^lm loss$"]
    (text,) = events.Tensors("run/config/text_summary")
    assert text.tensor_proto.string_val[0] == b"    model:\n      num_layers: 4"


def test_every_metric_has_a_chart_of_its_own_in_the_order_of_the_registry():
    charts = [
        (category, tags)
        for category, charts in layout_of(METRICS).items()
        for _, (_, tags) in charts.items()
    ]
    assert sorted(tag for _, (tag,) in charts) == sorted(f"^{row.tag}$" for row in METRICS)
    for category in layout_of(METRICS):
        rows = [row for row in METRICS if row.chart.category == category]
        assert [tag for of, (tag,) in charts if of == category] == [f"^{r.tag}$" for r in rows]
    assert "held-out loss (nats per token)" in layout_of(METRICS)["Loss"]


def test_charts_of_metrics_that_a_run_cannot_write_are_left_out():
    config = load_config("configs/cpu_k2.yaml")
    tags = {row.tag for row in METRICS if applies(row, config)}
    left_out = {row.tag for row in METRICS} - tags
    assert left_out == {
        "lm loss test", "lm loss test ppl", "perf/mfu", "rolled-back", "muloco/compression_error",
        "muloco/compression_cosine", "muloco/encode_ms", "muloco/decode_ms", "muloco/residual_norm",
    }  # fmt: skip
    alone = config.model_copy(update={"outer": NoOuter(kind="none")})
    assert not any(row.tag.startswith("muloco/") and applies(row, alone) for row in METRICS)
    own = Metric("lab/beauty", "1", "last", "writing rank", "on Sundays", "-")
    assert applies(own, alone)


def test_units_and_meanings_are_in_the_file(tmp_path):
    writer = EventWriter(str(tmp_path), resumed_step=0, report=refuse)
    for step in (1, 2):  # later points do not repeat them
        writer.scalars(step, {row.tag: 1.0 for row in METRICS})
    writer.close()
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    for row in METRICS:
        shown = events.SummaryMetadata(row.tag)
        assert shown.display_name.startswith(row.tag)
        assert row.unit in shown.display_name or row.unit == "1"
        assert shown.summary_description.startswith(row.meaning)
        assert shown.plugin_data.plugin_name == "scalars"  # or readers warn of every tag
        assert [event.step for event in events.Tensors(row.tag)] == [1, 2]


def test_a_run_is_one_row_of_hyperparameters_also_after_a_restart(tmp_path):
    config = load_config("configs/cpu_k2.yaml")
    settings = hyperparameters(config, derive(config, smallest_topology(config)))
    # The page shows the first five, in the order of their characters.
    assert sorted(settings)[:5] == ["H", "Inner lr", "K", "Method", "Wire"]
    for resumed_step in (0, 10):
        writer = EventWriter(
            str(tmp_path), resumed_step=resumed_step, report=refuse, settings=settings,
            results=["lm loss validation"],
        )  # fmt: skip
        writer.scalars(resumed_step + 5, {"lm loss validation": 4.0})
        writer.close()
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    row = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (row["Method"].string_value, row["K"].number_value) == ("MuLoCo", 2.0)
    assert row["H"].number_value == config.outer.sync_interval
    assert (row["Wire"].string_value, row["outer lr"].number_value) == ("fp32", config.outer.lr)
    assert steps_seen(tmp_path, "lm loss validation") == [5, 15]


def test_points_over_tokens_survive_a_resume(tmp_path):
    for resumed_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = EventWriter(str(tmp_path), resumed_step=4096 * resumed_step, report=refuse)
        axis = TokenAxis(writer, lambda step: 4096 * step, {"lm loss": "lm loss vs tokens"})
        axis.text("run/config", "nothing")
        for step in steps:
            axis.scalars(step, {"lm loss": 1.0, "grad-norm": 1.0})
        axis.close()
        assert axis.lost_points == 0
    assert steps_seen(tmp_path, "lm loss vs tokens") == [4096, 8192, 12288, 16384]


def test_a_registered_metric_is_written_and_has_its_chart(tmp_path):
    row = Metric("lab/beauty", "1", "last", "writing rank", "always", "-", Chart("Lab", "beauty"))
    table = MetricTable([*METRICS, row])
    assert layout_of(table) == layout_of(METRICS) | {"Lab": layout_of([row])["Lab"]}
    writer = EventWriter(str(tmp_path), resumed_step=0, report=refuse, metrics=table)
    writer.scalars(7, {"lab/beauty": 1.0})
    writer.close()
    assert steps_seen(tmp_path, "lab/beauty") == [7]


# The writing thread of the tensorboard package ends with the error that it met.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_reported_once_and_points_come_back_later(tmp_path):
    reports, now = [], [0.0]
    writer = EventWriter(str(tmp_path), resumed_step=0, report=reports.append, clock=lambda: now[0])
    writer.scalars(1, {"lm loss": 1.0})
    (file,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        for step in (2, 3, 4):
            writer.scalars(step, {"lm loss": 1.0, "grad-norm": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.lost_points == 6
    (report,) = reports
    assert str(tmp_path) in report
    assert os.strerror(errno.EFBIG) in report
    writer.scalars(5, {"lm loss": 1.0})  # too early to try again
    assert writer.lost_points == 7
    now[0] = 601.0
    writer.scalars(6, {"lm loss": 1.0})
    writer.close()
    assert (writer.lost_points, len(reports)) == (7, 1)
    seen = steps_seen(tmp_path)
    assert (seen[0], seen[-1]) == (1, 6)  # the new file purged nothing


def test_an_unusable_directory_is_reported_once(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("not a directory")
    reports = []
    writer = EventWriter(str(occupied), resumed_step=0, report=reports.append)
    writer.text("run/config", "text")
    writer.scalars(1, {"lm loss": 1.0})
    writer.close()
    assert writer.lost_points == 2
    assert len(reports) == 1
    assert f"cannot write TensorBoard events to {occupied}" in reports[0]
