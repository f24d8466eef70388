"""Event files: what readers see after a resume, and that a failing disk costs only points."""

import errno
import os
import resource

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.metrics import METRICS, Chart, Metric, MetricTable
from megatron_muloco.monitor.writers import EventWriter, layout_of

LAYOUT = {
    "Training": {
        "loss": ("lm loss", "lm loss replica 0", "lm loss validation", "lm loss test"),
        "gradient norm": ("grad-norm", "grad-norm replica 0"),
        "learning rate": ("learning-rate",),
        "tokens per second": ("perf/tokens_per_s",),
        "TFLOP per second and rank": ("throughput",),
        "peak memory (GiB)": ("perf/peak_memory_gib",),
        "inner step of fastest and slowest replica (ms)": (
            "perf/replica_step_ms_min", "perf/replica_step_ms_max"
        ),
    },
    "MuLoCo outer step": {
        "pseudogradient and update norm": (
            "muloco/pseudogradient_norm", "muloco/update_norm", "muloco/residual_norm"
        ),
        "cosines": (
            "muloco/cosine_to_mean", "muloco/cosine_pairwise_min", "muloco/compression_cosine"
        ),
        "time (ms)": (
            "muloco/exposed_ms", "muloco/round_ms", "muloco/encode_ms", "muloco/decode_ms"
        ),
        "bytes sent": ("muloco/wire_bytes", "muloco/wire_bytes_total"),
        "compression": ("muloco/compression_error", "muloco/compression_ratio"),
        "replicas": ("muloco/weight_sum", "muloco/excluded", "muloco/empty_rounds"),
    },
}  # fmt: skip


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
    assert [category.title for category in layout.category] == list(LAYOUT)
    (text,) = events.Tensors("run/config/text_summary")
    assert text.tensor_proto.string_val[0] == b"    model:\n      num_layers: 4"


def test_the_charts_are_a_column_of_the_registry():
    layout = layout_of(METRICS)
    for category, charts in LAYOUT.items():
        for title, tags in charts.items():
            assert layout[category][title] == ["Multiline", [f"^{tag}$" for tag in tags]]
    assert [(c, list(charts)) for c, charts in layout.items()] == [
        (c, list(charts)) for c, charts in LAYOUT.items()
    ]


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
