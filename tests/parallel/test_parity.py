"""Every layout trains what one process trains: loss, gradient norm, each gradient and each weight, over three steps."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from megatron_vilg.config.schema import RunConfig
from tests.helpers import run_distributed
from tests.parallel.cases import Record, case_model, case_run, merged, run_steps

PIPELINE = {"pipeline": 2, "num_microbatches": 4}
INTERLEAVED = {**PIPELINE, "schedule": "interleaved", "stages_per_rank": 2}

FAST: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {"num_microbatches": 2}),
    "tensor 2, attention recomputed": (2, {"tensor": 2, "recompute": "selective"}),
    "replica 2 x shard 2, zero 2": (4, {"replica": 2, "zero": 2, "num_microbatches": 2}),
    "pipeline 2 x data 2, zero 3, blocks recomputed": (4, {**PIPELINE, "recompute": "block"}),
    "interleaved 2 x 2": (2, {**INTERLEAVED, "zero": 2}),
    "pipeline 2 x tensor 2 x data 2, zero 3": (8, {"pipeline": 2, "tensor": 2, "num_microbatches": 2}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, zero 1": (2, {"zero": 1, "num_microbatches": 2}),
    "data 2, zero 2": (2, {"zero": 2, "num_microbatches": 2}),
    "data 2, offloaded": (2, {"cpu_offload": True}),
    "data 2, blocks recomputed": (2, {"recompute": "block"}),
    "data 2, attention recomputed": (2, {"recompute": "selective"}),
    "data 4": (4, {}),
    "replica 4": (4, {"replica": 4, "num_microbatches": 2}),
    "replica 2 x shard 2, zero 1": (4, {"replica": 2, "zero": 1, "num_microbatches": 2}),
    "replica 2 x shard 2, zero 3": (4, {"replica": 2, "zero": 3, "num_microbatches": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "tensor 2 x data 2, zero 1": (4, {"tensor": 2, "zero": 1, "num_microbatches": 2}),
    "tensor 2 x data 2, zero 2": (4, {"tensor": 2, "zero": 2, "num_microbatches": 2}),
    "tensor 2 x data 2, zero 3": (4, {"tensor": 2, "zero": 3, "num_microbatches": 2, "recompute": "block"}),
    "pipeline 2": (2, PIPELINE),
    "pipeline 4": (4, {"pipeline": 4, "num_microbatches": 8}),
    "pipeline 2 x tensor 2": (4, {**PIPELINE, "tensor": 2, "recompute": "selective"}),
    "pipeline 2 x data 2, zero 1": (4, {**PIPELINE, "zero": 1}),
    "pipeline 2 x data 2, zero 2": (4, {**PIPELINE, "zero": 2}),
    "pipeline 2 x replica 2, zero 3": (4, {**PIPELINE, "replica": 2}),
    "interleaved 2 x 2 x data 2, zero 1": (4, {**INTERLEAVED, "zero": 1}),
    "interleaved 2 x 2 x data 2, zero 3": (4, {**INTERLEAVED, "recompute": "block"}),
    "interleaved 2 x 2 x tensor 2, zero 3": (4, {**INTERLEAVED, "tensor": 2}),
    "pipeline 2 x tensor 2 x data 2, zero 1": (8, {**PIPELINE, "tensor": 2, "zero": 1}),
    "pipeline 2 x tensor 2 x data 2, zero 2": (8, {**PIPELINE, "tensor": 2, "zero": 2}),
    "pipeline 2 x replica 2 x shard 2, offloaded": (
        8,
        {"pipeline": 2, "num_microbatches": 2, "replica": 2, "cpu_offload": True},
    ),
}


@cache
def one_process() -> Record:
    """What every layout is compared with."""
    return run_steps(case_run())


def assert_equal(record: Record, expected: Record, tolerance: float) -> None:
    assert record.losses == pytest.approx(expected.losses, abs=tolerance)
    assert record.norms == pytest.approx(expected.norms, abs=tolerance, rel=tolerance)
    for mine, theirs in zip(record.gradients, expected.gradients, strict=True):
        assert_close(mine, theirs, tolerance)
    # Adam divides by the size of a gradient, so rounding in the smallest ones shows.
    assert_close(record.weights, expected.weights, 5 * tolerance)


def assert_close(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = (mine[name] - tensor).abs().max().item()
        assert difference <= tolerance, f"{name}: differs by {difference}"


@pytest.mark.parametrize("name", FAST)
def test_layout_equals_one_process(name: str) -> None:
    world_size, parallel = FAST[name]
    records = run_distributed(run_steps, world_size, case_run(parallel))
    assert_equal(merged(records), one_process(), 1e-5)


def test_no_alarm_about_views_that_nobody_changes() -> None:
    """Outputs of blocks are views with ``tensor=2``; their gradients are compared above."""

    def warned(run: RunConfig) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run_steps(run, steps=1)
            warnings.warn("FSDP2-wrapped module (FSDPOther) returned a view tensor.", UserWarning, stacklevel=1)
        return [str(warning.message) for warning in seen if "FSDP2-wrapped" in str(warning.message)]

    others = ["FSDP2-wrapped module (FSDPOther) returned a view tensor."]
    assert run_distributed(warned, 2, case_run({"tensor": 2})) == [others] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_rarer_layout_equals_one_process(name: str) -> None:
    world_size, parallel = SLOW[name]
    records = run_distributed(run_steps, world_size, case_run(parallel))
    assert_equal(merged(records), one_process(), 1e-5)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        pytest.param(8, {**PIPELINE, "tensor": 2}, marks=pytest.mark.slow),
        (4, {"pipeline": 2, "tensor": 2, "num_microbatches": 2}),
        pytest.param(2, {"zero": 2, "num_microbatches": 2}, marks=pytest.mark.slow),
        (2, {"replica": 2, "reduce_precision": "bf16"}),
        pytest.param(4, {"zero": 3, "num_microbatches": 2, "reduce_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_bf16_stays_within_its_rounding(world_size: int, parallel: dict[str, Any]) -> None:
    record = merged(run_distributed(run_steps, world_size, case_run(parallel, precision="bf16")))
    exact = one_process()
    assert record.losses != exact.losses
    assert record.losses == pytest.approx(exact.losses, rel=5e-3)
    assert record.norms == pytest.approx(exact.norms, rel=2e-2)
    for name, tensor in exact.gradients[0].items():
        error = (record.gradients[0][name] - tensor).norm() / tensor.norm()
        assert error < 0.05, (name, error)


@pytest.mark.parametrize(
    "changes",
    [
        {"sandwich_norm": True, "qk_norm": False, "segment_embedding": False, "codebook_dim": 0},
        {"embedding_gradient_shrink": 0.1, "pattern": "full"},
    ],
    ids=["sandwich", "shrink"],
)
@pytest.mark.slow
def test_optional_parts_of_the_model(changes: dict[str, Any]) -> None:
    model = case_model(**changes)
    records = run_distributed(run_steps, 4, case_run({**PIPELINE, "tensor": 2}, model))
    assert_equal(merged(records), run_steps(case_run(model=model)), 1e-5)
