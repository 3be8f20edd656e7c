from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vilg import log


def test_only_the_first_rank_reports_but_all_warn(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        log.configure(rank=rank, size=2)
        log.get_logger("megatron_vilg.x").info("news")
        log.get_logger("megatron_vilg.x").warning("trouble")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["I rank 0: news", "W rank 0: trouble", "W rank 1: trouble"]


def test_a_file_gets_everything_of_its_rank_and_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(rank=3, size=4)
    path = tmp_path / "logs" / "rank-0003.log"
    logger = log.get_logger("megatron_vilg.x")
    with log.also_to_file(path):
        logger.info("first start")
    with pytest.raises(ZeroDivisionError), log.also_to_file(path):
        logger.info("second start")
        logger.info("%d", 1 // 0)
    logger.info("behind it")
    text = path.read_text()
    assert "first start" in text and "second start" in text and "behind it" not in text
    assert "this process ends" in text and "ZeroDivisionError" in text
    assert "start" not in capsys.readouterr().err


def test_a_full_disk_is_told_once_and_takes_no_errors_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure()
    path = tmp_path / "rank-0000.log"
    path.symlink_to("/dev/full")
    with pytest.raises(ZeroDivisionError), log.also_to_file(path):
        for number in range(3):
            log.get_logger("megatron_vilg.x").info("step %d", number)
        log.get_logger("megatron_vilg.x").info("%d", 1 // 0)
    said = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["I step 0", f"W {path}: cannot be written (No space left on device)", "I step 1", "I step 2"]


def test_a_crash_leaves_its_stack(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from megatron_vilg import log; log.configure()\n"
        "with log.also_to_file(pathlib.Path(sys.argv[1])): os.abort()"
    )
    path = tmp_path / "rank-0000.log"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60, capture_output=True)
    assert done.returncode < 0
    assert "Fatal Python error: Aborted" in path.read_text()
