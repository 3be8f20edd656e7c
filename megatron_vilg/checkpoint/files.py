"""Folders that are either complete or not there: digests, syncing, and the final rename.

A folder is written under a name that ends in ``.partial``, and renamed. To replace an existing folder, the old one is
first set aside as ``NAME.replaced``; :func:`recover` puts it back if the process died between the two renames.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

import xxhash

PARTIAL = ".partial"
"""Suffix of a folder or file that is being written or deleted; it never counts."""
REPLACED = ".replaced"
"""Suffix of a folder that a new one of the same name is about to replace."""
FULL = "the disk is full"
"""What is said where :func:`is_full`."""
_NOTHING_LEFT = 1 << 20
"""Bytes: a write of more may have failed, and file systems keep some for themselves."""


def with_suffix(path: Path, suffix: str) -> Path:
    """``path`` with ``suffix`` behind its whole name."""
    return path.with_name(path.name + suffix)


def digest_of(path: Path) -> str:
    """Hexadecimal XXH3 (128 bits) of a file, read in pieces: a thirtieth of the work of SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces: the name of a file for everybody, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the list of names of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below ``folder``, and itself, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file: under another name first, synced, then renamed. Where that fails, nothing is left."""
    partial = with_suffix(path, PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def publish(partial: Path, final: Path) -> None:
    """Give a complete ``partial`` folder its final name, in place of an older folder if there is one."""
    aside = with_suffix(final, REPLACED)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync(final.parent)
    if aside.exists():
        remove(aside)


def publish_new(partial: Path, final: Path) -> None:
    """Give a complete ``partial`` folder its final name, which nothing may have taken meanwhile.

    Raises:
        FileExistsError: something has; it was not touched.
    """
    try:
        if final.exists():  # an empty folder would give way to the rename
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        partial.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final)) from error
        raise
    sync(final.parent)


def recover(final: Path) -> None:
    """Undo or finish a :func:`publish` of ``final`` that was cut short."""
    aside = with_suffix(final, REPLACED)
    if not aside.exists():
        return
    if final.exists():
        remove(aside)
    else:
        aside.rename(final)


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has next to nothing left; torch tells only that it could not write."""
    try:
        return shutil.disk_usage(folder).free < _NOTHING_LEFT
    except OSError:
        return False


def remove(folder: Path) -> None:
    """Delete a folder; it loses its name first, so that a half-deleted one never looks complete."""
    if folder.name.endswith(PARTIAL):
        shutil.rmtree(folder)
        return
    doomed = with_suffix(folder, PARTIAL)
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)
