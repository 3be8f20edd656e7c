"""Stop requests from outside: the handler only sets a flag, the loop saves and ends at the next step border."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from megatron_vilg.errors import StopRequestedError

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Terminate, Ctrl-C, and the signal that SLURM can send before a time limit (``--signal=USR1@120``)."""
RETRY_SECONDS = 0.2
"""Until a signal that came at a bad moment is looked at again."""


class StopSignals:
    """``with StopSignals() as stop:`` notes signals in ``stop.received``; former handlers come back at the end, those
    of a ``StopRaises`` around it only if the block was left without an error.

    Works in the main thread only, which is a rule of Python's ``signal`` module.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.received is not None

    @property
    def name(self) -> str:
        """Of the signal; another rank may have received it."""
        return "a signal to another rank" if self.received is None else self.received.name

    def __enter__(self) -> StopSignals:
        for number in HANDLED:
            self._former[number] = signal.signal(number, self._note)
            outer = getattr(self._former[number], "__self__", None)
            if isinstance(outer, StopRaises) and outer.name:  # it came where the code may not be left
                self.received = signal.Signals[outer.name]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._former.items():
            # Launchers end the other ranks as soon as one has ended. Such a signal must not take the place of the error
            # that says which rank is lost; ``StopRaises`` puts the former handlers back.
            if isinstance(error, Exception) and isinstance(getattr(handler, "__self__", None), StopRaises):
                continue
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)


class StopRaises:
    """Around everything else that a run does: SIGTERM and SIGUSR1 end it, as its work can be resumed.

    They are noted, and raise where the code says that it may be left: in ``anywhere`` at once, elsewhere at the next
    ``check``. The block is left quietly, ``stop.name`` says by which signal. Inside it ``StopSignals`` still wins.

    Args:
        is_alone: False where a launcher started several processes: once the block was left, further signals are ignored
            until the process ends, since launchers end all others when the first one has ended, and each shall have
            the exit code of a process that saved.
    """

    def __init__(self, *, is_alone: bool) -> None:
        self.name = ""
        self._is_alone = is_alone
        self._is_anywhere, self._has_raised = False, False
        self._former: dict[signal.Signals, Any] = {}
        self._former_hook = sys.unraisablehook
        self._again: threading.Timer | None = None

    def __enter__(self) -> StopRaises:
        self._former_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        for number, handler in self._former.items():
            signal.signal(number, handler if self._is_alone else signal.SIG_IGN)
        sys.unraisablehook = self._former_hook
        if self._again is not None:
            self._again.cancel()
        if not isinstance(error, StopRequestedError):
            return False
        self.name = self.name or str(error)  # of another rank
        return True

    def check(self) -> None:
        """Leave the block now, if a signal has come."""
        if self.name and not self._has_raised:
            self._has_raised = True
            raise StopRequestedError(self.name)

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """Inside this block a signal ends the work wherever it is, but for imports: they cannot be done a second time,
        and Python throws away what is raised in some of their parts."""
        self.check()
        self._is_anywhere = True
        try:
            yield
        finally:
            self._is_anywhere = False
        self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if not self._is_anywhere:
            return
        if _is_importing(frame):
            self._ask_again(number)
        else:
            self.check()

    def _ask_again(self, number: int) -> None:
        self._again = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), number))
        self._again.daemon = True
        self._again.start()

    def _unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """Python throws away what is raised in a destructor, so it has to be raised elsewhere."""
        if isinstance(found.exc_value, StopRequestedError):
            self._has_raised = False
            self._ask_again(signal.Signals[self.name])
        else:
            self._former_hook(found)


@contextmanager
def ends_at_once(code: int) -> Iterator[None]:
    """While nothing has been written that could be lost, SIGTERM and SIGUSR1 end the process with ``code``."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    former = {number: signal.signal(number, lambda *_: os._exit(code)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
