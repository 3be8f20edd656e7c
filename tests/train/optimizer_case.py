"""Steps of a tiny run, straight and through checkpoints, for tests of optimizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, RunConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.tiny import tiny_batch


def losses(engine: NativeEngine, steps: range) -> list[float]:
    each = 4 // engine.mesh.data_size
    first = engine.mesh.data_rank * each
    batches = [tiny_batch(engine.run.model, seed=step % 2).slice(first, first + each) for step in steps]
    return [engine.train_step(batch).loss.item() for batch in batches]


def saved(run: RunConfig, folder: Path, steps: range) -> list[float]:
    """Go on from the newest checkpoint if there is one, take steps, save."""
    engine = NativeEngine(run, build_mesh(run.parallel, "cpu"))
    checkpointer = Checkpointer(folder, CheckpointConfig(), engine.mesh)
    path = checkpointer.latest()
    if path is not None:
        engine.resume(checkpointer.load(path, engine.state_dict()).step)
    assert engine.step == steps.start
    result = losses(engine, steps)
    manifest = Manifest(kind="pretrain", model=dataclasses.asdict(run.model), step=engine.step)
    checkpointer.save(engine.step, engine.state_dict(), manifest)
    return result
