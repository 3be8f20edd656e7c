"""End-to-end training in every kind of layout equals one process: losses, norms, weights of both parts, exports."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from megatron_vilg.config.check import check
from megatron_vilg.config.schema import ReconstructorConfig, RunConfig
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.end_to_end import PREFIX, EndToEndEngine
from tests.helpers import run_distributed
from tests.models.test_reconstructor import tokenizer_config
from tests.parallel.cases import BATCH, case_model, case_run, whole
from tests.tiny import tiny_batch
from tests.train.test_end_to_end import tokenizer_of

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2, zero 3": (2, {"num_microbatches": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2 x data 2, zero 2": (4, {"pipeline": 2, "num_microbatches": 4, "zero": 2}),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "replica 2 x shard 2, zero 1": (4, {"replica": 2, "zero": 1}),
    "interleaved 2 x 2": (2, {"pipeline": 2, "num_microbatches": 4, "schedule": "interleaved", "stages_per_rank": 2}),
    "pipeline 2 x tensor 2 x data 2": (8, {"pipeline": 2, "tensor": 2, "num_microbatches": 2}),
}


def joint_case(parallel: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    tokenizer = dataclasses.replace(tokenizer_config("dvae"), codebook_size=12)
    run = case_run(parallel, case_model(codebook_dim=0))
    return dataclasses.replace(
        run,
        # Adam divides a gradient by its own size: without this, rounding alone decides the sign of the smallest ones.
        optim=dataclasses.replace(run.optim, eps=1e-5),
        image_tokenizer=tokenizer,
        reconstructor=ReconstructorConfig(enabled=True, weight=0.5, lr_share=0.5, grad_clip=0.2, **options),
    )


def joint_steps(run: RunConfig, steps: int = 3) -> dict[str, Any]:
    """Three steps and an evaluation on the current process group, or on this process alone."""
    mesh = build_mesh(run.parallel, "cpu")
    engine = EndToEndEngine(run, mesh, tokenizer_of(run))
    size, numbers = BATCH // mesh.data_size, []
    batches = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randint(256, (BATCH, 3, 24, 24), dtype=torch.uint8, generator=generator)
        batches.append(dataclasses.replace(tiny_batch(run.model, BATCH, seed=step), pixels=pixels))
    for batch in batches:
        found = engine.train_step(batch.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size))
        numbers += [found.loss, found.grad_norm, *found.extra.values()]
    measured = engine.eval_step(batches[0].slice(0, 5))
    numbers += [measured.loss, *measured.extra.values()]
    weights = {name: whole(p) for name, p in engine.named_parameters()}
    if engine.part is not None:
        weights |= {PREFIX + name: whole(p) for name, p in engine.part.named_parameters()}
    exported = {name: value.clone() for name, value in engine.export()}
    return {"numbers": [float(n) for n in numbers], "weights": weights, "exported": exported}


@cache
def one_process() -> dict[str, Any]:
    return joint_steps(joint_case(ema_decay=0.5))


def assert_same(name: str, layouts: dict[str, tuple[int, dict[str, Any]]]) -> None:
    world_size, parallel = layouts[name]
    run = joint_case(parallel, ema_decay=0.5)
    assert not any(problem.startswith("reconstructor") for problem in check(run, world_size))
    expected, found = one_process(), run_distributed(joint_steps, world_size, run, timeout=400.0)
    seen = set()
    for rank in found:
        assert rank["numbers"] == pytest.approx(expected["numbers"], abs=2e-5)
        for key, tensor in rank["weights"].items():
            torch.testing.assert_close(tensor, expected["weights"][key], atol=1e-5, rtol=1e-5, msg=key)
            seen.add(key)
    assert seen == expected["weights"].keys()
    assert found[0]["exported"].keys() == expected["exported"].keys()
    for key, tensor in found[0]["exported"].items():
        torch.testing.assert_close(tensor, expected["exported"][key], atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str) -> None:
    assert_same(name, LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_rarer_layout_equals_one_process(name: str) -> None:
    assert_same(name, SLOW)


def test_critic_beside_the_generator_is_for_one_process() -> None:
    run = joint_case({"shard": 2}, critic_weight=0.1, critic_start_step=1)
    assert any("reconstructor.critic_weight=0.1: a critic beside" in problem for problem in check(run, 2))
