"""Which process writes a folder, and whether it still lives: so that nobody removes what another one is writing."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_vilg.checkpoint.files import PARTIAL, with_suffix

_FIRST_PID_NAMESPACE = "4026531836"
"""The number that Linux gives the processes that are in no container."""
_NAME = re.compile(r"(?P<final>.+)\.by-(?P<machine>.+)-(?P<pid>\d+)-(?P<start>\d+)" + re.escape(PARTIAL))
_ENDED = -1


@dataclass(frozen=True, slots=True)
class Process:
    """One process of one machine, told apart from later ones that get the same number."""

    machine: str
    """Host name, and the container where there is one: each counts its processes for itself."""
    pid: int
    start: int
    """Clock ticks from the start of the machine to that of the process; 0 where the system does not say."""

    @classmethod
    def this(cls) -> Self:
        """The one that asks."""
        return cls(_machine(), os.getpid(), _start_of(os.getpid()) or 0)

    @property
    def is_here(self) -> bool:
        """Whether this machine can say if it lives."""
        return self.machine == _machine()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, asked on its own machine; in doubt, it does."""
        start = _start_of(self.pid)
        if start is not None:
            return start == self.start
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # a process of somebody else, about whom the system says nothing
        return True


def partial_of(final: Path, process: Process) -> Path:
    """Where a process writes ``final``: ``NAME.by-HOST-PID-START.partial``."""
    return with_suffix(final, f".by-{process.machine}-{process.pid}-{process.start}{PARTIAL}")


def partials_of(final: Path) -> Iterator[tuple[Path, Process]]:
    """What any process is writing, or has left, under the name ``final``."""
    for path in sorted(final.parent.iterdir()):
        found = _NAME.fullmatch(path.name)
        if found and found["final"] == final.name:
            yield path, Process(found["machine"], int(found["pid"]), int(found["start"]))


def final_name(partial: str) -> str:
    """The name that such a folder gets when it is complete."""
    found = _NAME.fullmatch(partial)
    return found["final"] if found else partial


def _machine() -> str:
    try:
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    return socket.gethostname() + (f"-{namespace}" if namespace not in ("", _FIRST_PID_NAMESPACE) else "")


def _start_of(pid: int) -> int | None:
    """When a process started, in clock ticks; ``_ENDED`` if only its exit code is left, None if nothing is known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _ENDED if fields[0] in "ZX" else int(fields[19])
