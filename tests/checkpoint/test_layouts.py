"""Checkpoints of several ranks, through the tools, into another layout: training goes on as if never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.checkpoint.reshape import merge, shard
from megatron_vilg.checkpoint.run_folder import write_run_folder
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.checkpoint.tensors import read_whole
from megatron_vilg.checkpoint.verify import problems_of
from megatron_vilg.config.schema import CheckpointConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.parallel.cases import BATCH, case_run, codebook
from tests.tiny import tiny_batch

STOP = 2
"""Steps before the checkpoint; one more follows."""


def _steps(engine: NativeEngine, first: int, count: int) -> float:
    """Train ``count`` steps; the last loss."""
    mesh = engine.mesh
    size = BATCH // mesh.data_size
    for step in range(first, first + count):
        batch = tiny_batch(engine.run.model, BATCH, seed=step)
        result = engine.train_step(batch.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size))
    return float(result.loss)


def train_and_save(folder: Path, parallel: dict[str, Any]) -> None:
    """Two steps, a checkpoint, in the layout of the current process group."""
    run = case_run(parallel)
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    _steps(engine, 0, STOP)
    manifest = Manifest(kind="pretrain", step=STOP, samples_seen=STOP * BATCH, model=dataclasses.asdict(run.model))
    Checkpointer(folder / "checkpoints", CheckpointConfig(), mesh).save(STOP, engine.state_dict(), manifest)


def resume_and_step(folder: Path, parallel: dict[str, Any], expected: float) -> None:
    """Load the newest checkpoint in the layout of the current process group; the next loss must be ``expected``."""
    run = case_run(parallel)
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    checkpointer = Checkpointer(folder / "checkpoints", CheckpointConfig(), mesh)
    path = checkpointer.latest()
    assert path is not None
    manifest = checkpointer.load(path, engine.state_dict())
    assert (manifest.step, manifest.samples_seen) == (STOP, STOP * BATCH)
    engine.resume(manifest.step)
    assert _steps(engine, STOP, 1) == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def straight() -> float:
    """The loss of the third step in one process that was never stopped."""
    run = case_run()
    engine = NativeEngine(run, build_mesh(run.parallel, "cpu"), codebook(run))
    return _steps(engine, 0, STOP + 1)


@pytest.mark.parametrize(
    ("world", "parallel", "other_world", "other"),
    [
        (4, {"tensor": 2, "shard": 2}, 2, {"pipeline": 2, "num_microbatches": 2}),
        pytest.param(
            8,
            {"tensor": 2, "pipeline": 2, "shard": 2, "num_microbatches": 2},
            4,
            {"tensor": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param(4, {"shard": 4}, 4, {"tensor": 2, "pipeline": 2, "num_microbatches": 2}, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_in_another_layout_by_way_of_the_tools(
    tmp_path: Path, straight: float, world: int, parallel: dict[str, Any], other_world: int, other: dict[str, Any]
) -> None:
    run_distributed(train_and_save, world, tmp_path, parallel)
    with open_source(tmp_path) as source:
        assert isinstance(source, DcpSource)
        assert problems_of(source) == []
        assert max(len(boxes) for boxes in source._boxes.values()) >= 2, "nothing was cut, so nothing is put together"
        merge(source, tmp_path / "whole", optimizer=True)
        with open_source(tmp_path / "whole") as whole:
            shard(whole, tmp_path / "ranks", 4, 3, optimizer=True)
        with open_source(tmp_path / "ranks") as ranks:
            write_run_folder(ranks, tmp_path / "again")
            state = {name: read_whole(source, name) for name in source.tensors}
            assert all(torch.equal(read_whole(ranks, name), value) for name, value in state.items())
    resume_and_step(tmp_path / "again", {}, straight)
    run_distributed(resume_and_step, other_world, tmp_path / "again", other, straight)
