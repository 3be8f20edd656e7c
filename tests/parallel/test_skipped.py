"""A step that is not finite on one rank changes nothing on any."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.parallel.cases import BATCH, case_model, case_run, codebook, whole
from tests.tiny import tiny_batch


def skipped_on_the_second_data_rank(run: RunConfig) -> tuple[list[float], bool, bool]:
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    size = BATCH // mesh.data_size
    weights: list[dict[str, Tensor]] = []
    skipped = []
    for step in range(3):
        batch = tiny_batch(run.model, BATCH, seed=step).slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        broken = step == 1 and mesh.data_rank == 1 and mesh.rank("pp") == 0
        embed = engine.parts[0].embed
        handle = None
        if broken and embed is not None:
            handle = embed.register_forward_hook(lambda module, args, output: output * float("nan"))
        skipped.append(engine.train_step(batch).skipped.item())
        if handle is not None:
            handle.remove()
        weights.append({name: whole(p) for name, p in engine.named_parameters()})
    kept = all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    learns = any(not torch.equal(weights[1][name], tensor) for name, tensor in weights[2].items())
    return skipped, kept, learns


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {"num_microbatches": 2}), (4, {"pipeline": 2, "num_microbatches": 2})],
    ids=["data 2", "pipeline 2 x data 2"],
)
def test_all_ranks_skip_together_and_go_on(world_size: int, parallel: dict[str, int]) -> None:
    answers = run_distributed(skipped_on_the_second_data_rank, world_size, case_run(parallel))
    assert answers == [([0.0, 1.0, 0.0], True, True)] * world_size


def losses_with_dropout(run: RunConfig) -> list[float]:
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh, codebook(run))
    size = BATCH // mesh.data_size
    batch = tiny_batch(run.model, BATCH).slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    return [engine.train_step(batch).loss.item() for _ in range(2)]


def test_dropout_repeats_itself_in_the_same_layout() -> None:
    run = case_run({}, case_model(dropout=0.3))
    first, again = (run_distributed(losses_with_dropout, 2, run) for _ in range(2))
    assert first == again and first[0] == first[1]
    assert first[0] != losses_with_dropout(run)
