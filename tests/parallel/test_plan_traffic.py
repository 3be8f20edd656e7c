"""The bytes that ``vilg plan`` prints per axis are the bytes that ranks of real steps send."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vilg.config.schema import OptimConfig, RunConfig
from megatron_vilg.parallel.estimate import AXES, estimate
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.parallel.cases import case_model, case_run
from tests.parallel.traffic import Traffic
from tests.tiny import tiny_batch

BATCH = 16
MODEL = case_model(
    width=64, num_layers=6, num_text_slots=6, codebook_dim=0, image_side=6, text_vocab_size=64, image_vocab_size=64
)


def sent_in_second_step(run: RunConfig) -> tuple[int, dict[str, int]]:
    """This rank's place in the pipeline, and the bytes it sends by axis."""
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh)
    size = BATCH // mesh.data_size
    batch = tiny_batch(run.model, BATCH).slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    engine.train_step(batch)
    with Traffic() as traffic:
        engine.train_step(batch)
    groups = {axis: mesh.axis(axis).get_group().group_name for axis in AXES}
    assert set(traffic.sent) <= {groups[axis] for axis in AXES if mesh.size(axis) > 1}, "traffic outside of the axes"
    return mesh.rank("pp"), {axis: traffic.sent[groups[axis]] for axis in AXES}


def layout(world_size: int, precision: str = "fp32", **parallel: Any) -> Any:
    words = " ".join(f"{key}={value}" for key, value in parallel.items())
    return pytest.param(world_size, precision, parallel, id=f"{world_size} {precision} {words}")


def slow(world_size: int, precision: str = "fp32", **parallel: Any) -> Any:
    param = layout(world_size, precision, **parallel)
    return pytest.param(*param.values, id=param.id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("world_size", "precision", "parallel"),
    [
        layout(4, tensor=2, pipeline=2, num_microbatches=2),
        layout(4, "bf16", replica=2, zero=3, num_microbatches=2),
        layout(4, "bf16", tensor=2, zero=2, recompute="block", num_microbatches=2),
        layout(4, "bf16", replica=2, reduce_precision="bf16"),
        slow(4, zero=2, num_microbatches=2, reduce_precision="bf16"),
        slow(2, zero=1, num_microbatches=2),
        slow(2, "bf16", zero=2, num_microbatches=4),
        slow(4, zero=3, num_microbatches=2),
        slow(4, replica=2, zero=1, num_microbatches=2),
        slow(4, "bf16", tensor=4),
        slow(2, tensor=2, recompute="selective"),
        slow(2, pipeline=2, num_microbatches=4, zero=1),
        slow(2, pipeline=2, schedule="interleaved", stages_per_rank=3, num_microbatches=4, zero=3),
        slow(8, tensor=2, pipeline=2, num_microbatches=2, zero=3),
        slow(8, "bf16", tensor=2, pipeline=2, num_microbatches=2, zero=1),
    ],
)
def test_ranks_send_what_was_planned(world_size: int, precision: str, parallel: dict[str, Any]) -> None:
    """Within half a percent: the plan leaves out the counts, totals and norms of a step (tens of bytes), and rows that
    fill up uneven shards."""
    run = case_run(parallel, MODEL, batch_size=BATCH, precision=precision)
    planned = estimate(run, world_size).ranks
    for place, sent in run_distributed(sent_in_second_step, world_size, run, timeout=300.0):
        assert sent == pytest.approx(planned[place].sent, rel=0.005), (place, planned[place].sent)


@pytest.mark.parametrize(
    ("world_size", "precision", "parallel"),
    [
        layout(2, "bf16"),
        slow(4, tensor=2),
        slow(4, "bf16", replica=2),
        slow(4, "bf16", tensor=4),
        slow(4, "bf16", pipeline=2, num_microbatches=2),
        slow(8, "bf16", tensor=2, replica=2),
    ],
)
def test_what_muon_sends_is_planned(world_size: int, precision: str, parallel: dict[str, Any]) -> None:
    """It gathers every matrix over all axes that hold pieces, and broadcasts its update over all that need it."""
    run = case_run(parallel, MODEL, batch_size=BATCH, precision=precision)
    adamw = estimate(run, world_size).ranks
    run = dataclasses.replace(run, optim=OptimConfig(name="muon", lr=1e-2, warmup_steps=2))
    planned = estimate(run, world_size).ranks
    for place, sent in run_distributed(sent_in_second_step, world_size, run, timeout=300.0):
        assert sent == pytest.approx(planned[place].sent, rel=0.005), (place, planned[place].sent)
        assert sum(sent.values()) > 1.05 * sum(adamw[place].sent.values())
