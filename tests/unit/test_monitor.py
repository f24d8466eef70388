"""The monitor of K replicas: what rides, what is averaged, when it is written, and by whom."""

import io
import math
import re
from statistics import fmean

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.derived import derive, topology_of
from megatron_muloco.data.sampler import BatchLayout, RunLayout
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.build import PARAMETERS_FILE, build_monitor, run_facts
from megatron_muloco.monitor.console import Console
from megatron_muloco.monitor.diagnostics import peak_memory_gib
from megatron_muloco.monitor.metrics import METRICS
from megatron_muloco.monitor.monitor import Monitor, RunFacts, floats
from megatron_muloco.monitor.writers import POINTS_FILE, EventWriter
from megatron_muloco.optim.parameter_table import ParameterReport
from megatron_muloco.outer.diagnostics import FragmentReport, OuterReport
from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.reducer import Measurement
from megatron_muloco.outer.schedule import Apply, Launch, LineCalendar, SyncSchedule
from tools.run_points import read_log, read_points

CPU = torch.device("cpu")


class Replicas:
    """K monitors that are driven like K training loops; replica 0's writes.

    A tenth of a second passes with every inner step. ``loss(replica, step)`` is what is recorded.
    """

    def __init__(self, directory, count=2, schedule=None, log_interval=2, resumed_step=0):
        self.seconds, self.stream, self.schedule = 0.0, io.StringIO(), schedule
        self.directory, self.line_values, self.step = directory, {}, resumed_step
        facts = RunFacts(
            num_replicas=count,
            world_size=count,
            train_iters=schedule.train_iters if schedule else 100,
            layout=RunLayout(((1, BatchLayout(8, 1, 1, 1)),)),
            seq_length=10,
            flops_per_token=1e9,
            resumed_step=resumed_step,
        )
        console = Console(self.stream)
        writer = EventWriter(str(directory), resumed_step=resumed_step, report=console.line)
        self.monitors = [
            Monitor(
                facts,
                LineCalendar(log_interval, schedule),
                device=CPU,
                console=None if replica else console,
                writer=None if replica else writer,
                now=lambda: self.seconds,
            )
            for replica in range(count)
        ]

    def train(self, steps, loss, norm=lambda replica, step: 1.0, **others):
        for _ in range(steps):
            self.step += 1
            self.seconds += 0.1
            for replica, monitor in enumerate(self.monitors):
                monitor.record(
                    self.step,
                    {
                        "lm loss": torch.tensor(float(loss(replica, self.step))),
                        "learning-rate": 0.5,
                        "grad-norm": norm(replica, self.step),
                    }
                    | {tag: value(replica, self.step) for tag, value in others.items()},
                )
            if self.schedule is not None:
                self._outer_steps()

    def _outer_steps(self):
        events = self.schedule.events(self.step)
        launched = [event.fragment for event in events if isinstance(event, Launch)]
        mine = [monitor.line_values(self.step) for monitor in self.monitors]
        assert (
            all((line_values is not None) == bool(launched) for line_values in mine)
            or len(mine) == 1
        )
        if launched:
            self.line_values[self.step] = (
                torch.stack(mine) if mine[0] is not None else torch.zeros(len(mine), 0)
            )
        applied = tuple(
            fragment_report(event.fragment, event.launched_at, self.line_values[event.launched_at])
            for event in events
            if isinstance(event, Apply)
        )
        report = OuterReport(
            step=self.step,
            round_index=self.schedule.round(self.step),
            launched=tuple(launched),
            applied=applied,
            restarted_from_anchor=False,
        )
        if events:
            for monitor in self.monitors:
                monitor.outer_step(report)

    def lines(self):
        return [line for line in self.stream.getvalue().splitlines() if "] iteration" in line]

    def losses(self, name="lm loss"):
        """Return (iteration, loss) of the console lines under ``name``."""
        pattern = re.compile(rf"iteration +(\d+)/.* {re.escape(name)}: +(\S+) ")
        return [
            (int(found[1]), float(found[2]))
            for line in self.lines()
            if (found := pattern.search(line))
        ]

    def points(self, tag):
        events = EventAccumulator(str(self.directory), size_guidance={"scalars": 0}).Reload()
        if tag not in events.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in events.Scalars(tag)]

    def close(self, outcome="done"):
        for monitor in self.monitors:
            monitor.close(outcome)


