"""Stop requests from outside: the handler only sets a flag, the loop saves and ends at the next step border."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Terminate, Ctrl-C, and the signal that SLURM can send before a time limit (``--signal=USR1@120``)."""


class StopSignals:
    """``with StopSignals() as stop:`` notes signals in ``stop.received``; former handlers come back at the end.

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
            signal.signal(number, handler)
        self._former.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
