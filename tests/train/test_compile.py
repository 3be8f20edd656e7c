"""Compiled blocks give what plain ones give, with every kind of recomputation, and let instruments look inside."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from megatron_vilg.config.check import check
from megatron_vilg.config.schema import OpsConfig, ParallelConfig, RunConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.instruments import Instruments
from tests.helpers import run_distributed
from tests.tiny import tiny_batch, tiny_config, tiny_run

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")


def engine_of(run: RunConfig, *, compiled: bool) -> NativeEngine:
    return NativeEngine(dataclasses.replace(run, ops=OpsConfig(compile=compiled)))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_compiled_steps_equal_plain_ones(recompute: str) -> None:
    run = tiny_run(tiny_config(sandwich_norm=True))
    run = dataclasses.replace(run, parallel=ParallelConfig(recompute=recompute))  # type: ignore[arg-type]
    plain, compiled = (engine_of(run, compiled=value) for value in (False, True))
    for step in range(2):
        batch = tiny_batch(run.model, seed=step)
        expected, actual = plain.train_step(batch), compiled.train_step(batch)
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual.grad_norm, expected.grad_norm, atol=1e-5, rtol=1e-4)
    assert float(compiled.eval_step(batch).loss) == pytest.approx(float(plain.eval_step(batch).loss), abs=1e-4)


@needs_compiler
@pytest.mark.slow
def test_every_gradient_of_a_compiled_model() -> None:
    run = tiny_run(tiny_config(sandwich_norm=True))
    batch = tiny_batch(run.model)
    gradients = []
    for value in (False, True):
        engine = engine_of(run, compiled=value)
        text_ids, image_ids, text_len = batch.rows()
        image, text = engine.model(text_ids, image_ids, text_len=text_len)
        (image.square().mean() + text.square().mean()).backward()
        gradients.append({name: p.grad for name, p in engine.model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-5, msg=name)


@needs_compiler
@pytest.mark.slow
def test_instruments_see_into_compiled_blocks() -> None:
    run = tiny_run()
    seen = []
    for value in (False, True):
        engine = engine_of(run, compiled=value)
        batch = tiny_batch(run.model)
        engine.train_step(batch)
        instruments = Instruments(engine)
        seen.append(instruments.before(batch))
    assert seen[0].keys() == seen[1].keys() and any("max_logit" in name for name in seen[0])
    for name, value in seen[0].items():
        assert seen[1][name] == pytest.approx(value, rel=1e-3), name


def sharded_steps(zero: int, compiled: bool) -> list[float]:
    """Losses and gradient norms of two steps on two processes."""
    run = dataclasses.replace(
        tiny_run(tiny_config(sandwich_norm=True)),
        parallel=ParallelConfig(shard=2, zero=zero),  # type: ignore[arg-type]
        ops=OpsConfig(compile=compiled),
    )
    mesh = build_mesh(run.parallel, "cpu")
    engine = NativeEngine(run, mesh)
    own = slice(2 * mesh.data_rank, 2 * mesh.data_rank + 2)
    results = [engine.train_step(tiny_batch(run.model, seed=step).slice(own.start, own.stop)) for step in range(2)]
    return [float(value) for result in results for value in (result.loss, result.grad_norm)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_sharded_blocks_can_be_compiled(zero: int) -> None:
    plain, compiled = (run_distributed(sharded_steps, 2, zero, value, timeout=300.0)[0] for value in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_the_other_engine_does_not_compile() -> None:
    run = dataclasses.replace(tiny_run(engine="deepspeed"), ops=OpsConfig(compile=True))
    assert any("ops.compile=True: blocks are compiled by the native engine" in problem for problem in check(run))


def test_what_is_not_compiled_is_refused() -> None:
    run = tiny_run(tiny_config(num_heads=2))
    run = dataclasses.replace(run, ops=OpsConfig(compile=True), parallel=ParallelConfig(tensor=2))
    assert any(problem.startswith("ops.compile=True: blocks cut over parallel.tensor=2") for problem in check(run))
