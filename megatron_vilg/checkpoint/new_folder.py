"""A new folder that is either complete and verified, or not there."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_vilg.checkpoint.files import PARTIAL, publish_new, remove, sync, sync_tree
from megatron_vilg.checkpoint.manifest import FILE_NAME, REMEDY, FileEntry, entry_of, find_damage
from megatron_vilg.checkpoint.owner import Process, final_name, partial_of, partials_of
from megatron_vilg.checkpoint.tensors import TensorSource
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger

log = get_logger(__name__)
_NAME_BYTES = 255
"""The longest name that file systems take."""
SPARE_BYTES = 64 << 20
"""Space that must be left on the disk besides what is written."""
Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes in all."""


@contextmanager
def new_folder(final: Path, num_bytes: int) -> Iterator[Path]:
    """Write into a folder of this process beside it, which becomes ``final`` when the block ends without an error.

    Args:
        final: must not exist, neither now nor at the end. What dead processes of this machine left of it is removed.
        num_bytes: what will be written, to refuse beforehand where the disk has less.

    Raises:
        CheckpointError: ``final`` exists, another process of this machine is writing it, the disk is too small, or
            writing failed. Then nothing is left.
    """
    require_new(final)
    partial, is_ours = partial_of(final, Process.this()), False
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(final)
        free = shutil.disk_usage(final.parent).free
        if free < num_bytes + SPARE_BYTES:
            raise CheckpointError(
                f"--save-dir={named(final)}: needs {gigabytes(num_bytes)} and {gigabytes(SPARE_BYTES)} to spare, the "
                f"disk has {gigabytes(free)} free. Works: another disk, or free space first"
            )
        partial.mkdir()
        is_ours = True
        yield partial
        sync_tree(partial)
        _publish(partial, final)
    except OSError as error:
        raise CheckpointError(
            f"{named(final)}: cannot be written ({_reason(error)}). Nothing was left behind; free space or "
            "choose another folder, then run the same command again"
        ) from error
    finally:
        if is_ours and partial.exists():
            remove(partial)


def require_new(final: Path) -> None:
    """Refuse a folder that exists; also for those who want to know before they read what is to be written.

    Raises:
        CheckpointError: it does, be it a link to nothing; or its name is too long or cannot be looked up.
    """
    if not final.name:  # of "." and "/", beside which nothing can be written
        raise _exists(final)
    spare = _NAME_BYTES - len(os.fsencode(partial_of(final, Process.this()).name))
    if spare < 0:
        size = len(os.fsencode(final.name))
        raise CheckpointError(
            f"--save-dir={named(final)}: its last part has {size} bytes, too many for a folder that has a longer name "
            f"while it is written. Works: up to {size + spare} bytes"
        )
    try:
        final.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise CheckpointError(
            f"--save-dir={named(final)}: cannot be looked up ({_reason(error)}). Works: another folder"
        ) from error
    raise _exists(final)


def require_outside(final: Path, folders: Mapping[str, Path]) -> None:
    """Refuse a new folder inside one that is copied into it.

    Raises:
        CheckpointError: it lies there.
    """
    for path in folders.values():
        if final.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(
                f"--save-dir={named(final)}: lies in {path}, which is copied into it. Works: a place outside of it"
            )


def _exists(final: Path) -> CheckpointError:
    return CheckpointError(f"--save-dir={named(final)}: exists already, nothing is overwritten. Works: a new name")


def _reason(error: OSError) -> str:
    """One line, also of copying a folder, which raises a list of all files that failed."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        source, _, why = error.args[0][0]
        more = f", and {len(error.args[0]) - 1} more files" if len(error.args[0]) > 1 else ""
        return f"{source}: {why}{more}"
    return error.strerror or str(error)


def _clear_leftovers(final: Path) -> None:
    """Remove what dead processes of this machine left; whether those of other machines live, nobody knows here."""
    this = Process.this()
    for path, process in partials_of(final):
        if not process.is_here:
            log.warning(
                "%s: process %d on %s is writing it, or has left it behind; if it is gone, remove the folder",
                *(path, process.pid, process.machine),
            )
        elif process != this and process.is_alive:
            raise CheckpointError(
                f"--save-dir={named(final)}: process {process.pid} is writing it at this moment. "
                "Works: a new name, or wait for it"
            )
        else:
            with suppress(FileNotFoundError):  # others clear up, too
                remove(path)


def _publish(partial: Path, final: Path) -> None:
    try:
        publish_new(partial, final)
    except FileExistsError as error:
        raise CheckpointError(
            f"--save-dir={named(final)}: somebody else made it meanwhile; it was not touched, and nothing else was "
            "left behind. Works: a new name"
        ) from error


def named(final: Path) -> Path:
    """What the user calls it: a folder inside one that is being written stands for that one."""
    for parent in reversed(final.parents):
        if parent.name.endswith(PARTIAL):
            return parent.with_name(final_name(parent.name))
    return final


def gigabytes(num_bytes: int) -> str:
    """A size for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


class InOrder:
    """One thread that makes the calls it is given in their order, while the caller goes on.

    Args:
        ahead: how many calls may wait; the caller waits for more than that.

    The first error of a call is raised in the caller, by the next :meth:`submit` that has to wait or at the end.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._calls: deque[Future[object]] = deque()

    def submit(self, call: Callable[..., object], *arguments: object) -> None:
        """Make ``call(*arguments)`` behind all earlier ones."""
        self._calls.append(self._pool.submit(call, *arguments))
        while len(self._calls) > self._ahead:
            self._calls.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            while error is None and self._calls:
                self._calls.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Background:
    """Work that costs a processor but no decision: digests of files that are complete, damage of the source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._digests: dict[str, Future[FileEntry]] = {}
        self._source: Future[list[str]] | None = None

    def digest(self, path: Path) -> None:
        """Force a finished file to the disk and compute its digest by reading it again."""
        self._digests[path.relative_to(self.folder).as_posix()] = self._pool.submit(_entry, path)

    def check_source(self, source: TensorSource) -> None:
        """Compare the source's files with its manifest, if it has one and nobody has compared them yet."""
        if source.manifest is not None and (source.path / FILE_NAME).is_file() and not source.is_verified:
            self._source = self._pool.submit(find_damage, source.path, source.manifest)

    def finish(self, source: Path) -> dict[str, FileEntry]:
        """Wait for everything.

        Raises:
            CheckpointError: the source is damaged.
        """
        damage = self._source.result() if self._source is not None else []
        if damage:
            raise CheckpointError(f"{source}: damaged: {'; '.join(damage)}. {REMEDY}")
        return {name: future.result() for name, future in self._digests.items()}

    def close(self) -> None:
        """Drop what has not started."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _entry(path: Path) -> FileEntry:
    sync(path)
    return entry_of(path)