def value(number, over_fragments):
    return Measurement.of(number, over_fragments)


def fragment_report(fragment, launched_at, line_values, weights=None, **measurements):
    weights = torch.ones(line_values.size(0)) if weights is None else weights
    measured = {
        "muloco/pseudogradient_norm": Measurement.norm(9.0),
        "muloco/update_norm": Measurement.norm(torch.tensor(16.0)),
        "muloco/cosine_to_mean": value(0.5, fmean),
        "muloco/weight_sum": value(float(weights.sum()), min),
        "muloco/excluded": value(int((weights == 0).sum()), max),
        "muloco/empty_rounds": value(0, max),
        "muloco/wire_bytes": Measurement.of(1000),
        "muloco/compression_ratio": Measurement.ratio(1000, 1000),
        "muloco/exposed_ms": Measurement.of(5.0),
    }
    return FragmentReport(
        round_index=1,
        fragment=fragment,
        launched_at=launched_at,
        verdict=Verdict.GOOD,
        weights=weights,
        line_values=line_values,
        measurements=measured | {f"muloco/{name}": each for name, each in measurements.items()},
    )


def compressed(encoded, lost, cosine, uncoded_bytes):
    """Return what a reducer with error feedback and a sketch measure of one fragment."""
    square = torch.tensor(lost**2, dtype=torch.float64)
    return {
        "compression_error": Measurement.relative_norm(square, torch.tensor(encoded**2)),
        "encode_ms": Measurement.of(2.0),
        "decode_ms": Measurement.of(1.0),
        "residual_norm": Measurement.norm(square),
        "compression_ratio": Measurement.ratio(uncoded_bytes, 1000),
        "compression_cosine": value(cosine, min),
    }


def test_compressed_fragments_of_one_step_are_taken_together(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12))
    rows = torch.zeros(2, 0)
    parts = [
        fragment_report(0, 6, rows, **compressed(6.0, 3.0, 0.9, 6000)),
        fragment_report(1, 6, rows, **compressed(8.0, 4.0, 0.8, 2000)),
    ]
    run.monitors[0].outer_step(OuterReport(6, 1, (), tuple(parts), False))
    run.monitors[0].outer_step(OuterReport(12, 2, (), tuple(parts), False))
    run.close()
    for tag, number in {
        "muloco/compression_error": 0.5, "muloco/residual_norm": 5.0, "muloco/encode_ms": 4.0,
        "muloco/decode_ms": 2.0, "muloco/compression_ratio": 4.0, "muloco/compression_cosine": 0.8,
    }.items():  # fmt: skip
        assert run.points(tag) == [(6, pytest.approx(number)), (12, pytest.approx(number))], tag
    assert run.points("muloco/wire_bytes_total") == [(6, 2000.0), (12, 4000.0)]


def test_what_a_fragment_does_not_know_is_left_out(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12))
    unknown = Measurement(torch.zeros(1), lambda number: None, over_fragments=min)
    parts = [
        fragment_report(
            i, 6, torch.zeros(2, 0), cosine_pairwise_min=known, compression_cosine=unknown
        )
        for i, known in enumerate((unknown, value(0.25, min)))
    ]
    run.monitors[0].outer_step(OuterReport(6, 1, (), tuple(parts), False))
    run.close()
    assert run.points("muloco/cosine_pairwise_min") == [(6, 0.25)]
    assert run.points("muloco/residual_norm") == run.points("muloco/compression_cosine") == []


def by_step(replica, step):
    return 10 * step + 4 * replica


