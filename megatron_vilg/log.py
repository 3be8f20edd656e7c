"""One logger for the package; the command line decides where it goes."""

from __future__ import annotations

import logging
import sys

_ROOT = "megatron_vilg"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass ``__name__``."""
    return logging.getLogger(name)


def configure(level: int = logging.INFO, *, is_main_rank: bool = True) -> None:
    """Send the package's messages to standard error, warnings only on ranks that do not report.

    Calling it again replaces the handler, so that tests and nested commands do not print twice.
    """
    root = logging.getLogger(_ROOT)
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level if is_main_rank else max(level, logging.WARNING))
    root.propagate = False
