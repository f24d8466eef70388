"""Measurements give the same value however a vector is cut over ranks and fragments."""

import math
from statistics import fmean
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megatron_muloco.outer.diagnostics import FragmentReport, OuterReport
from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.reducer import Measurement, combined, summed_over_replica
from tests.support.tensors import assert_equal, integer_tensor

CPU = torch.device("cpu")
VECTOR = integer_tensor(24, seed=5)


def of_replica(ranks: list[dict[str, Measurement]]) -> dict[str, Measurement]:
    """Return what every rank of a replica has after the sum, which is the same on all."""
    shared = [[m.numbers for m in rank.values() if m.over_ranks] for rank in ranks]
    total = torch.stack([torch.cat(numbers) for numbers in shared]).sum(0)
    outcomes = [summed_over_replica(rank, lambda own: total, CPU) for rank in ranks]
    for outcome in outcomes[1:]:
        for tag, each in outcome.items():
            if each.over_ranks:
                assert_equal(each.numbers, outcomes[0][tag].numbers)
    return outcomes[0]


def measured(values: torch.Tensor) -> dict[str, Measurement]:
    square = values.double().square().sum()
    return {
        "norm": Measurement.norm(square),
        "own": Measurement.of(7.0),
        "half": Measurement.relative_norm(square, 4 * square),
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fragments", [1, 3])
def test_norms_are_those_of_the_whole_vector(ranks: int, fragments: int) -> None:
    parts = [
        of_replica([measured(shard) for shard in fragment.chunk(ranks)])
        for fragment in VECTOR.chunk(fragments)
    ]
    found = combined(parts)
    assert found["norm"] == pytest.approx(float(VECTOR.norm()))
    assert found["half"] == 0.5
    assert found["own"] == 7.0 * fragments  # of this rank, added over fragments


def test_values_of_fragments_are_combined_by_their_rule() -> None:
    rules = {"smallest": min, "largest": max, "mean": fmean}
    parts = [
        {tag: Measurement.of(number, rule) for tag, rule in rules.items()} for number in (1.0, 4.0)
    ]
    assert combined(parts) == {"smallest": 1.0, "largest": 4.0, "mean": 2.5}


def test_what_is_undefined_is_left_out_and_nan_stays_visible() -> None:
    zero = torch.zeros((), dtype=torch.float64)
    one_fragment = {
        "left out": Measurement.ratio(3.0, 0.0),
        "undefined": Measurement.relative_norm(zero, zero),
        "not finite": Measurement.norm(math.nan, over_ranks=False),
    }
    found = combined([one_fragment])
    assert found.keys() == {"undefined", "not finite"}
    assert all(map(math.isnan, found.values()))


def test_a_metric_of_some_fragments_is_that_of_these() -> None:
    assert combined([{"a": Measurement.of(1.0)}, {"b": Measurement.of(2.0)}]) == {
        "a": 1.0,
        "b": 2.0,
    }
    assert combined([]) == {}


class OnDevice(torch.Tensor):
    """A tensor that says it is on an accelerator, for a machine without one."""

    is_cuda = True


class Copies(TorchFunctionMode):
    """Counts what waits for a device: reads of its tensors, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.writes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.reads += name == "tolist" and isinstance(args[0], OnDevice)
        self.writes += name in {"to", "cuda", "copy_"}
        return func(*args, **(kwargs or {}))


def test_numbers_on_a_device_cross_at_once_and_those_of_the_host_stay() -> None:
    squares = [torch.tensor([number], dtype=torch.float64) for number in (9.0, 16.0)]
    fragments = [
        {
            "norm": Measurement(square.as_subclass(OnDevice), math.sqrt),
            "own": Measurement.of(2.0),
            "share": Measurement.ratio(1.0, 4.0),
        }
        for square in squares
    ]
    with Copies() as copies:
        found = combined(fragments)
    assert found == {"norm": 5.0, "own": 4.0, "share": 0.25}
    assert (copies.reads, copies.writes) == (1, 0)


def test_an_outer_report_combines_its_fragments() -> None:
    def report(fragment: int) -> FragmentReport:
        weights, measurements = torch.ones(2), {"norm": Measurement.norm(9.0 + 7.0 * fragment)}
        return FragmentReport(
            fragment, 6, 1, Verdict.GOOD, weights, torch.zeros(2, 0), measurements
        )

    parts = (report(0), report(1))
    assert [part.metrics() for part in parts] == [{"norm": 3.0}, {"norm": 4.0}]
    assert OuterReport(6, 2, (), parts, False).metrics() == {"norm": 5.0, "muloco/round": 2.0}
    assert OuterReport(6, 2, (0,), (), False).metrics() == {}
