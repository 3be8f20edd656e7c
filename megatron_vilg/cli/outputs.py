"""Whether a result can be written where it was asked for, found out before the work that makes it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vilg.errors import ConfigError


def require_writable(folder: Path, given: str) -> None:
    """Check, without making it, that files can be written below ``folder``.

    Args:
        folder: need not be there.
        given: the option that named it, or a file in it, as the message shows it: ``--out=drawn``.

    Raises:
        ConfigError: a part of its path is a file, or the nearest folder that exists may not be written.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    reason = "" if os.access(there, os.W_OK | os.X_OK) else "is not writable"
    reason = reason if there.is_dir() else "is no folder"
    if reason:
        raise ConfigError([f"{given}: cannot be written ({there} {reason}); name another place"])
