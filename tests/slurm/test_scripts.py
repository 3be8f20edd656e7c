"""What the job scripts start, with a stand-in for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "pretrain.sbatch"


def pretrain(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "srun").write_text('#!/bin/sh\necho "threads=$OMP_NUM_THREADS" "$@"\n')
    (folder / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [str(SCRIPT), "--out", "runs/big"]
    return subprocess.run(command, env=job | environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("environment", "threads", "words"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8, "python3 -m megatron_vilg train"),
        ({"SLURM_CPUS_PER_TASK": "64", "RANKS_PER_NODE": "8"}, 8, "agent --nproc-per-node 8 -m megatron_vilg train"),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "4", "RANKS_PER_NODE": "8"}, 1, "--nproc-per-node 8"),
        ({"SLURM_CPUS_PER_TASK": "64", "RANKS_PER_NODE": "8", "OMP_NUM_THREADS": "2"}, 2, "--nproc-per-node 8"),
    ],
    ids=["tasks", "torchrun", "few-cpus", "set"],
)
def test_ranks_of_a_task_share_its_cpus(tmp_path: Path, environment: dict[str, str], threads: int, words: str) -> None:
    done = pretrain(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    started = done.stdout.splitlines()[-1]
    assert started.startswith(f"threads={threads} ") and words in started and started.endswith("train --out runs/big")


def test_torchrun_in_each_of_several_tasks_is_refused(tmp_path: Path) -> None:
    done = pretrain(tmp_path, SLURM_NTASKS_PER_NODE="8", SLURM_CPUS_PER_TASK="8", RANKS_PER_NODE="8")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "RANKS_PER_NODE=8: needs one task per node, this job has 8. Works: sbatch --ntasks-per-node=1"
    )
