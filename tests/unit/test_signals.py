"""Stop signals are remembered, whenever and however often they come."""

import os
import signal
from contextlib import suppress

import pytest

from megatron_muloco.training.stopping import StopRequest


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_is_remembered_and_may_come_twice(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert stop.requested


def test_handlers_are_put_back_also_after_an_error() -> None:
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(KeyError), StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
        raise KeyError
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_ignored_signal_is_heard_inside() -> None:
    """Launchers start ranks with SIGUSR1 ignored."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)
