"""End-to-end training in every kind of layout equals one process: losses, norms, weights of both parts and of the
critic, what the instruments show, exports."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from megatron_vilg.config.check import check
from megatron_vilg.config.schema import LogConfig, ReconstructorConfig, RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.end_to_end import PREFIX, EndToEndEngine
from megatron_vilg.train.instruments import Instruments
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


def judged_case(parallel: dict[str, Any] | None = None) -> RunConfig:
    """With a critic that works from the second step on."""
    return joint_case(parallel, critic_weight=0.3, critic_start_step=0, critic_gate=10.0, critic_channels=4)


def joint_batches(run: RunConfig, steps: int) -> list[PairBatch]:
    batches = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randint(256, (BATCH, 3, 24, 24), dtype=torch.uint8, generator=generator)
        batches.append(dataclasses.replace(tiny_batch(run.model, BATCH, seed=step), pixels=pixels))
    return batches


def joint_steps(run: RunConfig, order: list[int] | None = None) -> dict[str, Any]:
    """Three steps and an evaluation on the current process group, or on this process alone, with pairs in ``order``."""
    mesh = build_mesh(run.parallel, "cpu")
    engine = EndToEndEngine(run, mesh, tokenizer_of(run))
    instruments = Instruments(engine)
    size, numbers, seen = BATCH // mesh.data_size, [], []
    batches = joint_batches(run, 3)
    for whole_batch in batches:
        batch = whole_batch if order is None else whole_batch.take(torch.tensor(order))
        batch = batch.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        shown = instruments.before(batch)
        found = engine.train_step(batch)
        seen.append(shown | instruments.after())
        numbers += [found.loss, found.grad_norm, *found.extra.values()]
    measured = engine.eval_step(batches[0].slice(0, 5))
    numbers += [measured.loss, *measured.extra.values()]
    weights = {name: whole(p) for name, p in engine.named_parameters()}
    if engine.part is not None:
        weights |= {PREFIX + name: whole(p) for name, p in engine.part.named_parameters()}
    if engine.critic.critic is not None:
        weights |= {"critic." + name: whole(p) for name, p in engine.critic.critic.named_parameters()}
    exported = {name: value.clone() for name, value in engine.export()}
    return {"numbers": [float(n) for n in numbers], "seen": seen, "weights": weights, "exported": exported}


def both_cases(parallel: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """With averaged weights, and with a critic."""
    return joint_steps(joint_case(parallel, ema_decay=0.5)), joint_steps(judged_case(parallel))


@cache
def one_process() -> dict[str, Any]:
    return joint_steps(joint_case(ema_decay=0.5))


@cache
def one_critic(ranks: int, pieces: int) -> dict[str, Any]:
    """One process whose micro-batches hold what those of ``ranks`` data ranks hold together: the critic sees batches.

    Pair p of rank r's micro-batch m has the place (r, m, p) in the batch of all ranks.
    """
    order = torch.arange(BATCH).view(ranks, pieces, -1).transpose(0, 1).flatten().tolist()
    return joint_steps(judged_case({"num_microbatches": pieces}), order)


def assert_same(name: str, layouts: dict[str, tuple[int, dict[str, Any]]]) -> None:
    world_size, parallel = layouts[name]
    for run in (joint_case(parallel), judged_case(parallel)):
        run = dataclasses.replace(run, log=LogConfig(instruments_every=1))
        assert not any(problem.startswith(("reconstructor", "log.")) for problem in check(run, world_size))
    ranks = world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    plain, judged = zip(*run_distributed(both_cases, world_size, parallel, timeout=400.0), strict=True)
    assert_equal(list(plain), one_process())
    for rank in plain:
        for shown, expected in zip(rank["seen"], one_process()["seen"], strict=True):
            assert shown == pytest.approx(expected, rel=2e-4, abs=1e-6)
    expected = one_critic(ranks, parallel.get("num_microbatches", 1))
    assert len(expected["numbers"]) > len(one_process()["numbers"]), "the critic never worked"
    assert_equal(list(judged), expected)


def assert_equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
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


def copies_after(steps: int) -> list[torch.Tensor]:
    """Reconstructor and critic of this rank, where the second rank's gradients differ from the first's in their last
    bits, as those of kernels do that add up in no fixed order."""
    run = judged_case({"tensor": 2})
    mesh = build_mesh(run.parallel, "cpu")
    engine = EndToEndEngine(run, mesh, tokenizer_of(run))
    assert engine.part is not None and engine.critic.critic is not None
    copies = [*engine.part.parameters(), *engine.critic.critic.parameters()]
    for parameter in copies if mesh.rank("tp") else ():
        parameter.register_hook(lambda grad: grad * (1 + 1e-6 * torch.randn_like(grad)))
    for batch in joint_batches(run, steps):
        engine.train_step(batch)
    return [parameter.detach().clone() for parameter in copies]


def test_copies_on_the_ranks_of_tp_stay_equal() -> None:
    first, second = run_distributed(copies_after, 2, 4, timeout=240.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
