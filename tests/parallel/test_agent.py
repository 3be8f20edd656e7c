"""torchrun for job scripts: the ranks' exit code, their signals, the other nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vilg.parallel.agent import nodes_of_step
from tests.parallel.test_slurm import STEP

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(sys.argv[2])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
(folder / f"ready-{rank}").touch()
if sys.argv[1] == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "end":
    time.sleep(120)
"""


def start(folder: Path, how: str) -> subprocess.Popen[bytes]:
    (folder / "script.py").write_text(SCRIPT)
    agent = [sys.executable, "-m", "megatron_vilg.parallel.agent", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*agent, str(folder / "script.py"), how, str(folder)], env=environment, start_new_session=True
    )


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("die", 128 + signal.SIGKILL)])
def test_ends_with_the_ranks_code(how: str, code: int, tmp_path: Path) -> None:
    assert start(tmp_path, how).wait(120) == code


def test_a_signal_to_all_processes_is_for_the_ranks(tmp_path: Path) -> None:
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in [process.pid, *map(int, found.stdout.split())]:
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(120) == 75


def test_the_nodes_of_a_step_meet_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {**STEP, "MASTER_ADDR": "gpu07.cluster", "SLURM_RESTART_COUNT": "1"}
    assert nodes_of_step(step) == [
        "--nnodes=4",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=gpu07.cluster:{12_000 + (1234 * 31 + 2) % 18_000}",
        "--rdzv-id=1234.2.1",
    ]
    assert nodes_of_step({}) == [] and nodes_of_step({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == []
