from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vilg.errors import StopRequestedError
from megatron_vilg.train.signals import HANDLED, StopRaises, StopSignals, ends_at_once


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


def wait_for_the_second_look() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("the signal is lost")


def test_a_signal_waits_for_a_place_that_may_be_left() -> None:
    reached = []
    with StopRaises(is_alone=True) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        reached.append("noted")
        with stop.anywhere():
            reached.append("work")
    assert reached == ["noted"] and stop.name == "SIGUSR1"


def test_training_stops_for_a_signal_that_came_while_it_was_set_up() -> None:
    with StopRaises(is_alone=True):
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as inner:
            assert inner.received is signal.SIGTERM


def test_an_import_is_finished_before_a_signal_ends_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signalled_module.py").write_text("import os\nos.kill(os.getpid(), 15)\ncomplete = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with StopRaises(is_alone=True) as stop, stop.anywhere():
        assert importlib.import_module("signalled_module").complete
        wait_for_the_second_look()
    assert stop.name == "SIGTERM"


class Signalled:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            pass


def test_a_signal_in_a_destructor_is_not_lost() -> None:
    hook = sys.unraisablehook
    with StopRaises(is_alone=True) as stop, stop.anywhere():
        Signalled()
        wait_for_the_second_look()
    assert stop.name == "SIGTERM" and sys.unraisablehook is hook


def test_a_second_signal_does_not_disturb_the_way_out() -> None:
    reached = []
    with StopRaises(is_alone=True) as stop, stop.anywhere():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("cleaned up")
    assert reached == ["cleaned up"]


def test_a_stop_of_another_rank_is_one_of_this_rank() -> None:
    with StopRaises(is_alone=True) as stop:
        raise StopRequestedError("a signal to another rank")
    assert stop.name == "a signal to another rank"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_anything_is_written_a_signal_ends_the_process_with_the_code(number: signal.Signals) -> None:
    code = (
        "import os, signal\n"
        "from megatron_vilg.train.signals import ends_at_once\n"
        "with ends_at_once(75):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (75, "")


def test_handlers_come_back_when_the_quick_end_is_over() -> None:
    before = [signal.getsignal(n) for n in HANDLED]
    with ends_at_once(75):
        pass
    assert [signal.getsignal(n) for n in HANDLED] == before
