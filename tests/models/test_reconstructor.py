"""The path from hidden states to pixels: same picture for codebook rows, gradients where they belong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vilg.config.schema import ImageTokenizerConfig, LossConfig, ReconstructorConfig
from megatron_vilg.data.batch import build_targets
from megatron_vilg.models.critics import PatchCritic
from megatron_vilg.models.reconstructor import FIGURES, Reconstructor
from megatron_vilg.models.tokenizers import AnyTokenizer, build_image_tokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.sequence import Direction
from tests.tiny import tiny_batch, tiny_config, tiny_model

KINDS = ("vqgan", "dvae")


def tokenizer_config(kind: str) -> ImageTokenizerConfig:
    """4 x 4 codes of 11, pictures of 24 pixels."""
    return ImageTokenizerConfig(
        kind=kind,  # type: ignore[arg-type]
        image_size=24,
        patch=3,
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        bottom_attention=False,
        norm_groups=2,
        codebook_size=11,
        codebook_dim=4,
    )


def joint_model(kind: str, **options: object) -> tuple[ViLG, AnyTokenizer]:
    torch.manual_seed(0)
    tokenizer = build_image_tokenizer(tokenizer_config(kind)).eval()
    model = tiny_model()
    part = Reconstructor(ReconstructorConfig(enabled=True, **options), model.config, tokenizer.config)  # type: ignore[arg-type]
    part.decoder.load_state_dict(tokenizer.decoder.state_dict())
    part.helpers.codebook = tokenizer.codebook
    init_weights(torch.nn.ModuleDict({"reconstructor": part.mapping}), seed=0, std=0.02, num_layers=4)
    model.reconstructor = part
    return model, tokenizer


def figures_of(model: ViLG, seed: int = 0) -> torch.Tensor:
    batch = tiny_batch(model.config, seed=seed)
    text_ids, image_ids, text_len = batch.rows()
    pixels = torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    targets = build_targets(batch, model.spec)
    return model(text_ids, image_ids, text_len=text_len, targets=targets, loss=LossConfig(), pixels=pixels)[2]


@pytest.mark.parametrize("kind", KINDS)
def test_codebook_rows_give_the_same_picture_on_both_paths(kind: str) -> None:
    model, tokenizer = joint_model(kind)
    ids = torch.randint(11, (3, 16), generator=torch.Generator().manual_seed(1))
    assert model.reconstructor is not None
    z_emb = tokenizer.lookup(ids)
    picture = model.reconstructor.pictures_of(model.reconstructor.decode_vectors(z_emb))
    assert torch.equal(picture, tokenizer.decode(z_emb))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_reaches_the_first_layer_and_not_with_detach(kind: str) -> None:
    for detach in (False, True):
        model, _ = joint_model(kind, detach=detach)
        figures_of(model)[:, 0].sum().backward()
        assert model.reconstructor is not None and model.embed is not None
        first = model.blocks["0"].mlp.up.weight.grad  # type: ignore[union-attr]
        embeddings = model.embed.image.weight.grad
        if detach:
            assert first is None and embeddings is None
        else:
            assert first is not None and first.norm() > 1e-6
            assert embeddings is not None and embeddings.norm() > 1e-6
        mapping = model.reconstructor.mapping.up.weight.grad
        assert mapping is not None and mapping.norm() > 0
        assert model.reconstructor.decoder.last_weight.grad is not None
        # Only text-to-image rows carry pictures, and the heads have no part in it.
        assert model.heads is not None and all(p.grad is None for p in model.heads.parameters())


def test_input_state_has_seen_its_token_and_the_other_reading_has_not() -> None:
    batch = tiny_batch(tiny_config())
    text_ids, text_len = batch.text_ids[:, 0], batch.text_len[:, 0]
    ids = batch.target_image_ids
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 11
    for state, seen in (("input", True), ("prediction", False)):
        model, _ = joint_model("dvae", state=state)
        before = model.gold_states(text_ids, ids, text_len)
        after = model.gold_states(text_ids, changed, text_len)
        moved = (before - after).abs().amax(dim=(0, 2)) > 1e-6
        assert before.shape == (4, 16, 16)
        assert bool(moved[9]) is seen
        assert not moved[:9].any() and moved[10:].any()


def test_states_are_those_of_the_training_forward() -> None:
    model, _ = joint_model("vqgan")
    batch = tiny_batch(model.config)
    seen = []
    assert model.reconstructor is not None
    model.reconstructor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    figures_of(model)
    states = model.gold_states(batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, Direction.TEXT_TO_IMAGE])
    assert torch.allclose(states, seen[0], atol=1e-5)


def test_figures_are_those_of_single_pairs() -> None:
    model, _ = joint_model("dvae")
    figures = figures_of(model)
    assert figures.shape == (4, len(FIGURES)) and figures.dtype == torch.float32
    other, _ = joint_model("dvae", loss="l1")
    assert torch.allclose(figures_of(other)[:, 0], figures_of(other)[:, 1])
    assert not torch.allclose(figures[:, 0], figures[:, 1])


def test_warm_up_only_regresses_the_codebook_rows() -> None:
    model, _ = joint_model("vqgan")
    assert model.reconstructor is not None
    model.reconstructor.helpers.warming = True
    figures = figures_of(model)
    assert torch.equal(figures[:, 0], figures[:, 2])
    figures[:, 0].sum().backward()
    assert model.reconstructor.decoder.last_weight.grad is None
    assert model.blocks["3"].mlp.up.weight.grad is None  # type: ignore[union-attr]
    assert model.reconstructor.mapping.down.weight.grad is not None


def test_critic_adds_its_part_and_pictures_are_kept_for_it() -> None:
    model, _ = joint_model("vqgan", critic_weight=0.5)
    part = model.reconstructor
    assert part is not None
    plain = figures_of(model)[:, 0]
    part.helpers.critic = PatchCritic(4)
    with_critic = figures_of(model)[:, 0]
    added = with_critic - plain
    assert added.abs().min() > 0 and torch.allclose(added, added[:1].expand(4), atol=1e-5)
    assert len(part.helpers.pictures) == 1 and not part.helpers.pictures[0].requires_grad
    assert all(p.requires_grad for p in part.helpers.critic.parameters())
    with torch.no_grad():
        assert torch.allclose(figures_of(model)[:, 0], plain, atol=1e-5)
    assert not any("critic" in name or "network" in name for name in model.state_dict())


def test_scratch_weights_keep_the_size_of_what_passes() -> None:
    config = dataclasses.replace(tokenizer_config("vqgan"), channels=32, norm_groups=4)
    part = Reconstructor(ReconstructorConfig(enabled=True), tiny_config(width=64, num_heads=4), config)
    init_weights(torch.nn.ModuleDict({"reconstructor": part}), seed=0, std=0.02, num_layers=4)
    hidden = torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z_emb = part.mapping(hidden)
        output = part.decode_vectors(z_emb)
    assert 0.2 < z_emb.std() < 2.0
    assert 0.1 < output.std() < 5.0
