"""Stop requests from outside: the handler only sets a flag, the loop saves and ends at the next step border."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Terminate, Ctrl-C, and the signal that SLURM can send before a time limit (``--signal=USR1@120``)."""


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


class StopRequestedError(BaseException):
    """A stop request that came where no step border is near; nothing that forgives errors shall catch it."""


class StopRaises:
    """Around everything else that a run does: SIGTERM and SIGUSR1 end it wherever it is, as its work can be resumed.

    The block is left quietly, ``stop.name`` says by which signal. Inside it ``StopSignals`` still wins.

    Args:
        is_alone: False where a launcher started several processes: once the block was left without success, further
            signals are ignored until the process ends, since launchers end all others when the first one has ended, and
            each shall have the exit code of a process that saved.
    """

    def __init__(self, *, is_alone: bool) -> None:
        self.name = ""
        self._is_alone = is_alone
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRaises:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._former[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        for number, handler in self._former.items():
            signal.signal(number, handler if self._is_alone else signal.SIG_IGN)
        return isinstance(error, StopRequestedError)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        raise StopRequestedError(self.name)
