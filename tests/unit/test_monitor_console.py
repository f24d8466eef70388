"""Lines, banner, registry and speeds: pure functions."""

import io
import math
import re
from dataclasses import replace

import pytest
import torch

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import derive, topology_of
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.console import (
    Console,
    EvaluationLine,
    RunSummary,
    TrainingLine,
    count,
    method_name,
    start_banner,
)
from megatron_muloco.monitor.diagnostics import OrthogonalisationProbe, orthogonality_error
from megatron_muloco.monitor.metrics import METRICS, Metric, MetricTable
from megatron_muloco.monitor.throughput import PEAKS, ReplicaTimes, measure_speed, peak_tflops

LINE = TrainingLine(
    iteration=10, train_iters=250, consumed_samples=160, elapsed_ms=412.34, learning_rate=3e-4,
    loss=6.123456, grad_norm=1.2344, round=1, sync_ms=3.21,
)  # fmt: skip
LONGEST = replace(
    LINE, iteration=36_330, train_iters=36_330, consumed_samples=148_807_680, elapsed_ms=12_345.6,
    mfu=0.421, round=1211, sync_ms=0.0,
)  # fmt: skip


def fields(line):
    return dict(
        re.split(r": +|(?<=^iteration) +", part, maxsplit=1)
        for part in str(line).rstrip(" |").split(" | ")
    )


def test_the_line_has_megatrons_fields_and_ours():
    assert fields(LINE) == {
        "iteration": "10/250",
        "consumed samples": "160",
        "elapsed time per iteration (ms)": "412.3",
        "learning rate": "3.000E-04",
        "lm loss": "6.1235",
        "grad norm": "1.234",
        "round": "1",
        "sync (ms)": "3.2",
    }


def test_the_line_has_what_is_unusual_only_then():
    usual = fields(LINE).keys()
    for changed, field, text in (
        ({"skipped": 2}, "number of skipped iterations", "2"),
        ({"mfu": 0.4213}, "mfu", "42.1%"),
        ({"peak_gib": 61.25}, "peak GiB", "61.2"),
        ({"slow": ReplicaTimes(400.0, 600.0, 3)}, "slowest replica", "3 (1.50x)"),
    ):
        line = fields(replace(LINE, **changed))
        assert line.keys() - usual == {field}
        assert line[field] == text
    for changed, field in (
        ({"grad_norm": None}, "grad norm"),
        ({"round": None}, "round"),
        ({"sync_ms": 0.0}, "sync (ms)"),
    ):
        assert usual - fields(replace(LINE, **changed)).keys() == {field}
    not_finite = fields(replace(LINE, loss=math.nan, grad_norm=math.inf))
    assert (not_finite["lm loss"], not_finite["grad norm"]) == ("nan", "inf")


@pytest.mark.parametrize("line", [LINE, LONGEST], ids=["small", "15B"])
def test_a_line_has_about_200_characters(line):
    stream = io.StringIO()
    Console(stream).stamped(str(line))
    assert len(stream.getvalue()) <= 212


def test_a_line_of_one_replica_says_so():
    keys = {"lm loss", "grad norm", "number of skipped iterations"}
    together, alone = (fields(replace(LINE, skipped=1, alone=own)) for own in (False, True))
    assert keys <= together.keys()
    assert alone.keys() == together.keys() - keys | {f"{key} (replica 0)" for key in keys}


def test_the_evaluation_line():
    text = str(EvaluationLine("validation", 50, 5.0, 148.4))
    assert text.startswith("validation loss at iteration       50 | lm loss value:  5.000000E+00 |")


def test_a_stamped_line_is_megatrons():
    stream = io.StringIO()
    Console(stream).stamped(str(LINE))
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration  10/250 ", stream.getvalue())
    assert stream.getvalue().endswith(" |\n")


def test_the_console_survives_a_full_disk_and_a_closed_stream():
    full = open("/dev/full", "w")  # noqa: SIM115 - closing it raises, which is the point
    console = Console(full)
    console.line("lost")
    assert console.lost_lines == 1
    with pytest.raises(OSError, match="No space left"):
        full.close()
    closed = io.StringIO()
    closed.close()
    console = Console(closed)
    console.line("lost")
    assert console.lost_lines == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [(4096, "4,096"), (3.4e6, "3.4M"), (15.23e9, "15.23B"), (3.048e11, "304.8B")],
)
def test_counts(number, text):
    assert count(number) == text


# ---- banner and summary -------------------------------------------------------------------------


def config(*overrides):
    return load_config("configs/cpu_k2.yaml", overrides)


def banner(run, world):
    topology = topology_of(run, world)
    return start_banner(run, topology, derive(run, topology), device="cpu", resumed_step=20)


def test_the_banner_says_what_is_trained_on_what():
    text = banner(config(), 4)
    for fact in (
        "MuLoCo, K = 2",
        "2 replicas x",
        "= 4 ranks on cpu, fp32",
        "every 10 steps",
        "250 steps",
        "25 rounds",
        "from iteration 20",
        "tensorboard --logdir",
    ):
        assert fact in text


