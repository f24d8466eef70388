"""A fragment in flight that has to outlive later launches."""

from typing import Any

import pytest
import torch

from megatron_muloco.outer.guard import Verdict
from megatron_muloco.outer.in_flight import InFlight
from megatron_muloco.outer.reducer import Reduced, ReductionStats


class OneMean:
    """A reducer with one result, which it returns_views or gives away."""

    def __init__(self, returns_views: bool) -> None:
        self.returns_views = returns_views
        self.memory = torch.ones(3)
        self.waits = 0

    def wait(self, handle: Any) -> Reduced:
        self.waits += 1
        return Reduced(
            {"a": self.memory}, ReductionStats(torch.ones(1), torch.zeros(1, 1), wire_bytes=0)
        )


@pytest.mark.parametrize("returns_views", [True, False])
def test_only_a_lent_mean_is_copied(returns_views: bool) -> None:
    reducer: Any = OneMean(returns_views)
    flight = InFlight(0, 1, Verdict.GOOD, 1.0, at_launch=None, handle=object())  # type: ignore[arg-type]
    mean = flight.wait_and_clone(reducer).mean["a"]
    assert (mean is reducer.memory) is not returns_views
    assert mean.tolist() == [1.0] * 3
    assert flight.wait_and_clone(reducer).mean["a"] is mean
    assert flight.wait(reducer).mean["a"] is mean
    assert reducer.waits == 1
