"""What ``vilg plan`` adds for a reconstructor and a critic is what the ranks that hold them really hold and send."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import (
    ImageTokenizerConfig,
    OpsConfig,
    OptimConfig,
    ParallelConfig,
    ReconstructorConfig,
    RunConfig,
)
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.models.features import FeatureNetwork
from megatron_vilg.models.pixel_losses import perceptual_distance
from megatron_vilg.models.tokenizers import build_image_tokenizer
from megatron_vilg.parallel.estimate import Estimate, estimate
from megatron_vilg.parallel.joint_estimate import FEATURE_NETWORKS
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.end_to_end import EndToEndEngine
from tests.helpers import run_distributed
from tests.live_bytes import LiveBytes
from tests.parallel.cases import case_model, case_run
from tests.parallel.test_estimate import local
from tests.parallel.traffic import Traffic
from tests.tiny import tiny_batch

BATCH = 8
CRITIC = {"critic_weight": 0.5, "critic_start_step": 0, "critic_gate": 100.0, "critic_channels": 16}


def joint_run(kind: str = "vqgan", parallel: dict[str, Any] | None = None, **options: Any) -> RunConfig:
    """Pictures of 32 pixels, whose decoder outweighs a generator of two layers."""
    model = case_model(num_layers=2, image_side=8, codebook_dim=0, text_vocab_size=64, image_vocab_size=64)
    tokenizer = ImageTokenizerConfig(
        kind=kind,  # type: ignore[arg-type]
        image_size=32,
        channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        norm_groups=8,
        codebook_size=64,
        codebook_dim=8,
    )
    run = case_run(parallel, model, batch_size=BATCH, sample_every=0)
    joint = ReconstructorConfig(enabled=True, decoder_start="scratch", **options)
    run = dataclasses.replace(run, image_tokenizer=tokenizer, reconstructor=joint, ops=OpsConfig(attention="sdpa"))
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=1e-4))


def engine_and_batch(run: RunConfig) -> tuple[EndToEndEngine, PairBatch]:
    mesh = build_mesh(run.parallel, "cpu")
    torch.manual_seed(0)
    engine = EndToEndEngine(run, mesh, build_image_tokenizer(run.image_tokenizer).requires_grad_(False).eval())
    size, side = BATCH // mesh.data_size, run.image_tokenizer.image_size
    pixels = torch.randint(256, (BATCH, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = dataclasses.replace(tiny_batch(run.model, BATCH), pixels=pixels)
    return engine, batch.slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)


def lasting(engine: EndToEndEngine) -> list[torch.Tensor]:
    """Weights, optimizer states and averages of everything that trains."""
    found = [p for _, p in engine.named_parameters()]
    optimizers = [engine.optimizer]
    if engine.part is not None:
        found += engine.part.parameters()
        optimizers.append(engine.part_optimizer)
    if engine.average is not None:
        found += engine.average.values.values()
    if engine.critic.critic is not None:
        found += engine.critic.critic.parameters()
        found += [p.grad for p in engine.critic.critic.parameters() if p.grad is not None]
        optimizers.append(engine.critic._optimizer)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [local(tensor) for tensor in (*found, *(value for state in states for value in state.values()))]


def measured_peak(run: RunConfig) -> int:
    """Most bytes of tensors that live at once in the third step: the critic works in the second and stays."""
    engine, batch = engine_and_batch(run)
    for _ in range(2):
        engine.train_step(batch)
    with LiveBytes(lasting(engine)) as live:
        engine.train_step(batch)
    return live.peak


@pytest.mark.parametrize(
    ("kind", "parallel", "options"),
    [
        ("vqgan", {}, {}),
        ("vqgan", {"recompute": "block", "num_microbatches": 2}, {"ema_decay": 0.9, "edge_weight": 0.5}),
        ("vqgan", {"num_microbatches": 4}, CRITIC),
        ("dvae", {}, {}),
        ("dvae", {"num_microbatches": 2}, CRITIC),
        ("dvae", {"num_microbatches": 8}, CRITIC | {"critic_channels": 64, "critic_adaptive_weight": False}),
    ],
    ids=[
        "vqgan",
        "vqgan, average",
        "vqgan, critic",
        "dvae",
        "dvae, critic",
        "dvae, the critic's own step is the fullest",
    ],
)
def test_one_process_uses_the_planned_memory(kind: str, parallel: dict[str, Any], options: dict[str, Any]) -> None:
    run = joint_run(kind, parallel, **options)
    alone = dataclasses.replace(run, reconstructor=ReconstructorConfig())
    planned = estimate(run, 1).fullest.peak
    assert measured_peak(run) == pytest.approx(planned, rel=0.05)
    assert estimate(alone, 1).fullest.peak < 0.7 * planned


def used_by(run: RunConfig) -> tuple[int, int, dict[str, int]]:
    """This rank's place in the pipeline, its highest bytes, and what it sends by axis."""
    engine, batch = engine_and_batch(run)
    for _ in range(2):
        engine.train_step(batch)
    with LiveBytes(lasting(engine)) as live, Traffic() as traffic:
        engine.train_step(batch)
    groups = {axis: engine.mesh.axis(axis).get_group().group_name for axis in ("tp", "shard", "replica")}
    return engine.mesh.rank("pp"), live.peak, {axis: traffic.sent[name] for axis, name in groups.items()}


@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        ({"shard": 2}, CRITIC),
        ({"tensor": 2}, CRITIC),
        ({"pipeline": 2, "num_microbatches": 4, "zero": 1}, {"ema_decay": 0.9}),
    ],
    ids=["shard, critic", "tensor, critic", "pipeline, average"],
)
def test_two_processes_use_and_send_what_was_planned(parallel: dict[str, Any], options: dict[str, Any]) -> None:
    """The last stage of a pipeline has all of it; sums of norms and the adaptive weight are 2 % of what is sent."""
    run = joint_run(parallel=parallel, **options)
    alone = estimate(dataclasses.replace(run, reconstructor=ReconstructorConfig()), 2).ranks
    planned = estimate(run, 2).ranks
    assert [rank.peak for rank in planned[:-1]] == [rank.peak for rank in alone[:-1]]
    for place, peak, sent in run_distributed(used_by, 2, run, timeout=240.0):
        if place == len(planned) - 1:
            assert peak == pytest.approx(planned[place].peak, rel=0.05)
        assert sent == pytest.approx({axis: planned[place].sent[axis] for axis in sent}, rel=0.03), place


def e2e(kind: str = "vqgan", optim: str = "adamw", **options: Any) -> Estimate:
    """The ablation's preset on 8 ranks, 2 pairs a micro-batch; with nothing else that may be the fullest moment:
    attention that copies nothing, no samples."""
    run = PRESETS["e2e-300m"]().resolve(text_vocab_size=18_000)
    size = 128 if kind == "dvae" else 16
    return estimate(
        dataclasses.replace(
            run,
            parallel=ParallelConfig(recompute="block", num_microbatches=32),
            ops=OpsConfig(attention="flex"),
            train=dataclasses.replace(run.train, sample_every=0),
            optim=OptimConfig(name=optim),  # type: ignore[arg-type]
            image_tokenizer=dataclasses.replace(run.image_tokenizer, kind=kind, codebook_dim=size),  # type: ignore[arg-type]
            reconstructor=ReconstructorConfig(**options),
        ),
        8,
    )


def test_the_ablation_needs_what_its_decoder_keeps() -> None:
    """35.1 M values of 16 bytes, and in bf16 0.86 GiB a pair."""
    off, on = e2e(), e2e(enabled=True)
    added = on.parameters - off.parameters
    assert added == on.reconstructor_parameters == 35_123_347 and off.reconstructor_parameters == 0
    assert on.fullest.parameters - off.fullest.parameters == added
    gib = (on.fullest.peak - off.fullest.peak) / 2**30
    assert 16 * added / 2**30 + 2 * 0.8 < gib < 16 * added / 2**30 + 2 * 1.1
    for kind in ("weights", "gradients"):
        assert on.fullest.memory[kind] - off.fullest.memory[kind] == 4 * added
    assert on.fullest.memory["optimizer"] - off.fullest.memory["optimizer"] == 8 * added
    judged = e2e(enabled=True, critic_weight=1.0)
    assert judged.parameters == on.parameters and judged.fullest.peak > on.fullest.peak + 16 * 2_765_633
    forward = 512 * 299_137_761_280
    assert on.flops_kept - off.flops_kept == on.flops_dense - off.flops_dense == 3 * forward
    assert judged.flops_kept - on.flops_kept == 8 * 512 * 6_293_618_688
    assert judged.flops_executed - on.flops_executed == 9 * 512 * 6_293_618_688
    averaged = e2e(enabled=True, ema_decay=0.999)
    assert averaged.fullest.peak - on.fullest.peak == pytest.approx(4 * added)


@pytest.mark.parametrize("optim", ["muon", "adamw_8bit"])
def test_kernels_have_adams_moments_whatever_the_optimizer(optim: str) -> None:
    """Of the mapping's 1024 x 1024 + 16 x 1024 values the lean one quantises the moments."""
    added = e2e(optim=optim, enabled=True).fullest.memory["optimizer"] - e2e(optim=optim).fullest.memory["optimizer"]
    lean = (1024 * 1024 + 16 * 1024) * (8 - 2 * (1 + 4 / 256)) if optim == "adamw_8bit" else 0
    assert added == pytest.approx(8 * 35_123_347 - lean, rel=1e-12)


def test_offload_leaves_the_reconstructor_where_it_is() -> None:
    run = joint_run(parallel={"shard": 2})
    here, away = (
        estimate(dataclasses.replace(run, parallel=ParallelConfig(shard=2, cpu_offload=flag)), 2).fullest
        for flag in (False, True)
    )
    values = estimate(run, 2).reconstructor_parameters
    assert away.memory["weights"] == away.memory["gradients"] == 4 * values
    host = sum(away.host.values())
    assert host == pytest.approx(16 * (here.parameters - values))
    # With one micro-batch, gradients are not there yet at the fullest moment.
    assert here.peak - away.peak == pytest.approx(host * 12 / 16)


@pytest.mark.parametrize(("name", "scale"), [("efficientnet-lite0", (1.0, 1.0)), ("efficientnet-lite2", (1.1, 1.2))])
def test_the_feature_network_is_as_large_as_stated(name: str, scale: tuple[float, float]) -> None:
    with torch.device("meta"):
        network = FeatureNetwork(width=scale[0], depth=scale[1])
        decoded, target = torch.empty(2, 1, 3, 128, 128).unbind()
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = perceptual_distance(network, decoded.clone().requires_grad_(), target)
    values = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights) / 4
    assert loss.shape == (1,)
    assert sum(p.numel() for p in network.parameters()) == FEATURE_NETWORKS[name][0]
    assert values / 128**2 == pytest.approx(FEATURE_NETWORKS[name][1], rel=0.02)
    plain, compared = e2e(enabled=True).fullest, e2e(enabled=True, perceptual_weight=1.0).fullest
    wanted = 4 * (3_350_000 + 2 * 185 * 256**2)
    assert compared.peak - plain.peak == pytest.approx(wanted)
