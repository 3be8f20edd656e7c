"""One job at a time trains in a run folder: who it is, the sign of life it gives, and when another one takes over.

``RUN/owner.json`` names the main process and its job. While it works there, a thread renews the file's
time of change. Locks of the file system would be shorter, but shared ones may hold them on one node only, keep those of
a lost node, or have none.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_vilg.checkpoint.files import REPLACED, sync, with_suffix
from megatron_vilg.checkpoint.owner import Process, partial_of
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.parallel.replicas import Replicas

log = get_logger(__name__)
FILE_NAME = "owner.json"
BEAT_SECONDS = 10.0
"""Time between two signs of life."""
SILENT_SECONDS = 60.0
"""A process of another machine that gives none for so long is gone. Clocks of different machines are not compared."""

_LOCK_SECONDS = 2.0
"""Longest wait for other newcomers, who need milliseconds."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without hard links say."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who trains in a run folder."""

    process: Process
    job: str
    """SLURM's number; empty outside of it."""
    restart: int
    """How often SLURM has put the job back into its queue."""
    since: str
    """For people."""

    @classmethod
    def this(cls, environ: Mapping[str, str]) -> Self:
        """The process that asks, from now on."""
        restart = environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            Process.this(),
            environ.get("SLURM_JOB_ID", ""),
            int(restart) if restart.isdigit() else 0,
            time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process.pid} on {self.process.machine}{job}, since {self.since}"


class Claim:
    """The right of this process to write in a run folder.

    Args:
        run: the folder.
        environ: where SLURM says which job this is.
        beat_seconds, silent_seconds: see the constants.
    """

    def __init__(
        self,
        run: Path,
        environ: Mapping[str, str] = os.environ,
        beat_seconds: float = BEAT_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self.run, self.path = run, run / FILE_NAME
        self.owner = Owner.this(environ)
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._lost_to: Owner | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def take(self) -> None:
        """Become the owner, and show from now on that this process lives.

        Raises:
            CheckpointError: another process trains in the folder, or the file cannot be written.
        """
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            mine = partial_of(self.path, self.owner.process)
            mine.write_text(json.dumps(dataclasses.asdict(self.owner), indent=1) + "\n", encoding="utf-8")
            sync(mine)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            while True:
                with self._alone():
                    if self._publish(mine):
                        break
                    other = _read(self.path)
                if other is not None and not self._may_follow(other):
                    raise CheckpointError(self._refusal(other))
                with self._alone():
                    self._set_aside(other)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            with suppress(OSError):
                mine.unlink()
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken over, as far as the thread has seen; costs nothing."""
        return self._lost_to is not None

    def require(self) -> None:
        """Look whether another process has taken over.

        Raises:
            CheckpointError: it has.
        """
        found = _read(self.path)
        if found is not None and found != self.owner:  # no file: nobody else is at work
            self._lost_to = found
            raise CheckpointError(f"--out={self.run}: {found} has taken over; this process writes nothing more in it")

    def release(self) -> None:
        """Let others in, if this process ever was the owner."""
        if self._thread.ident is None:
            return
        self._end.set()
        self._thread.join()
        if _read(self.path) == self.owner:
            with suppress(OSError):
                self.path.unlink()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder against other newcomers, until the end of the block or of this process.

        Without it, while one looks at a file that it has moved, another could publish its own. Where the file system
        has no such lock, or does not let go of one, both may take the folder; the slower one notices before it writes.
        """
        folder = os.open(self.run, os.O_RDONLY)
        try:
            end = time.monotonic() + _LOCK_SECONDS
            while not _lock(folder) and time.monotonic() < end:
                time.sleep(0.01)
            yield
        finally:
            os.close(folder)

    def _publish(self, mine: Path) -> bool:
        """Give the file its name, which only one of several newcomers can do; False if it is taken."""
        if _link(mine, self.path):
            sync(self.run)
            return True
        try:
            # NFS can say so of a link that it has just made. Contents tell less: their time is of a second.
            return self.path.samefile(mine)
        except FileNotFoundError:
            return False

    def _set_aside(self, judged: Owner | None) -> None:
        """Remove the file of an owner that may be followed. It gets another name first, which only one newcomer can do;
        that of another owner, who was faster, is put back."""
        aside = partial_of(with_suffix(self.path, REPLACED), self.owner.process)
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) != judged:
                _link(aside, self.path)
            aside.unlink(missing_ok=True)

    def _refusal(self, other: Owner) -> str:
        stop = f"scancel {other.job}" if other.job else f"kill {other.process.pid} on {other.process.machine}"
        return (
            f"--out={self.run}: {other} trains in it. Works: another --out; or stop that one first ({stop}) and "
            f"start again; or, if this folder is a copy of the one it trains in, remove {self.path}"
        )

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be written ({error.strerror or error})")

    def _may_follow(self, other: Owner) -> bool:
        if other.job and other.job == self.owner.job and self.owner.restart > other.restart:
            log.info("taking over from %s: SLURM has put the job back into its queue since", other)
            return True
        if other.process.is_here:
            return not other.process.is_alive
        log.info("waiting up to %g s for a sign of life of %s", self._silent_seconds, other)
        before, end = self._last_beat(), time.monotonic() + self._silent_seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, self._beat_seconds / 4))
            now = self._last_beat()
            if now is None:
                return True
            if now != before:
                return False
        log.info("taking over from %s, which gave none", other)
        return True

    def _last_beat(self) -> int | None:
        """The file's time of change, asked in a way that makes NFS look; None if there is no file any more."""
        try:
            with self.path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def _beat(self) -> None:
        while not self._end.wait(self._beat_seconds):
            try:
                self.require()
                os.utime(self.path)
            except CheckpointError:
                return
            except OSError as error:  # training itself will notice a disk that stays away
                log.debug("%s: no sign of life: %s", self.path, error)


@contextmanager
def claimed(run: Path, ranks: Mesh | Replicas) -> Iterator[Claim]:
    """Hold a run folder for the time of the block. All ranks make this call, and the main one takes the claim for all.

    Raises:
        CheckpointError: on every rank, if another job trains in the folder.
    """
    claim, problem = Claim(run), ""
    try:
        if ranks.is_main:
            try:
                claim.take()
            except CheckpointError as error:
                problem = str(error)
        problem = ranks.from_main(problem)
        if problem:
            raise CheckpointError(problem)
        yield claim
    finally:
        claim.release()


def _lock(folder: int) -> bool:
    """Lock an open folder; False if another process has it. True too where there are no such locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.debug("no lock: %s", error)
    return True


def _link(path: Path, name: Path) -> bool:
    """Give a file a second name; False if something else has it."""
    try:
        os.link(path, name)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if name.exists():
            return False
        path.replace(name)  # without hard links two that start at the same moment cannot be told apart
    return True


def _read(path: Path) -> Owner | None:
    """Who the file names; None if there is none, or what a full disk left of it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**{**content, "process": Process(**content["process"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
