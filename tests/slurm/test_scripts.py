"""What the job scripts start, with a stand-in for SLURM's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "pretrain.sbatch"


SRUN = """#!/bin/sh
# The tasks end with CODES, one after the other; like srun, this ends with the highest code that it sees.
until [ "$1" = bash ]; do shift; done
highest=0
for CODE in $CODES; do
  export CODE
  code=0
  "$@" || code=$?
  [ "$code" -le "$highest" ] || highest=$code
done
exit $highest
"""
PYTHON = """#!/bin/sh
echo "threads=$OMP_NUM_THREADS" "$@"
[ -z "$FINISHES" ] || touch "$FINISHES-$SLURM_RESTART_COUNT"
[ "$CODE" -lt 128 ] || kill -$((CODE - 128)) $$
exit "$CODE"
"""
SCONTROL = """#!/bin/sh
echo scontrol "$@"
"""


def pretrain(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("python3", PYTHON), ("scontrol", SCONTROL), ("sleep", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": f"{folder}:{os.environ['PATH']}", "CODES": "0"}
    command = [str(SCRIPT), "--out", "runs/big"]
    return subprocess.run(
        command, env=job | environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("environment", "threads", "words"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}, 8, "-m megatron_vilg train"),
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


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("2 75", 2, False),
        ("75 1", 1, False),
        ("2 1 75", 1, False),
        ("143 2", 2, False),
        ("143 75", 75, True),
        ("138 138", 75, True),
        ("75 137", 137, False),
    ],
)
def test_a_failure_counts_more_than_what_it_makes_of_the_other_tasks(
    tmp_path: Path, codes: str, code: int, requeued: bool
) -> None:
    """srun says 75 where one task has failed with 2 and was a reason to end the others."""
    done = pretrain(tmp_path, CODES=codes)
    assert done.returncode == code, done.stderr
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_starts_that_finish_nothing_end_the_job(tmp_path: Path) -> None:
    """A time limit below the lead of its signal would stop every start at once."""
    assert "back into the queue" in pretrain(tmp_path, CODES="75 75").stdout
    done = pretrain(tmp_path, CODES="75 75", SLURM_RESTART_COUNT="1")
    assert done.returncode == 2 and "scontrol" not in done.stdout
    assert done.stderr.startswith("job 7: stopped in 2 starts in a row before anything in runs/big was finished")
    assert "Works: sbatch --time=24:00:00 ..." in done.stderr
    assert "scontrol requeue 8" in pretrain(tmp_path, CODES="75", SLURM_JOB_ID="8").stdout, "another job counts anew"


def test_a_start_that_finishes_something_is_no_idle_one(tmp_path: Path) -> None:
    step = str(tmp_path / "runs" / "big" / "step")
    for restart in range(3):
        (tmp_path / "runs" / "big" / "logs").mkdir(parents=True, exist_ok=True)
        finishes = step if restart == 1 else ""
        done = pretrain(tmp_path, CODES="75", SLURM_RESTART_COUNT=str(restart), FINISHES=finishes)
        assert done.returncode == 75 and "scontrol requeue 7" in done.stdout, restart


@pytest.mark.parametrize(
    ("array", "workers", "says"),
    [
        ((0, 3, 4), "", "worker 2 of 4"),
        ((2, 17, 2), "64", "worker 2 of 64"),
        (
            (1, 3, 3),
            "",
            "--array: 3 tasks from 1 to 3; must start at 0 and have no gaps. Works: --array=0-2, or",
        ),
        (
            (0, 6, 4),
            "",
            "--array: 4 tasks from 0 to 6; must start at 0 and have no gaps. Works: --array=0-3, or",
        ),
        ((0, 3, 4), "3", "WORKERS=3: the array goes to task 3. Works: tasks from 0 to 2"),
    ],
)
def test_an_array_that_leaves_shards_to_nobody_is_refused(
    tmp_path: Path, array: tuple[int, int, int], workers: str, says: str
) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    job = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(("MIN", "MAX", "COUNT"), array, strict=True)}
    job |= {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_NODELIST": "n1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job |= {"WORKERS": workers} if workers else {}
    script = str(SCRIPT.with_name("encode.sbatch"))
    done = subprocess.run([script], env=job, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if says.startswith("worker") else 2)
    assert (done.stdout if done.returncode == 0 else done.stderr).startswith(says)
