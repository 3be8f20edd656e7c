"""torchrun that leaves signals to its ranks and ends with their exit code; in a step of SLURM it finds the other nodes.

    srun --ntasks-per-node=1 python -m megatron_vilg.parallel.agent --nproc-per-node 8 -m megatron_vilg train ...

torchrun itself ends with 1 whatever its ranks said, so that a job script could not tell a run that was stopped and
saved (75) from one that failed; and it ends at the signals that SLURM sends to all processes of a step, SIGUSR1 before
the time limit and SIGTERM before it makes room for another job. At Ctrl-C it prints a stack trace of its own; its ranks
have a session each, which the terminal's SIGINT does not reach.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from megatron_vilg.parallel.slurm import meeting_place

STOPPED = 75
"""What ``vilg train`` ends with when a signal has stopped it and nothing is lost."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
"""SIGUSR1 comes from SLURM, which sends it to the ranks as well."""
_TORCHRUNS_OWN = "--signals-to-handle=SIGHUP,SIGQUIT"
"""torchrun's handler ends the ranks after 30 seconds, and torchrun with 1."""


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run torchrun; returns the exit code of the first rank that had no success, 128 + n if signal n ended it."""
    # Handlers, as ranks would inherit it if these were ignored. They come first: imports take seconds.
    for number in (signal.SIGUSR1, *_FORWARDED):
        signal.signal(number, _leave_to_ranks)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        torchrun([*nodes_of_step(environ), _TORCHRUNS_OWN, *words])
    except ChildFailedError as error:
        # srun ends the other tasks once this one has ended; a signal must not spoil their exit codes.
        for number in _FORWARDED:
            signal.signal(number, signal.SIG_IGN)
        code = error.get_first_failure()[1].exitcode
        # Else all have saved, and said so; or the agent has ended the slower ones behind the first that had.
        quiet = (STOPPED, -signal.SIGTERM) if code == STOPPED else ()
        if any(failure.exitcode not in quiet for failure in error.failures.values()):
            sys.stderr.write(f"{error}\n")
        return code if code > 0 else 128 - code
    return 0


def _leave_to_ranks(number: int, frame: FrameType | None) -> None:
    """Signals are for the ranks, whose code this process then ends with; without ranks, nothing has been done yet."""
    ranks = list(_children())
    if not ranks:
        os._exit(STOPPED)
    if number in _FORWARDED:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)


def _children() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state not in "ZX":
                yield int(path.parent.name)


def nodes_of_step(environ: Mapping[str, str]) -> list[str]:
    """torchrun's options for a step of ``srun`` with one task on each of several nodes; none for anything else."""
    nodes = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if nodes == "1":
        return []
    address, port = meeting_place(environ)
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{port}",
        f"--rdzv-id={job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}",
    ]


if __name__ == "__main__":
    sys.exit(main())