def test_the_banner_names_the_code():
    assert "fp32 on the wire" in banner(config(), 2)
    text = banner(config("outer.compression={kind: statistical, bits: 2}"), 2)
    assert "statistical, 2 bits on the wire, error feedback" in text


def test_the_banner_counts_one_of_something():
    text = banner(config("outer.overlap_steps=1"), 2)
    assert "8 per replica in 1 microbatch\n" in text
    assert "overlapped by 1 step," in text
    text = banner(config("outer.overlap_steps=2", "training.micro_batch_size=4"), 2)
    assert "8 per replica in 2 microbatches\n" in text
    assert "overlapped by 2 steps," in text


def plain(kind):
    run = config()
    inner = run.inner.model_copy(update={"kind": kind})
    from megatron_muloco.config.outer import NoOuter

    return run.model_copy(update={"inner": inner, "outer": NoOuter(kind="none")})


def test_methods_have_the_papers_names():
    run = config()
    assert method_name(run) == "MuLoCo, K = 2"
    diloco = run.model_copy(update={"inner": run.inner.model_copy(update={"kind": "adamw"})})
    assert method_name(diloco) == "DiLoCo, K = 2"
    assert method_name(plain("muon")) == "Muon data parallelism"
    assert method_name(plain("adamw")) == "AdamW data parallelism"


def test_the_summary_mentions_what_went_wrong_only_then():
    good = RunSummary("done", 250, 250, 60.0, 17_000.0, 1024, 0, ((0, 8.3), (250, 4.5)), 0)
    assert "8.3000 at iteration 0, 4.5000 at iteration 250" in str(good)
    assert "1,024 sent by this rank" in str(good)
    assert "skipped" not in str(good)
    assert "could not" not in str(good)
    bad = replace(good, skipped=3, lost_points=9, tokens_per_s=None, validation=None)
    assert "3 steps (summed over replicas)" in str(bad)
    assert "9 points" in str(bad)
    assert "n/a" in str(bad)


# ---- registry -----------------------------------------------------------------------------------


def test_tags_are_unique_and_look_ups_refuse_typos():
    tags = [row.tag for row in METRICS]
    assert len(set(tags)) == len(tags)
    assert all(METRICS[tag].tag == tag for tag in tags)
    with pytest.raises(RuntimeMismatch, match="registry"):
        METRICS["muloco/rounds"]


def test_a_row_is_registered_once_and_in_one_table():
    row = Metric("lab/beauty", "1", "last", "writing rank", "always", "How it looks.")
    table = MetricTable(METRICS)
    table.register(row)
    assert table["lab/beauty"] == row
    assert list(table) == [*METRICS, row]
    with pytest.raises(RuntimeMismatch, match=r"'lab/beauty' is already registered.*How it looks"):
        table.register(row)
    with pytest.raises(RuntimeMismatch, match=r"METRICS\.register"):
        METRICS["lab/beauty"]


# ---- speed --------------------------------------------------------------------------------------


def test_an_unknown_accelerator_has_no_peak():
    assert peak_tflops("cpu", "bf16") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.5
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert len({peak.device for peak in PEAKS}) == len(PEAKS)


def test_speed_by_hand():
    # 4 steps x 1000 tokens in 2 s are 2000 tokens/s; x 1e9 FLOPs over 2 ranks is 1 TFLOP/s.
    speed = measure_speed(
        seconds=2.0, steps=4, tokens=4000, flops_per_token=1e9, world_size=2, peak=4.0
    )
    assert speed.seconds_per_step == 0.5
    assert speed.tokens_per_s == 2000.0
    assert speed.tflops == 1.0
    assert speed.mfu == 0.25


# ---- diagnostics --------------------------------------------------------------------------------


def test_the_probe_returns_what_it_wraps_and_takes_another_matrix_for_every_line():
    probe = OrthogonalisationProbe(lambda batch: batch, matrices_per_step=3)
    pair = torch.stack([torch.eye(3, 4), 2 * torch.eye(3, 4)])
    found = []
    for _ in range(4):  # lines of two steps each
        for batch in (pair, 3 * torch.eye(2)[None]) * 2:
            assert torch.equal(probe(batch), batch)
        found.append(float(probe.take()["muon/orthogonality_error"]))
    # For X = s I, X X^T - I = (s^2 - 1) I.
    assert found == pytest.approx([0.0, 3.0, 8.0, 0.0])


def test_a_probe_without_matrices_has_nothing_to_say():
    assert OrthogonalisationProbe(lambda batch: batch, matrices_per_step=0).take() == {}


def test_orthogonality_is_that_of_the_shorter_side():
    assert float(orthogonality_error(torch.eye(5, 2))) == 0.0
    assert float(orthogonality_error(torch.eye(2, 5))) == 0.0
    assert float(orthogonality_error(torch.zeros(2, 5))) == pytest.approx(1.0)


def test_the_slowest_replica_is_found_where_all_times_are_known():
    times = ReplicaTimes.of([200.0, 300.0, 100.0, 300.0])
    assert times is not None
    assert (times.shortest_ms, times.longest_ms, times.slowest, times.ratio) == (100, 300, 1, 3)
    for unknown in ([], [200.0], [200.0, math.nan], [200.0, 0.0]):
        assert ReplicaTimes.of(unknown) is None
