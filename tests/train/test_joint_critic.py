"""The critic beside the generator over several processes: batch statistics, its weight, resuming, half precision."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from megatron_vilg.models.critics import PatchCritic, adaptive_weight, deceive_loss
from megatron_vilg.parallel.batch_norm import share_batch_norms
from megatron_vilg.parallel.mesh import Mesh, build_mesh
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.instruments import Instruments, first_pairs
from megatron_vilg.train.optim import learning_rate, set_learning_rate
from tests.helpers import run_distributed
from tests.parallel.cases import BATCH
from tests.tiny import tiny_batch, tiny_config
from tests.train.test_end_to_end import tokenizer_of
from tests.train.test_end_to_end_layouts import joint_batches, judged_case


def pictures(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_every_seed_gives_a_critic() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        run = judged_case()
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, seed=seed))
        critic = EndToEndEngine(run, "cpu", tokenizer_of(run)).critic.critic
        assert critic is not None
        return next(iter(critic.parameters()))

    assert torch.equal(first_weight(2**64 - 1), first_weight(-1))
    assert not torch.equal(first_weight(2**64), first_weight(-1))


def test_its_learning_rate_follows_the_schedule_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = judged_case()
    run = dataclasses.replace(run, optim=dataclasses.replace(run.optim, warmup_steps=2))
    engine, rates = EndToEndEngine(run, "cpu", tokenizer_of(run)), list[float]()

    def noted(optimizer: torch.optim.Optimizer, rate: float) -> None:
        set_learning_rate(optimizer, rate)
        rates.extend(group["lr"] for group in optimizer.param_groups[:1])

    monkeypatch.setattr("megatron_vilg.train.joint_critic.set_learning_rate", noted)
    for batch in joint_batches(run, 4):
        engine.train_step(batch)
    schedule = dataclasses.replace(run.optim, lr=run.reconstructor.critic_lr)
    # It works from the second step on.
    assert rates == [learning_rate(step, schedule, run.train.num_steps) for step in (1, 2, 3)]
    assert len(set(rates)) > 1


def judged(ranks: int) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Loss and adaptive weight of a critic on shares of a batch, and gradients by decoder and pictures."""
    mesh = build_mesh(ParallelConfig(replica=ranks), "cpu")
    torch.manual_seed(0)
    critic = PatchCritic(4)
    share_batch_norms(critic, mesh)
    size = 4 // ranks
    own = pictures()[mesh.data_rank * size : (mesh.data_rank + 1) * size].requires_grad_()
    last_weight = torch.tensor([0.9, 1.1, 0.8], requires_grad=True)
    drawn = own * last_weight[:, None, None]
    adversarial = deceive_loss(critic(drawn))
    reconstruction = (drawn - own.detach().flip(-1)).abs().mean()
    weight = adaptive_weight(reconstruction, adversarial, last_weight, mesh.data_mean)
    adversarial.backward()
    assert own.grad is not None and last_weight.grad is not None
    gradient = mesh.data_mean(last_weight.grad)
    return float(mesh.data_mean(adversarial)), float(weight), gradient, own.grad / ranks


def test_statistics_and_adaptive_weight_are_those_of_the_whole_batch() -> None:
    loss, weight, gradient, by_picture = judged(1)
    ranks = run_distributed(judged, 2, 2)
    for found in ranks:
        assert found[0] == pytest.approx(loss, rel=1e-5)
        assert found[1] == pytest.approx(weight, rel=1e-4)
        torch.testing.assert_close(found[2], gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.cat([found[3] for found in ranks]), by_picture, rtol=1e-4, atol=1e-7)


def shared_pairs(count: int) -> torch.Tensor:
    mesh = build_mesh(ParallelConfig(), "cpu")
    batch = tiny_batch(tiny_config(), 8)
    return first_pairs(batch.slice(2 * mesh.data_rank, 2 * mesh.data_rank + 2), count, mesh).image_ids


def test_every_rank_gets_the_first_pairs_of_all() -> None:
    batch = tiny_batch(tiny_config(), 8)
    for found in run_distributed(shared_pairs, 4, 5):
        assert torch.equal(found, batch.image_ids[:5])
    assert torch.equal(first_pairs(batch, 3, Mesh(torch.device("cpu"))).image_ids, batch.image_ids[:3])


def resumed(run: RunConfig, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What the third step reports, straight and after a checkpoint of the second."""
    mesh = build_mesh(run.parallel, "cpu")
    size = BATCH // mesh.data_size
    batches = [b.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size) for b in joint_batches(run, 3)]
    engine = EndToEndEngine(run, mesh, tokenizer_of(run))
    for batch in batches[:2]:
        engine.train_step(batch)
    checkpointer = Checkpointer(folder, CheckpointConfig(), mesh)
    manifest = Manifest(kind="pretrain", step=2, model=dataclasses.asdict(run.model))
    checkpointer.save(2, engine.state_dict(), manifest)
    checkpointer.finish()
    other = EndToEndEngine(run, mesh, tokenizer_of(run))
    path = checkpointer.latest()
    assert path is not None
    checkpointer.load(path, other.state_dict())
    other.resume(2)
    straight, again = (e.train_step(batches[2]) for e in (engine, other))
    return tuple({"loss": float(r.loss)} | {n: float(v) for n, v in r.extra.items()} for r in (straight, again))  # type: ignore[return-value]


@pytest.mark.parametrize("parallel", [{"pipeline": 2, "num_microbatches": 2}, {"shard": 2}])
def test_open_gate_and_critic_come_back_on_every_rank(parallel: dict[str, Any], tmp_path: Path) -> None:
    for straight, again in run_distributed(resumed, 2, judged_case(parallel), tmp_path):
        assert "loss/critic" in straight and "critic/weight" in straight
        assert again == straight


def halves(run: RunConfig) -> list[dict[str, float]]:
    mesh = build_mesh(run.parallel, "cpu")
    engine = EndToEndEngine(run, mesh, tokenizer_of(run))
    instruments, found = Instruments(engine), []
    size = BATCH // mesh.data_size
    for whole in joint_batches(run, 3):
        batch = whole.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
        shown = instruments.before(batch)
        result = engine.train_step(batch)
        found.append(shown | instruments.after() | {name: float(value) for name, value in result.extra.items()})
    return found


def test_bf16_with_recomputation_stays_near_one_process() -> None:
    parallel = {"pipeline": 2, "num_microbatches": 2, "recompute": "block"}
    run = judged_case(parallel)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, precision="bf16"))
    single = dataclasses.replace(run, parallel=ParallelConfig(num_microbatches=2))
    expected = halves(single)
    for rank in run_distributed(halves, 2, run):
        for found, wanted in zip(rank, expected, strict=True):
            assert found.keys() == wanted.keys()
            assert all(math.isfinite(value) for value in found.values())
            for name in ("hidden/last_rms", "log_z(text_to_image)", "attention/max_logit(layer 3)"):
                assert found[name] == pytest.approx(wanted[name], rel=0.05)
