"""A step: micro-batches, non-finite steps, resume, recompute, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_vilg.config.schema import ParallelConfig, RunConfig
from megatron_vilg.train.engine import NativeEngine
from tests.tiny import tiny_batch, tiny_config, tiny_run


def with_parallel(run: RunConfig, **values: object) -> RunConfig:
    return dataclasses.replace(run, parallel=ParallelConfig(**values))  # type: ignore[arg-type]


def losses(engine: NativeEngine, steps: range) -> list[float]:
    return [engine.train_step(tiny_batch(engine.run.model, seed=s)).loss.item() for s in steps]


@pytest.mark.parametrize("change", [{"num_microbatches": 2}, {"num_microbatches": 4}, {"recompute": "block"}])
def test_layouts_of_one_process_are_equal(change: dict[str, object]) -> None:
    straight, changed = NativeEngine(tiny_run()), NativeEngine(with_parallel(tiny_run(), **change))
    assert losses(changed, range(3)) == pytest.approx(losses(straight, range(3)), abs=1e-5)
    for (name, a), (_, b) in zip(straight.model.named_parameters(), changed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=name)


def test_it_learns_one_batch_in_both_directions() -> None:
    engine = NativeEngine(tiny_run(num_steps=80))
    batch = tiny_batch(engine.run.model)
    first = engine.eval_step(batch)
    for _ in range(80):
        last = engine.train_step(batch)
    assert last.image_ce < 0.5 * first.image_ce
    assert last.text_ce < 0.5 * first.text_ce


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    engine = NativeEngine(tiny_run())
    losses(engine, range(2))
    with torch.no_grad():
        engine.model.norm.bias[0] = float("inf")  # type: ignore[union-attr]
    before = copy.deepcopy(engine.state_dict())
    result = engine.train_step(tiny_batch(engine.run.model, seed=2))
    assert result.skipped.item() == 1.0 and engine.step == 3
    after = engine.state_dict()
    for name, tensor in before["model"].items():
        assert torch.equal(tensor, after["model"][name]), name
    for slot, tensors in before["optimizer"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, after["optimizer"][slot][name]), (slot, name)


def test_optimizers_whose_zero_grad_takes_nothing_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apex's FusedAdam is one."""
    engine = NativeEngine(tiny_run())
    zero_grad, calls = engine.optimizer.zero_grad, []

    def bare() -> None:
        calls.append(1)
        zero_grad()

    monkeypatch.setattr(engine.optimizer, "zero_grad", bare)
    losses(engine, range(2))
    assert len(calls) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_steps_are_bit_identical(dropout: float) -> None:
    run = tiny_run(tiny_config(dropout=dropout))
    straight = NativeEngine(run)
    expected = losses(straight, range(6))
    first = NativeEngine(run)
    losses(first, range(3))
    second = NativeEngine(run)
    for part, tensors in copy.deepcopy(first.state_dict()).items():
        target = second.state_dict()[part]
        for name, value in tensors.items():
            for key, tensor in value.items() if isinstance(value, dict) else [(None, value)]:
                (target[name][key] if key else target[name]).copy_(tensor)
    second.resume(3)
    assert losses(second, range(3, 6)) == expected[3:]
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_evaluation_changes_nothing_and_ignores_dropout() -> None:
    engine = NativeEngine(tiny_run(tiny_config(dropout=0.5)))
    batch = tiny_batch(engine.run.model)
    assert engine.eval_step(batch).loss == engine.eval_step(batch).loss
    assert engine.step == 0 and all(p.grad is None for p in engine.model.parameters())


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (5, 5_000_015),
        (-5, 2**64 - 5_000_015),
        (20_261_129_123_456, 20_261_129_123_456 * 1_000_003 % 2**64),
        (2**70 + 5, 5_000_015),
    ],
)
def test_every_seed_draws_dropout_masks(seed: int, expected: int) -> None:
    engine = NativeEngine(tiny_run(tiny_config(dropout=0.1), seed=seed))
    assert engine.train_step(tiny_batch(engine.run.model)).skipped == 0
    assert torch.initial_seed() == expected


def test_codebook_is_taken_over() -> None:
    run = tiny_run(tiny_config(codebook_dim=3))
    codebook = torch.randn(11, 3)
    engine = NativeEngine(run, codebook=codebook)
    assert torch.equal(engine.model.state_dict()["embed.codebook"], codebook)
    with pytest.raises(ValueError, match="codebook"):
        NativeEngine(run)


def test_bf16_stays_close_to_fp32() -> None:
    exact = NativeEngine(tiny_run())
    rounded = NativeEngine(tiny_run(precision="bf16"))
    assert losses(rounded, range(3)) == pytest.approx(losses(exact, range(3)), rel=0.02)


def test_importing_the_engine_leaves_torchs_compiler_alone() -> None:
    code = "import sys, megatron_vilg.train.engine; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
