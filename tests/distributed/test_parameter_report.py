"""The parameter report covers the whole replica, whatever stage the rank that shows it is on."""

from megatron_muloco.optim.truth_report import TruthReport
from megatron_muloco.training.parameter_report import gather_report
from tests.support.spawn import run_ranks
from tests.support.tiny_models import MUON, finish_tiny, start_tiny, tiny_config


def report_of(pipeline: int) -> TruthReport:
    parallel = {"pipeline_model_parallel_size": pipeline}
    run = start_tiny(tiny_config(inner=MUON, parallel=parallel))
    report = gather_report(run.optimizer.inner.table, run.groups)
    finish_tiny()
    return report


def parameters(report: TruthReport) -> list[str]:
    lines = [line.split("  ")[0] for line in report.table.splitlines()]
    return sorted(line for line in lines if line.endswith(".weight"))


def test_every_rank_has_the_parameters_of_all_stages() -> None:
    (whole,) = run_ranks(report_of, 1, 1)
    cut = run_ranks(report_of, 4, 2)
    assert parameters(whole)
    for report in cut:
        assert parameters(report) == parameters(whole)
        assert "pipeline stage 1 of 2" in report.table
        assert "over 4 ranks" in report.summary