def test_one_replica_writes_a_due_line_at_once_with_the_mean_over_its_steps(tmp_path):
    run = Replicas(tmp_path, count=1, log_interval=3)
    run.train(2, by_step)
    assert run.lines() == []
    run.train(4, by_step)
    # Means of 10, 20, 30 and of 40, 50, 60.
    assert run.losses() == [(3, 20.0), (6, 50.0)]
    run.close()
    assert run.points("lm loss") == [(3, 20.0), (6, 50.0)]
    assert run.points("batch-size") == [(3, 8.0), (6, 8.0)]


@pytest.mark.parametrize("count", [2, 4])
def test_lines_wait_for_the_outer_step_and_come_out_as_the_mean_over_replicas(tmp_path, count):
    run = Replicas(tmp_path, count=count, schedule=SyncSchedule(6, 12))
    run.train(5, by_step)
    assert run.lines() == []
    run.train(1, by_step)
    shift = 4 * sum(range(count)) / count  # of the mean over replicas from replica 0
    expected = [(2, 15.0 + shift), (4, 35.0 + shift), (6, 55.0 + shift)]
    assert run.losses() == expected
    run.close()
    assert run.points("lm loss") == expected
    assert run.losses("lm loss (replica 0)") == []


@pytest.mark.parametrize(("fragments", "overlap"), [(1, 0), (1, 2), (3, 0), (3, 1), (2, 4)])
def test_every_due_line_is_written_once_and_in_order(tmp_path, fragments, overlap):
    schedule = SyncSchedule(6, 24, fragments, overlap)
    run = Replicas(tmp_path, schedule=schedule, log_interval=5)
    run.train(24, by_step)
    run.close()
    iterations = [int(re.search(r"iteration +(\d+)/", line)[1]) for line in run.lines()]
    assert iterations == [5, 10, 15, 20]
    averaged = run.losses()
    # Steps s-4..s have the mean 10 (s - 2); two replicas shift it by 2.
    assert averaged == [(s, 10.0 * (s - 2) + 2.0) for s, _ in averaged]
    assert len(averaged) + len(run.losses("lm loss (replica 0)")) == 4


def test_what_a_stop_leaves_is_written_with_the_own_value_and_marked(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12))
    run.train(9, by_step)
    run.close("stopped on request, state saved")
    assert run.losses("lm loss (replica 0)") == [(8, 75.0)]
    # No curve mixes means over replicas and values of one.
    assert run.points("lm loss") == [(2, 17.0), (4, 37.0), (6, 57.0)]
    assert run.points("lm loss replica 0") == [(8, 75.0)]
    assert [step for step, _ in run.points("grad-norm")] == [2, 4, 6]
    assert [step for step, _ in run.points("grad-norm replica 0")] == [8]
    assert [step for step, _ in run.points("learning-rate")] == [2, 4, 6, 8]
    assert "stopped on request, state saved, at iteration 9" in run.stream.getvalue()
    run.close()
    assert run.stream.getvalue().count("outcome") == 1


def test_line_values_have_one_size_and_nothing_between_launches(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(10, 40, 3, 2), log_interval=3)
    run.train(40, by_step)
    assert len({line_values.shape for line_values in run.line_values.values()}) == 1
    assert run.monitors[0].line_values(41) is None


def test_one_replica_sends_nothing(tmp_path):
    run = Replicas(tmp_path, count=1, schedule=SyncSchedule(6, 12))
    run.train(6, by_step)
    assert run.monitors[0].line_values(6) is None
    assert run.losses() == [(2, 15.0), (4, 35.0), (6, 55.0)]


def test_lines_of_an_earlier_start_do_not_come_back(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12), resumed_step=3)
    run.train(3, by_step)
    # Line 4 holds step 4 alone; line 2 belonged to the start before.
    assert run.losses() == [(4, 42.0), (6, 57.0)]


