"""The parameter report covers the whole replica, whatever stage the rank that shows it is on."""

import pytest

from megatron_muloco.optim.matrices import MuonMatrix
from megatron_muloco.optim.parameter_table import ParameterReport
from megatron_muloco.planning.layout import stage_matrices
from megatron_muloco.training.build import gather_report
from tests.support.spawn import run_ranks
from tests.support.tiny_models import MUON, finish_tiny, start_tiny, tiny_config


def report_of(pipeline: int) -> ParameterReport:
    parallel = {"pipeline_model_parallel_size": pipeline}
    run = start_tiny(tiny_config(inner=MUON, parallel=parallel))
    report = gather_report(run.optimizer.inner.table, run.groups)
    finish_tiny()
    return report


def parameters(report: ParameterReport) -> list[str]:
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


CHOSEN = {**MUON, "muon": {"ns_impl": "triangle", "ns_dtype": "fp32", "split_heads": True}}


def matrices_and_report(
    inner: dict[str, object],
) -> tuple[tuple[MuonMatrix, ...], tuple[MuonMatrix, ...], ParameterReport, tuple[int, int]]:
    """Return the matrices of stage 0 as planned and as trained, and the number of a step."""
    config = tiny_config(inner=inner, parallel={"tensor_model_parallel_size": 2})
    run = start_tiny(config)
    run.train(1)
    optimizer = run.optimizer.inner
    planned = stage_matrices(config, run.groups.topology, stage=0, accelerator=False)
    report = gather_report(optimizer.table, run.groups)
    calls = (optimizer.last_step.newton_schulz_calls, optimizer.planned_calls)
    finish_tiny()
    return planned, optimizer.table.matrices, report, calls


@pytest.mark.parametrize("inner", [MUON, CHOSEN], ids=["default", "chosen"])
def test_the_implementation_and_the_heads_of_the_config_are_those_that_run_and_are_planned(
    inner: dict[str, object],
) -> None:
    ranks = run_ranks(matrices_and_report, 2, inner)
    for planned, matrices, report, (calls, planned_calls) in ranks:
        assert matrices == planned
        assert calls == planned_calls
        heads = "4 * [8 x 32] triangle" if inner is CHOSEN else "[32 x 32] plain"
        assert f"q {heads} @" in report.table
    # two layers of 4 + 2 + 2 heads, or q, k, v; and of proj, gate, up, down
    assert sum(rank[3][0] for rank in ranks) == 2 * ((8 if inner is CHOSEN else 3) + 4)
