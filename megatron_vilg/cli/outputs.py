"""Whether a result can be written where it was asked for: before the work that makes it, and when a disk gets full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vilg.errors import ConfigError, TrainingError, VilgError, system_error


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


def require_new_folder(folder: Path, given: str) -> None:
    """Check, without making it, that ``folder`` can be written and holds nothing yet.

    Args:
        folder: need not be there.
        given: the option that named it, as the message shows it: ``--out=tokenizer``.

    Raises:
        ConfigError: something is in it, or it cannot be written.
    """
    require_writable(folder, given)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ConfigError([f"{given}: must be new or empty, it holds {shown}. Works: a new folder, or remove this one"])


def require_run_folder(out: Path) -> None:
    """Refuse to train into a folder that is complete as it is: a model, a tokenizer, a token cache, demo pairs.

    A run at step 0 in it would leave the weights there aside, and change files that its manifest lists.

    Raises:
        ConfigError: it has a manifest of its own, as no run folder has.
    """
    if (out / "manifest.json").is_file():
        rule = "has a manifest.json, so it is a finished model, tokenizer or set of pairs, and no run"
        works = (
            "a new folder; to train on from a model that was merged with --optimizer: vilg checkpoint shard --load-dir "
            f"{out} --save-dir NEW --to dcp --optimizer, then --out NEW"
        )
        raise ConfigError([f"--out={out}: {rule}. Works: {works}"])


def require_json_place(file: Path | None) -> None:
    """Check, without making anything, that ``--json FILE`` can be written; None: nobody asked for one.

    Raises:
        ConfigError: it is a folder, or its own folder is not there and cannot be made.
    """
    if file is None:
        return
    if file.is_dir():
        raise ConfigError([f"--json={file}: cannot be written (it is a folder); name a file"])
    require_writable(file.parent, f"--json={file}")


def write_json(file: Path | None, content: Any) -> None:
    """What ``--json FILE`` asks for, complete or not there; folders above it are made. None: nothing.

    Raises:
        ConfigError: it cannot be written.
    """
    if file is None:
        return
    from megatron_vilg.checkpoint.files import write_text

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise ConfigError([f"--json={file}: cannot be written ({error.strerror}); name another file"]) from error


@contextmanager
def full_disk_explained(out: Path, kind: type[VilgError] = TrainingError) -> Iterator[None]:
    """Say in one sentence that work which can be taken up again has no room left, whatever it was writing.

    Args:
        out: as ``--out`` named it.
        kind: the exception that says so.

    Raises:
        VilgError: of that kind: the disk is full, or a quota is used up.
    """
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if isinstance(error, VilgError) or found is None or found.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise kind(
            f"--out={out}: the disk is full or a quota is used up ({found}). Works: more room there (`df`, `quota`); "
            "the same command then goes on from what is complete"
        ) from error
