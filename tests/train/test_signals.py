from __future__ import annotations

import os
import signal

import pytest

from megatron_vilg.train.signals import HANDLED, StopRaises, StopSignals


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


def test_an_error_on_its_way_out_is_not_hidden_by_the_launcher_s_signal() -> None:
    """A launcher that has seen one rank end tells the others to end while they still find out why."""
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ConnectionError, match="the other rank is gone"), StopRaises(is_alone=True) as outer:
        try:
            with StopSignals():
                raise ConnectionError("the other rank is gone")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
    assert not outer.name and signal.getsignal(signal.SIGTERM) is former