def test_skipped_steps_of_all_replicas_are_counted_and_a_nan_stays_visible(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(4, 8))
    run.train(
        4,
        lambda replica, step: math.nan if (replica, step) == (1, 3) else 2.0,
        norm=lambda replica, step: math.inf if (replica, step) in {(1, 3), (0, 3)} else 7.0,
    )
    first, second = run.lines()
    assert "skipped" not in first
    assert "number of skipped iterations: 2 |" in second
    assert run.losses()[0] == (2, 2.0)
    assert math.isnan(run.losses()[1][1])
    run.close()
    assert "2 steps (summed over replicas)" in run.stream.getvalue()


def test_only_the_writing_rank_reads_or_writes(tmp_path, monkeypatch):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12))
    del run.monitors[0]

    def refuse(*_):
        raise AssertionError("a rank that does not write read a tensor")

    monkeypatch.setattr("megatron_muloco.monitor.monitor.floats", refuse)
    monkeypatch.setattr(OuterReport, "metrics", refuse)
    for step in range(1, 6):
        run.monitors[0].record(step, {"lm loss": torch.tensor(1.0), "learning-rate": 0.1})
    run.monitors[0].evaluation(5, torch.tensor(1.0))
    run.monitors[0].close()
    assert run.stream.getvalue() == ""


def test_between_lines_nothing_is_read_from_the_device(tmp_path):
    monitor = Replicas(tmp_path, count=1, log_interval=10).monitors[0]
    unreadable = torch.ones((), device="meta")
    for step in range(1, 10):
        monitor.record(step, {"lm loss": unreadable, "learning-rate": 0.1, "grad-norm": unreadable})


def test_a_recorded_buffer_may_be_overwritten(tmp_path):
    run = Replicas(tmp_path, count=1, log_interval=2)
    buffer = torch.tensor(1.0)
    for step in (1, 2):
        buffer.fill_(step)
        values = {"lm loss": buffer, "learning-rate": buffer}
        run.monitors[0].record(step, values)
        buffer.fill_(100.0)
    assert run.losses() == [(2, 1.5)]


def test_typos_and_events_are_refused_in_every_step(tmp_path):
    monitor = Replicas(tmp_path, count=1, log_interval=10).monitors[0]
    with pytest.raises(RuntimeMismatch, match="'lm-loss' is not in the registry"):
        monitor.record(1, {"lm-loss": 1.0})
    with pytest.raises(RuntimeMismatch, match=r"Use Monitor\.scalars"):
        monitor.record(2, {"muloco/round": 1.0})


def test_times_leave_out_what_is_paused(tmp_path):
    run = Replicas(tmp_path, count=1, log_interval=2)
    run.train(1, by_step)
    with run.monitors[0].paused():
        run.seconds += 1000.0
    run.train(1, by_step)
    run.close()
    # 2 steps of 0.1 s, 80 tokens each, 1e9 FLOPs per token on one rank.
    assert run.points("iteration-time") == [(2, pytest.approx(0.1))]
    assert run.points("perf/tokens_per_s") == [(2, pytest.approx(800.0))]
    assert run.points("throughput") == [(2, pytest.approx(0.8))]
    assert run.points("perf/mfu") == []
    assert "mfu" not in run.lines()[0]


def test_outer_steps_write_their_metrics_and_rounds_their_time(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12), resumed_step=2)
    run.train(10, by_step)
    run.close()
    for tag, value in {
        "muloco/pseudogradient_norm": 3.0, "muloco/update_norm": 4.0, "muloco/cosine_to_mean": 0.5,
        "muloco/weight_sum": 2.0, "muloco/excluded": 0.0, "muloco/wire_bytes": 1000.0,
        "muloco/exposed_ms": 5.0,
    }.items():  # fmt: skip
        assert run.points(tag) == [(6, value), (12, value)], tag
    assert run.points("muloco/round") == [(6, 1.0), (12, 2.0)]
    # The round that began before the resume has no time.
    assert run.points("muloco/round_ms") == [(12, pytest.approx(600.0))]
    assert "2,000 sent by this rank" in run.stream.getvalue()


