"""A fragment in flight that has to outlive later launches."""

from typing import Any

import pytest
import torch

from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.in_flight import InFlight
from megatron_muloco.outer.reducer import Reduced, ReductionStats


class OneMean:
    """A reducer with one result, which it lends or gives away."""

    def __init__(self, lends: bool) -> None:
        self.lends = lends
        self.memory = torch.ones(3)
        self.waits = 0

    def wait(self, handle: Any) -> Reduced:
        self.waits += 1
        return Reduced(
            {"a": self.memory}, ReductionStats(torch.ones(1), torch.zeros(1, 1), wire_bytes=0)
        )


@pytest.mark.parametrize("lends", [True, False])
def test_only_a_lent_mean_is_copied(lends: bool) -> None:
    reducer: Any = OneMean(lends)
    flight = InFlight(0, 1, Verdict.GOOD, 1.0, at_launch=None, handle=object())  # type: ignore[arg-type]
    mean = flight.settle(reducer).mean["a"]
    assert (mean is reducer.memory) is not lends
    assert mean.tolist() == [1.0] * 3
    assert flight.settle(reducer).mean["a"] is mean
    assert flight.wait(reducer).mean["a"] is mean
    assert reducer.waits == 1
