"""``kill -9`` at random moments of ``vilg train``: the same command always ends with the straight run's weights."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_vilg.checkpoint.export import load_model_folder
from tests.train.test_stages import TINY, pairs  # noqa: F401 - a fixture

LONGER = ["train.num_steps=60", "checkpoint.every=5", "image_tokenizer_train.num_steps=60"]
KILLS = 8


def command(data: Path, out: Path) -> list[str]:
    start = [sys.executable, "-m", "megatron_vilg", "train", "--preset", "demo", "--data", str(data), "--out", str(out)]
    return [*start, *TINY, *LONGER]


@pytest.mark.slow
def test_killed_runs_end_like_a_straight_one(tmp_path: Path, pairs: Path) -> None:  # noqa: F811
    start = time.monotonic()
    subprocess.run(command(pairs, tmp_path / "straight"), check=True, capture_output=True, env=dict(os.environ))
    duration = time.monotonic() - start
    chance = random.Random(0)
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(pairs, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(duration * chance.uniform(0.2, 0.9))
        process.kill()
        process.wait()
    subprocess.run(command(pairs, tmp_path / "killed"), check=True, capture_output=True)
    (_, straight), (_, killed) = (load_model_folder(tmp_path / name / "export") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys()
    for name, tensor in straight.items():
        assert torch.equal(tensor, killed[name]), name