def test_rounds_of_different_lengths_write_their_time(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(lambda r: (2, 4, 6)[r - 1], 12))
    run.train(12, by_step)
    run.close()
    # 0.1 s a step; the rounds end after 2, 6 and 12.
    expected = [(2, 200.0), (6, 400.0), (12, 600.0)]
    assert run.points("muloco/round_ms") == [(t, pytest.approx(ms)) for t, ms in expected]


def test_several_fragments_in_one_step_are_taken_together(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(6, 12))
    some = fragment_report(0, 6, torch.zeros(2, 0))
    less = fragment_report(1, 6, torch.zeros(2, 0), weights=torch.tensor([1.0, 0.0]))
    run.monitors[0].outer_step(OuterReport(6, 1, (), (some, less), False))
    run.close()
    assert run.points("muloco/pseudogradient_norm")[0][1] == pytest.approx(math.sqrt(18))
    assert run.points("muloco/wire_bytes") == [(6, 2000.0)]
    assert run.points("muloco/weight_sum") == [(6, 1.0)]
    assert run.points("muloco/excluded") == [(6, 1.0)]


def test_the_line_shows_its_round_and_the_time_spent_waiting(tmp_path):
    run = Replicas(tmp_path, schedule=SyncSchedule(4, 8))
    run.train(8, by_step)
    shown = [re.search(r"round: (\d+) \|(?: sync \(ms\): (\S+) \|)?", line) for line in run.lines()]
    assert [found.groups() for found in shown] == [
        ("1", None), ("1", "5.0"), ("2", None), ("2", "5.0"),
    ]  # fmt: skip


def test_an_evaluation_is_a_line_and_two_points(tmp_path):
    run = Replicas(tmp_path, count=1)
    run.monitors[0].evaluation(0, torch.tensor(2.0))
    run.monitors[0].evaluation(1, 30.0)
    run.monitors[0].evaluation(2, math.nan)
    run.close()
    (_, low), (_, high), (_, unknown) = run.points("lm loss validation ppl")
    assert low == pytest.approx(math.exp(2.0))
    assert high == pytest.approx(math.exp(20.0))
    assert math.isnan(unknown)
    assert run.points("lm loss validation")[:2] == [(0, 2.0), (1, 30.0)]
    assert "2.0000 at iteration 0, nan at iteration 2" in run.stream.getvalue()


def test_only_the_writing_rank_says_something(tmp_path):
    run = Replicas(tmp_path)
    for monitor in run.monitors:
        monitor.say("saved runs/demo/iter_0000100")
    assert run.stream.getvalue().count("] saved runs/demo/iter_0000100\n") == 1


def test_numbers_and_tensors_keep_their_order():
    assert floats([1, torch.tensor(2.0), 3.0, torch.tensor([4])]) == [1.0, 2.0, 3.0, 4.0]
    assert floats([]) == []


# What a run with Muon, K > 1, evaluations and compared replicas writes, on a CPU.
WRITTEN = {
    "always",
    "K > 1, lines that a launch sends",
    "`training.eval_interval` above 0",
    "`inner.kind: muon`",
    "an outer step",
    "an outer step, K > 1",
    "an outer step, K > 1, replicas compared",
}


