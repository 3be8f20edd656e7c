"""One rank of a large layout, counted without the others and without memory; and that small ranks hold what is said."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_vilg.config.check import check
from megatron_vilg.config.presets import paper_10b
from megatron_vilg.config.schema import ParallelConfig, RunConfig
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.account import LocalBytes, local_bytes, pretend_to_be
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine, cut_parts
from megatron_vilg.train.optim import build_optimizer, optimizer_state
from tests.helpers import run_distributed
from tests.parallel.cases import case_run, codebook


def in_a_process_of_its_own(function: Any, *args: Any) -> Any:
    """A fake process group cannot stand beside the group of the harness, so it replaces it."""
    return run_distributed(_without_group, 1, function, args, timeout=400.0)[0]


def _without_group(function: Any, args: Any) -> Any:
    torch.distributed.destroy_process_group()
    return function(*args)


def paper_run(**parallel: Any) -> RunConfig:
    run = dataclasses.replace(paper_10b().resolve(), parallel=ParallelConfig(recompute="block", **parallel))
    assert check(run, 64) == []
    return run


def dry_run(run: RunConfig, rank: int, world_size: int) -> LocalBytes:
    with pretend_to_be(rank, world_size):
        return local_bytes(cut_parts(run, build_mesh(run.parallel, "cpu")), run)


def test_the_paper_model_has_its_size_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ViLG(paper_10b().resolve().model)
    assert sum(p.numel() for p in model.blocks.parameters()) == pytest.approx(9.66e9, rel=1e-3)
    assert all(p.is_meta for p in model.parameters())


def test_one_of_64_ranks_of_the_paper_model() -> None:
    run = paper_run(pipeline=4, tensor=2, num_microbatches=16, zero=1)
    found = in_a_process_of_its_own(dry_run, run, 21, 64)  # a stage in the middle: 12 blocks
    block = 12 * 4096**2  # and biases and norms
    assert found.weights == pytest.approx(12 * block / 16 * 4, rel=2e-3) and found.gradients == found.weights
    assert found.optimizer == pytest.approx(2 * found.weights, rel=1e-5) and found.buffers == 0
    assert found.whole_weights == pytest.approx(12 * block / 2 * 2, rel=2e-3)
    assert found.whole_gradients == 2 * found.whole_weights
    assert found.largest_unit == pytest.approx(block / 2 * 2, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{}, {"pipeline": 4, "tensor": 2, "num_microbatches": 16}, {"replica": 8, "zero": 2}],
    ids=["shard 64", "pipeline 4 x tensor 2 x shard 8", "replica 8 x shard 8"],
)
def test_shards_of_all_64_ranks_make_up_the_paper_model(layout: dict[str, Any]) -> None:
    run = paper_run(**layout)
    with torch.device("meta"):
        whole = sum(p.numel() for p in ViLG(run.model).parameters()) * 4
    ranks = [0, 63] if not layout else [0, 21, 42, 63]
    weights = [in_a_process_of_its_own(dry_run, run, rank, 64).weights for rank in ranks]
    assert sum(weights) / len(ranks) * 64 / run.parallel.replica == pytest.approx(whole, rel=0.05)


def allocate(run: RunConfig, rank: int, world_size: int) -> tuple[LocalBytes, int]:
    """What is counted, and the bytes of memory that one rank really takes for weights and optimizer."""
    with pretend_to_be(rank, world_size):
        parts = cut_parts(run, build_mesh(run.parallel, "cpu"))
        counted = local_bytes(parts, run)
        for part in parts:
            part.to_empty(device="cpu")
        named = [named for part in parts for named in part.named_parameters()]
        state = optimizer_state(build_optimizer(named, run.optim, "cpu"), named)
        tensors = [p for _, p in named] + [t for slot in state.values() for t in slot.values()]
        return counted, sum(shard(t).untyped_storage().nbytes() for t in tensors)


def shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.slow
def test_one_of_64_ranks_allocates_what_is_counted() -> None:
    run = paper_run(pipeline=4, tensor=2, num_microbatches=16)
    counted, found = in_a_process_of_its_own(allocate, run, 63, 64)
    assert found == pytest.approx(counted.weights + counted.optimizer, rel=0.01)


def counted_and_real(run: RunConfig) -> tuple[LocalBytes, int, int]:
    engine = NativeEngine(run, build_mesh(run.parallel, "cpu"), codebook(run))
    weights = sum(shard(p).nbytes for _, p in engine.named_parameters())
    slots = engine.state_dict()["optimizer"].values()
    return local_bytes(list(engine.parts), run), weights, sum(shard(t).nbytes for slot in slots for t in slot.values())


def test_small_ranks_hold_what_is_counted() -> None:
    run = case_run({"pipeline": 2, "shard": 2, "num_microbatches": 4, "zero": 2})
    for rank, (counted, weights, optimizer) in enumerate(run_distributed(counted_and_real, 4, run)):
        assert (counted.weights, counted.optimizer) == (weights, optimizer)
        assert counted.buffers == (12 * 3 * 4 if rank < 2 else 0)
