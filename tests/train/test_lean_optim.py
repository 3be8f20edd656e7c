"""torchao's AdamW with quantised moments: close to the exact one, bit-equal after resuming, equal in every layout."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vilg.config.schema import OptimConfig, ParallelConfig, RunConfig
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.tiny import tiny_batch, tiny_config, tiny_run
from tests.train.optimizer_case import losses, saved

pytest.importorskip("torchao", reason="the extra `lean` is not installed")

NAMES = ("adamw_8bit", "adamw_4bit")


def run_of(name: str, zero: int = 3, **optim: float) -> RunConfig:
    """Wide enough for whole blocks; one layer, because each matrix is large."""
    run = tiny_run(tiny_config(width=256, num_heads=2, num_layers=1))
    return dataclasses.replace(
        run,
        optim=OptimConfig(name=name, lr=3e-3, warmup_steps=2, **optim),  # type: ignore[arg-type]
        parallel=ParallelConfig(zero=zero),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("name", "tolerance"), [("adamw_8bit", 0.02), ("adamw_4bit", 0.06)])
def test_it_learns_as_the_exact_optimizer_does(name: str, tolerance: float) -> None:
    exact, lean = NativeEngine(run_of("adamw")), NativeEngine(run_of(name))
    expected, found = losses(exact, range(8)), losses(lean, range(8))
    assert found[-1] < 0.9 * found[0]
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("name", "bytes_each"), [("adamw_8bit", 2), ("adamw_4bit", 1)])
def test_moments_of_matrices_take_the_bytes_promised(name: str, bytes_each: int) -> None:
    engine = NativeEngine(run_of(name))
    state = engine.state_dict()["optimizer"]
    matrices = {n: p for n, p in engine.model.named_parameters() if p.ndim == 2 and p.numel() >= 4096}
    count = sum(p.numel() for p in matrices.values())
    codes = sum(state[f"{slot}.codes"][n].nbytes for slot in ("exp_avg", "exp_avg_sq") for n in matrices)
    scales = sum(state[f"{slot}.scale"][n].nbytes for slot in ("exp_avg", "exp_avg_sq") for n in matrices)
    assert codes == bytes_each * count
    assert scales <= 8 * count / 128
    assert not matrices.keys() & state["exp_avg"].keys()
    assert "blocks.0.mlp.up.bias" in state["exp_avg"]


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_repeats_a_straight_one_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight = losses(NativeEngine(run_of(name)), range(4))
    assert [*saved(run_of(name), tmp_path, range(2)), *saved(run_of(name), tmp_path, range(2, 4))] == straight


@pytest.mark.parametrize("name", NAMES)
def test_shards_have_the_numbers_of_one_process_and_resume_in_another_layout(name: str, tmp_path: Path) -> None:
    straight = losses(NativeEngine(run_of(name)), range(4))
    found = [
        *run_distributed(saved, 2, run_of(name), tmp_path, range(2))[0],
        *saved(run_of(name), tmp_path, range(2, 3)),
        *run_distributed(saved, 2, run_of(name, zero=2), tmp_path, range(3, 4))[0],
    ]
    assert found == pytest.approx(straight, abs=1e-5)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    engine = NativeEngine(run_of("adamw_8bit"))
    losses(engine, range(1))
    with torch.no_grad():
        engine.model.norm.bias[0] = math.inf  # type: ignore[union-attr]
    before = flat(engine)
    assert engine.train_step(tiny_batch(engine.run.model)).skipped.item() == 1.0
    after = flat(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def flat(engine: NativeEngine) -> dict[str, Tensor]:
    state = engine.state_dict()
    return {name: t.clone() for name, t in state["model"].items()} | {
        f"{slot} {name}": t.clone() for slot, tensors in state["optimizer"].items() for name, t in tensors.items()
    }
