"""Writers that are killed, at every file operation and at any moment: what is left can be loaded."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vilg.checkpoint.manifest import Manifest, read_sound_manifest
from tests.checkpoint.checkpoint_case import assert_equal, empty_state, keeper, make_state, save


def _child(work: Callable[[], object]) -> int:
    """Fork a child that does ``work``; returns its process id. It exits with 0 unless ``work`` raises or is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _save_and_die_at(event: int, folder: Path, step: int) -> None:
    """Save, but die by SIGKILL right before the ``event``-th time that Python touches a file below ``folder``."""
    seen = 0

    def hook(name: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        # Deleting a tree names files relative to an open folder.
        if name in ("os.remove", "os.rmdir") or (
            name.split(".")[0] in ("open", "os", "shutil") and str(args[0]).startswith(str(folder))
        ):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(keeper(folder, keep_last=2), step)


@pytest.mark.parametrize("step", [3, 2], ids=["new step", "same step again"])
def test_a_kill_at_every_file_operation_leaves_the_newest_checkpoint(tmp_path: Path, step: int) -> None:
    origin = tmp_path / "origin"
    for earlier in (1, 2):
        save(keeper(origin), earlier)
    event, status, outcomes = 0, -1, []
    while status != 0:
        event += 1
        folder = tmp_path / f"killed-{event}"
        shutil.copytree(origin, folder)
        _, status = os.waitpid(_child(functools.partial(_save_and_die_at, event, folder, step)), 0)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        checkpointer = keeper(folder, keep_last=2)
        path, state = checkpointer.latest(), empty_state()
        found = checkpointer.load(path, state).step
        assert_equal(state, make_state(found))
        assert path == checkpointer.path(max(checkpointer.steps()))
        for complete in checkpointer.steps():
            read_sound_manifest(checkpointer.path(complete))
        outcomes.append(found)
        save(checkpointer, 4)
        assert all(p.name in {"step-00000002", "step-00000003", "step-00000004"} for p in folder.iterdir())
        shutil.rmtree(folder)
    assert event > 15, "the hook saw too few operations to mean anything"
    assert outcomes == sorted(outcomes) and outcomes[0] == 2 and outcomes[-1] == step


def _save_forever(folder: Path, first: int) -> None:
    checkpointer = keeper(folder, keep_last=2)
    for step in range(first, first + 10_000):
        checkpointer.save(step, make_state(step, 200), Manifest(kind="test", step=step))


def test_a_kill_at_a_random_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    checkpointer = keeper(tmp_path, keep_last=2)
    checkpointer.save(1, make_state(1, 200), Manifest(kind="test", step=1))
    last = 1
    for _ in range(25):
        child = _child(functools.partial(_save_forever, tmp_path, last + 1))
        time.sleep(chance.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "the child ended by itself"
        path = checkpointer.latest()
        assert path is not None
        newest = int(path.name.removeprefix("step-"))
        assert newest >= last
        assert newest == max(checkpointer.steps()), "a final name on an incomplete folder"
        state = empty_state(200)
        assert checkpointer.load(path, state).step == newest
        assert_equal(state, make_state(newest, 200))
        last = newest
