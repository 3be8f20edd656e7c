"""``vilg train`` under the ``deepspeed`` launcher: whole, with a rank killed, and going on; either engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vilg.cli.main import main
from tests.train.test_stages import TINY, pairs  # noqa: F401 - a fixture

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
pytestmark = pytest.mark.slow
WAIT = 1800.0
"""Seconds that a run of a few steps may take on a machine with other work; most of them are imports."""
EXACT = [
    "optim.name=adamw", "train.precision=fp32", "model.dropout=0", "train.sample_every=0", "train.eval_every=0",
    "log.every=1",
]  # fmt: skip


def launched(data: Path, out: Path, *settings: str) -> subprocess.Popen[str]:
    """Two ranks on this machine, as ``deepspeed --num_gpus 2 --module megatron_vilg train ...`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    words = ["--module", "megatron_vilg", "train", "--preset", "demo", "--data", str(data), "--out", str(out)]
    return subprocess.Popen(
        [*launcher, *words, *TINY, *EXACT, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines}


@pytest.mark.parametrize("engine", ["deepspeed", "native"])
def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(engine: str, tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    alone, out = tmp_path / "alone", tmp_path / "out"
    steps = ["train.num_steps=40", "checkpoint.every=5"]
    assert main(["train", "--preset", "demo", "--data", str(pairs), "--out", str(alone), *TINY, *EXACT, *steps]) == 0
    made = [f"--{kind}-tokenizer={alone / f'{kind}_tokenizer'}" for kind in ("text", "image")]
    settings = [*made, *steps, f"train.engine={engine}", "parallel.zero=3"]
    process = launched(alone / "tokens", out, *settings)
    deadline = time.monotonic() + WAIT
    while not (out / "checkpoints" / "step-00000005" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    log = (out / "logs" / "rank-0001.log").read_text()
    os.kill(int(log.split("rank 1 of 2: ")[1].split("process ")[1].split()[0]), signal.SIGKILL)
    printed = process.communicate(timeout=WAIT)[0]
    assert process.returncode != 0, printed
    assert "LostRankError: rank 1 (node" in (out / "logs" / "rank-0000.log").read_text(), printed
    assert not (out / "export").exists()

    process = launched(alone / "tokens", out, *settings)
    printed = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 0 and "resumed from" in printed, printed
    found = losses(out)
    assert max(found) == 40
    assert found == pytest.approx(losses(alone), abs=1e-4)


def test_a_mistake_ends_the_launcher_with_our_code(tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    process = launched(pairs, tmp_path / "out", "train.engine=deepspeed", "parallel.pipeline=2")
    printed = process.communicate(timeout=WAIT)[0]
    assert process.returncode == 2
    assert "parallel.pipeline=2: DeepSpeed's own pipeline refuses ZeRO 2 and 3" in printed
