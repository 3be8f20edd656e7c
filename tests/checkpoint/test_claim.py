"""Who may train in a run folder: one job, until it lets go, is dead, or has been put back into SLURM's queue."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megatron_vilg.checkpoint.claim import FILE_NAME, Claim
from megatron_vilg.checkpoint.owner import Process
from megatron_vilg.errors import CheckpointError
from tests.checkpoint.claim_case import leave, living

BEAT, SILENT = 0.02, 1.0


def claim(run: Path, **environ: str) -> Claim:
    return Claim(run, environ, BEAT, SILENT)


ELSEWHERE = Process("node-7.cluster", 7, 8)
DEAD = dataclasses.replace(Process.this(), start=1)


def test_a_folder_is_free_again_after_the_owner_has_left(tmp_path: Path) -> None:
    for _ in range(2):
        owner = claim(tmp_path / "run")
        owner.take()
        assert json.loads((tmp_path / "run" / FILE_NAME).read_text())["process"]["pid"] == os.getpid()
        owner.require()
        owner.release()
        assert list((tmp_path / "run").iterdir()) == []


def test_a_process_does_not_take_a_folder_twice(tmp_path: Path) -> None:
    owner, again = claim(tmp_path), claim(tmp_path)
    again.owner = owner.owner  # both of the same second
    owner.take()
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on .* trains in it"):
        again.take()
    again.release()
    owner.require()
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_of_this_machine_keeps_its_folder(tmp_path: Path) -> None:
    path = leave(tmp_path, living(), job="12")
    before = path.read_text()
    with pytest.raises(CheckpointError) as caught:
        claim(tmp_path, SLURM_JOB_ID="13").take()
    assert f"--out={tmp_path}: process {os.getppid()} on {living().machine}, SLURM job 12, since 2026" in str(
        caught.value
    )
    assert (
        "trains in it. Works: another --out; or stop that one first (scancel 12) and start again; or, if this "
        in str(caught.value)
    )
    assert str(caught.value).endswith(f"is a copy of the one it trains in, remove {path}")
    assert path.read_text() == before
    path.unlink()  # as advised for a copy
    owner = claim(tmp_path)
    owner.take()
    owner.release()


@pytest.mark.parametrize("left", ["dead", "half a file"])
def test_what_a_killed_process_of_this_machine_left_does_not_lock_anybody_out(tmp_path: Path, left: str) -> None:
    path = leave(tmp_path, DEAD)
    if left == "half a file":
        os.truncate(path, 10)
    start = time.monotonic()
    owner = claim(tmp_path)
    owner.take()
    owner.release()
    assert time.monotonic() - start < SILENT and not path.exists()


def test_a_process_elsewhere_is_alive_as_long_as_it_gives_signs(tmp_path: Path) -> None:
    path = leave(tmp_path, ELSEWHERE)
    end = threading.Event()

    def beat() -> None:
        while not end.wait(BEAT):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match="process 7 on node-7.cluster, since .*kill 7 on node-7.cluster"):
            claim(tmp_path).take()
    finally:
        end.set()
        thread.join()
    start = time.monotonic()
    owner = claim(tmp_path)
    owner.take()
    assert time.monotonic() - start >= SILENT
    owner.release()


def test_the_owner_gives_signs_of_life_and_only_in_its_own_file(tmp_path: Path) -> None:
    owner = claim(tmp_path)
    owner.take()
    path = tmp_path / FILE_NAME
    os.utime(path, (1, 1))
    end = time.monotonic() + 5
    while path.stat().st_mtime < 2 and time.monotonic() < end:
        time.sleep(BEAT)
    assert path.stat().st_mtime > 2
    assert not owner.is_lost
    leave(tmp_path, ELSEWHERE)
    os.utime(path, (1, 1))
    while not owner.is_lost and time.monotonic() < end:
        time.sleep(BEAT)
    assert owner.is_lost and path.stat().st_mtime == 1
    with pytest.raises(
        CheckpointError, match="process 7 on node-7.cluster, since .* has taken over; this process writes"
    ):
        owner.require()
    owner.release()
    assert path.exists()


@pytest.mark.parametrize(
    ("process", "job", "restart", "works"),
    [("living", "12", 1, True), ("elsewhere", "12", 1, True), ("living", "12", 0, False), ("living", "11", 1, False)],
)
def test_a_job_that_slurm_put_back_takes_over_at_once(
    tmp_path: Path, process: str, job: str, restart: int, works: bool
) -> None:
    leave(tmp_path, living() if process == "living" else ELSEWHERE, job="12")
    start = time.monotonic()
    owner = claim(tmp_path, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=str(restart))
    if works:
        owner.take()
        owner.release()
    else:
        with pytest.raises(CheckpointError, match="trains in it"):
            owner.take()
    assert time.monotonic() - start < SILENT


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=f"run/{FILE_NAME}: cannot be written"):
        claim(tmp_path / "run").take()


@pytest.mark.parametrize("left", ["nothing", "of a dead process"])
def test_one_of_two_that_start_at_the_same_moment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """The other one takes the folder after this one has looked, and before it writes."""
    if left != "nothing":
        leave(tmp_path, DEAD)
    faster, slower = claim(tmp_path, SLURM_JOB_ID="12"), claim(tmp_path, SLURM_JOB_ID="13")
    faster.owner = dataclasses.replace(faster.owner, process=living())
    taken: list[Claim] = []

    def after_the_faster_one(call: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*args: Any, **options: Any) -> Any:
            if not taken:
                taken.append(faster)
                faster.take()
            return call(*args, **options)

        return delayed

    monkeypatch.setattr(Path, "mkdir", after_the_faster_one(Path.mkdir))
    monkeypatch.setattr(slower, "_may_follow", after_the_faster_one(slower._may_follow))
    with pytest.raises(CheckpointError, match="SLURM job 12, since .* trains in it"):
        slower.take()
    faster.require()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    faster.release()
    assert list(tmp_path.iterdir()) == []


def test_several_processes_that_start_at_once_agree_on_one_owner(tmp_path: Path) -> None:
    context = get_context("fork")
    for attempt in range(4):
        run = tmp_path / str(attempt)
        run.mkdir()
        if attempt % 2:
            leave(run, DEAD)
        barrier, answers = context.Barrier(4), context.Queue()
        processes = [context.Process(target=take_and_stay, args=(run, barrier, answers)) for _ in range(4)]
        for process in processes:
            process.start()
        taken = [answers.get(timeout=60) for _ in processes]
        for process in processes:
            process.join(60)
        assert sorted(taken) == [False, False, False, True]


def test_a_lock_that_nobody_lets_go_of_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vilg.checkpoint.claim._LOCK_SECONDS", 0.05)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        owner = claim(tmp_path)
        owner.take()
        assert json.loads((tmp_path / FILE_NAME).read_text())["process"]["pid"] == os.getpid()
        owner.release()
        assert not (tmp_path / FILE_NAME).exists()
    finally:
        os.close(folder)


def take_and_stay(run: Path, barrier: Any, answers: Any) -> None:
    owner = claim(run)
    barrier.wait(60)
    try:
        owner.take()
        answers.put(True)
    except CheckpointError:
        answers.put(False)
    barrier.wait(60)
    owner.release()


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    leave(tmp_path, DEAD)
    owner = claim(tmp_path)
    owner.take()
    owner.require()
    owner.release()
    assert list(tmp_path.iterdir()) == []
