from __future__ import annotations

import os
import signal

import pytest

from megatron_vilg.train.signals import HANDLED, StopSignals


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_only_sets_the_flag(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in HANDLED]
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.received is number
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is number, "the first signal is the reason"
    assert [signal.getsignal(n) for n in HANDLED] == before


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(n) for n in HANDLED]
    with pytest.raises(RuntimeError, match="inside"), StopSignals():
        raise RuntimeError("inside")
    assert [signal.getsignal(n) for n in HANDLED] == before
