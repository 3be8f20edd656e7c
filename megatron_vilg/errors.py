"""Every exception that a user of the package can meet.

A message names the option (or file), the value, the rule, and values that would work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence


class VilgError(Exception):
    """Base class: the command line prints its message without a traceback and exits with code 2."""


class ConfigError(VilgError):
    """One or more problems in a configuration, all reported together."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{count} problem{'s' if count != 1 else ''} in the configuration"
        super().__init__("\n".join([head, *(f"  {p}" for p in self.problems)]))


class DataError(VilgError):
    """Pairs, shards or a token cache that cannot be read, or too many bad records."""


class CheckpointError(VilgError):
    """A checkpoint that is missing, incomplete, damaged, or belongs to another configuration."""


class MissingPackageError(VilgError):
    """An optional package that the chosen option needs is not installed."""


class LostRankError(VilgError):
    """Other processes of the job have failed or are gone, so this one cannot go on.

    Args:
        message: which ones, and where.
        is_explained: whether the process that failed says itself what is wrong.
    """

    def __init__(self, message: str, *, is_explained: bool = False) -> None:
        self.is_explained = is_explained
        super().__init__(message)


class TrainingError(VilgError):
    """Training cannot go on, for example after too many non-finite steps in a row."""


class StopRequestedError(BaseException):
    """A stop request that came where no step border is near; nothing that forgives errors shall catch it."""


def system_error(error: BaseException) -> OSError | None:
    """What the operating system said, where an exception is that or repeats it; None: it is about something else.

    Libraries written in Rust (safetensors) have exceptions of their own for it, which end in ``(os error 28)``.
    """
    if isinstance(error, OSError):
        return error
    named = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(named[1]), os.strerror(int(named[1]))) if named else None
