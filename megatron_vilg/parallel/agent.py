"""torchrun inside ``srun``, one task per node: it finds the other nodes by itself and ends with its ranks' exit code.

    srun --ntasks-per-node=1 python -m megatron_vilg.parallel.agent --nproc-per-node 8 -m megatron_vilg train ...

torchrun itself ends with 1 whatever its ranks said, so that a job script could not tell a run that was stopped and
saved (75) from one that failed; and it ends at SIGUSR1, which SLURM sends to all processes of a step before the time
limit.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from megatron_vilg.parallel.slurm import meeting_place


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run torchrun; returns the exit code of the first rank that had no success, 128 + n if signal n ended it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    words = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it is for the ranks, which set a handler of their own
    try:
        torchrun([*nodes_of_step(environ), *words])
    except ChildFailedError as error:
        # srun ends the other tasks once this one has ended; a signal must not spoil their exit codes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stderr.write(f"{error}\n")
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


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