def test_a_monitor_from_a_config_writes_banner_texts_and_every_tag_that_applies(tmp_path):
    config = load_config(
        "configs/cpu_k2.yaml", [f"monitor.dir={tmp_path}", "monitor.log_interval=5"]
    )
    schedule, stream = SyncSchedule(10, 250), io.StringIO()
    monitors = [
        build_monitor(
            config,
            topology_of(config, 2),
            schedule,
            device=CPU,
            writes=replica == 0,
            plan_text="the plan",
            parameters=ParameterReport("7 by Muon", "every parameter"),
            console=Console(stream),
        )
        for replica in range(2)
    ]
    assert stream.getvalue().count("MuLoCo, K = 2") == 1
    assert stream.getvalue().count(" > parameters:  7 by Muon") == 1
    assert (tmp_path / PARAMETERS_FILE).read_text(encoding="utf-8") == "every parameter"
    monitors[0].evaluation(0, 8.0)
    inner = {
        "lm loss": 1.0, "learning-rate": 0.1, "grad-norm": 1.0, "perf/replica_step_ms": 1.0,
        "perf/inner_optimizer_ms": 1.0, "skipped": 0.0,
        "perf/adamw_ms": 1.0, "perf/collect_ms": 1.0, "perf/newton_schulz_ms": 1.0,
        "perf/return_ms": 1.0, "muon/ns_calls": 3, "muon/balance": 1.0,
        "muon/orthogonality_error": 0.1,
    }  # fmt: skip
    for step in range(1, 11):
        for monitor in monitors:
            monitor.record(step, inner)
    line_values = torch.stack([monitor.line_values(10) for monitor in monitors])
    monitors[0].outer_step(OuterReport(10, 1, (0,), (fragment_report(0, 10, line_values),), False))
    monitors[0].scalars(10, {"muloco/cosine_pairwise_min": 0.1})
    monitors[0].close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {row.tag for row in METRICS if row.when in WRITTEN}
    log = read_log(tmp_path / POINTS_FILE)
    events_of = read_points(str(tmp_path))
    assert set(log.points) == set(events_of)
    for tag, points in log.points.items():  # event files are fp32
        as_fp32 = [(step, float(torch.tensor(value))) for step, value in points]
        assert as_fp32 == events_of[tag]
    assert log.facts == run_facts(config, topology_of(config, 2), derive(config), device="cpu")
    assert (log.facts["method"], log.facts["sync_interval"]) == ("MuLoCo, K = 2", 10)
    assert (log.facts["tokens_per_step"], log.facts["world_size"]) == (4096, 2)
    assert RunConfig.model_validate(log.facts["config"]).digest() == log.facts["config_digest"]
    texts = {f"run/{name}/text_summary" for name in ("config", "plan", "parameters")}
    assert texts <= set(events.Tags()["tensors"])


def test_peak_memory_is_a_point_of_every_line_and_printed_when_it_has_grown(tmp_path, monkeypatch):
    peaks = iter([1.0, 1.01, 2.5])
    monkeypatch.setattr("megatron_muloco.monitor.monitor.peak_memory_gib", lambda _: next(peaks))
    run = Replicas(tmp_path, count=1, log_interval=2)
    run.train(6, by_step)
    run.close()
    assert run.points("perf/peak_memory_gib") == [(2, 1.0), (4, pytest.approx(1.01)), (6, 2.5)]
    assert ["peak GiB: 1.0" in line for line in run.lines()] == [True, False, False]
    assert ["peak GiB: 2.5" in line for line in run.lines()] == [False, False, True]


def test_peak_memory_of_a_process_is_at_least_what_it_holds():
    held = torch.ones(2**26)  # a quarter of a GiB
    assert peak_memory_gib(CPU) >= 0.25
    assert held.sum() == held.numel()


def test_the_slowest_replica_is_in_the_points_and_in_the_line_if_it_is_slow(tmp_path):
    run = Replicas(tmp_path, count=3, schedule=SyncSchedule(4, 8), log_interval=2)

    def milliseconds(replica, step):
        """Replica 2 is slow, and in the first two steps twice as slow as the fastest one."""
        return {0: 100.0, 1: 110.0, 2: 210.0 if step <= 2 else 120.0}[replica] + step % 2

    run.train(8, lambda replica, step: 1.0, **{"perf/replica_step_ms": milliseconds})
    run.close()
    assert run.points("perf/replica_step_ms_min") == [(step, 100.5) for step in (2, 4, 6, 8)]
    longest = [(2, 210.5), (4, 120.5), (6, 120.5), (8, 120.5)]
    assert run.points("perf/replica_step_ms_max") == longest
    assert run.points("perf/slowest_replica") == [(step, 2.0) for step in (2, 4, 6, 8)]
    assert ["slowest replica: 2 (2.09x)" in line for line in run.lines()] == [True] + [False] * 3
    assert sum("slowest" in line for line in run.lines()) == 1
