"""One logger for the package; the command line decides where it goes."""

from __future__ import annotations

import faulthandler
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_ROOT = "megatron_vilg"
_FORMAT, _TIME = "%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass ``__name__``."""
    return logging.getLogger(name)


def configure(level: int = logging.INFO, *, rank: int = 0, size: int = 1) -> None:
    """Send the package's messages to standard error, warnings only on ranks that do not report.

    Calling it again replaces the handler, so that tests and nested commands do not print twice.

    Args:
        level: what rank 0 shows, and what goes to files.
        rank: number of this process; with several processes it is part of each line.
        size: number of processes.
    """
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    form = _FORMAT if size == 1 else _FORMAT.replace("%(message)s", f"rank {rank}: %(message)s")
    handler.setFormatter(logging.Formatter(form, _TIME))
    handler.setLevel(level if rank == 0 else max(level, logging.WARNING))
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False


class _FileHandler(logging.StreamHandler[TextIO]):
    """Says once that its file cannot be written, where logging would print a stack for each message."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Called by logging where a message could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.has_failed:
            self.has_failed = True
            logging.getLogger(_ROOT).warning("%s: cannot be written (%s)", self.stream.name, error.strerror or error)


@contextmanager
def also_to_file(path: Path) -> Iterator[None]:
    """Append this process's messages to a file as well, and what ended it: the traceback, or the stack at a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger(_ROOT)
    file = path.open("a", encoding="utf-8", buffering=1)
    handler = _FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    root.addHandler(handler)
    is_ours = not faulthandler.is_enabled()
    if is_ours:
        faulthandler.enable(file)
    try:
        yield
    except BaseException:
        record = root.makeRecord(_ROOT, logging.CRITICAL, "", 0, "this process ends", (), sys.exc_info())
        handler.handle(record)
        raise
    finally:
        if is_ours:
            faulthandler.disable()
        root.removeHandler(handler)
        handler.close()
        with suppress(OSError):  # of a full disk, which the handler has reported
            file.close()
