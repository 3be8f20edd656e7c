"""Ranks save and look for one checkpoint: each reads its share of the files, and they agree on what was found."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vilg.checkpoint import manifest as manifest_module
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest, read_sound_manifest
from megatron_vilg.config.schema import CheckpointConfig, ParallelConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.parallel.mesh import build_mesh
from tests.helpers import run_distributed


def _with_digests_noted(folder: Path, async_save: bool) -> list[list[str]]:
    """Save two steps on several ranks, damage the second, go back to the first; the files that this rank has read."""
    read: list[str] = []
    digest = manifest_module.digest_of

    def noted(path: Path) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        return digest(path)

    def reads() -> list[str]:
        found = sorted(read)
        read.clear()
        return found

    manifest_module.digest_of = noted
    mesh = build_mesh(ParallelConfig(), "cpu")
    checkpointer = Checkpointer(folder, CheckpointConfig(async_save=async_save), mesh)
    rank = dist.get_rank()
    for step in (1, 2):
        state = {"model": {f"w{rank}": torch.full((100,), float(rank + step))}}
        checkpointer.save(step, state, Manifest(kind="test", step=step))
    checkpointer.finish()
    saved = reads()
    if mesh.is_main:
        (checkpointer.path(2) / "__1_0.distcp").write_bytes(bytes(10))
    dist.barrier()
    assert checkpointer.latest() == checkpointer.path(1)
    found = reads()
    state = {"model": {f"w{rank}": torch.zeros(100)}}
    checkpointer.load(checkpointer.path(1), state)
    assert state["model"][f"w{rank}"].tolist() == [rank + 1.0] * 100
    return [saved, found, reads()]


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "in the background"])
def test_each_rank_reads_a_share_of_the_files_and_none_twice(tmp_path: Path, async_save: bool) -> None:
    main, other = run_distributed(_with_digests_noted, 2, tmp_path, async_save)
    folders = ("step-00000001.partial", "step-00000002.partial")
    assert main[0] == [f"{folder}/{name}" for folder in folders for name in (".metadata", "__0_0.distcp")]
    assert other[0] == [f"{folder}/__1_0.distcp" for folder in folders]
    first = [f"step-00000001/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")]
    assert sorted(main[1] + other[1]) == [*first, "step-00000002/.metadata", "step-00000002/__0_0.distcp"]
    assert set(main[1]) & set(first) and set(other[1]) & set(first)
    assert main[2] == other[2] == []
    assert len(read_sound_manifest(tmp_path / "step-00000001").files) == 3


def _with_one_rank_that_cannot_read(folder: Path, async_save: bool) -> str:
    mesh = build_mesh(ParallelConfig(), "cpu")
    checkpointer = Checkpointer(folder, CheckpointConfig(async_save=async_save), mesh)
    rank = dist.get_rank()

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    if rank == 1:
        manifest_module.digest_of = fail
    try:
        checkpointer.save(1, {"model": {f"w{rank}": torch.ones(2)}}, Manifest(kind="test", step=1))
        checkpointer.finish()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("async_save", [False, True], ids=["at once", "in the background"])
def test_a_rank_that_cannot_read_what_it_wrote_stops_all(tmp_path: Path, async_save: bool) -> None:
    answers = run_distributed(_with_one_rank_that_cannot_read, 2, tmp_path, async_save)
    assert all("Input/output error" in answer for answer in answers), answers
    assert Checkpointer(tmp_path, CheckpointConfig()).latest() is None
