"""What another process leaves in a run folder."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from megatron_vilg.checkpoint.claim import FILE_NAME, Owner
from megatron_vilg.checkpoint.files import write_text
from megatron_vilg.checkpoint.owner import Process


def leave(run: Path, process: Process, job: str = "", restart: int = 0) -> Path:
    """The file of another process."""
    owner = Owner(process, job, restart, "2026-01-01 00:00:00")
    write_text(run / FILE_NAME, json.dumps(dataclasses.asdict(owner)))
    return run / FILE_NAME


def living() -> Process:
    """Another process of this machine."""
    pid = os.getppid()
    start = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return dataclasses.replace(Process.this(), pid=pid, start=start)
