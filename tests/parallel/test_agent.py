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
def save(*_):
    time.sleep(0.5)
    sys.exit(75)

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
if sys.argv[1] == "behind" and rank == 1:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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


def test_ends_with_zero_after_success(tmp_path: Path) -> None:
    assert start(tmp_path, "end").wait(120) == 0


def test_ends_with_the_code_of_a_lost_rank_and_tells(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, "die").wait(120) == 128 + signal.SIGKILL
    assert "Signal 9 (SIGKILL)" in capfd.readouterr().err


def started(folder: Path, how: str = "wait") -> subprocess.Popen[bytes]:
    process = start(folder, how)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_is_passed_on_and_ends_with_the_ranks_code(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun itself ends with 1 after it, and with a stack trace."""
    process = started(tmp_path)
    process.send_signal(number)
    assert process.wait(120) == 75
    told = capfd.readouterr().err
    assert "Traceback" not in told and "FAILED" not in told


def test_a_rank_that_the_agent_ended_behind_one_that_saved_is_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 goes on at SIGINT, and knows no more of SIGTERM than a process that has no handlers yet."""
    process = started(tmp_path, "behind")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    assert "FAILED" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_there_are_ranks_is_a_stop(number: signal.Signals) -> None:
    code = (
        "import os, sys\n"
        "from megatron_vilg.parallel import agent\n"
        "def meeting_place(environ):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    os._exit(1)\n"
        "agent.meeting_place = meeting_place\n"
        "agent.main([], {'SLURM_STEP_NUM_TASKS': '2'})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=False).returncode == 75


def test_a_signal_to_all_processes_is_for_the_ranks(tmp_path: Path) -> None:
    process = started(tmp_path)
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in [process.pid, *map(int, found.stdout.split())]:
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(120) == 75


def test_the_nodes_of_a_step_meet_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {**STEP, "MASTER_ADDR": "gpu07.cluster", "SLURM_RESTART_COUNT": "1"}
    assert nodes_of_step(step) == [
        "--nnodes=4",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=gpu07.cluster:{12_000 + (1234 * 31 + 2 + 997) % 18_000}",
        "--rdzv-id=1234.2.1",
    ]
    assert nodes_of_step({}) == [] and nodes_of_step({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) == []
