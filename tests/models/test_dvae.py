from __future__ import annotations

import math

import pytest
import torch

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.dvae import DVAE, kl_to_uniform
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.models.pixel_losses import LN_SCALE_FLOOR, logit_laplace, logit_laplace_pixels

SMALL = ImageTokenizerConfig(
    kind="dvae",
    image_size=24,
    patch=3,
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    codebook_size=32,
    codebook_dim=8,
)


@pytest.fixture
def small() -> DVAE:
    torch.manual_seed(0)
    return DVAE(SMALL).eval()


def pictures(count: int = 2, size: int = 24) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_shapes_and_interface(small: DVAE) -> None:
    assert isinstance(small, ImageTokenizer)
    ids = small.encode(pictures())
    assert ids.shape == (2, 16) and ids.dtype == torch.int64 and ids.max() < 32
    vectors = small.lookup(ids)
    assert vectors.shape == (2, 16, 8) and torch.equal(vectors, small.codebook[ids])
    assert small.parameters_of(vectors).shape == (2, 6, 24, 24)
    assert small.decode(vectors).shape == (2, 3, 24, 24)
    with pytest.raises(ValueError, match=r"this tokenizer reads \[B, 3, 24, 24\]"):
        small.encode(pictures(1, 32))


def test_openai_shape_has_the_published_size() -> None:
    config = ImageTokenizerConfig(kind="dvae", channels=256, channel_multipliers=(1, 2, 4, 8), codebook_dim=128)
    with torch.device("meta"):
        model = DVAE(config)
        assert model.features(torch.empty(1, 3, 256, 256)).shape == (1, 1024, 8192)
    # The released encoder has 53.8 and the decoder 43.8 million parameters; the codebook is part of its decoder.
    assert sum(p.numel() for p in model.encoder.parameters()) == pytest.approx(53.8e6, rel=0.01)
    decoder = sum(p.numel() for p in model.decoder.parameters()) + model.code.numel()
    assert decoder == pytest.approx(43.8e6, rel=0.01)


def test_cold_soft_codes_are_codes_and_hot_ones_are_mixtures(small: DVAE) -> None:
    logits = 3.0 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))

    def drawn(temperature: float) -> torch.Tensor:
        return small.soft_codes(
            logits, temperature, torch.rand(logits.shape, generator=torch.Generator().manual_seed(4))
        ).detach()

    distance = torch.cdist(drawn(1e-3).flatten(0, 1), small.codebook).amin(1)
    assert distance.max() < 1e-2
    assert torch.cdist(drawn(5.0).flatten(0, 1), small.codebook).amin(1).mean() > 0.1
    assert torch.equal(drawn(0.5), drawn(0.5))


def test_gumbel_samples_follow_the_distribution(small: DVAE) -> None:
    logits = torch.zeros(1, 20_000, 32)
    logits[..., 0] = math.log(31.0)  # half of all probability
    vectors = small.soft_codes(logits, 1e-4, torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)))
    first = (vectors[0] - small.code[0]).norm(dim=1) < 1e-2
    assert first.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_logit_laplace_is_a_density_and_its_mode_the_picture() -> None:
    mu, ln_scale = 0.4, -0.7
    x = torch.linspace(0.1005, 0.8995, 4000)
    pixels = ((x - 0.1) / 0.8 * 2 - 1)[None, None, None].expand(1, 3, 1, -1)
    parameters = torch.tensor([mu] * 3 + [ln_scale] * 3)[None, :, None, None].expand(1, 6, 1, 1)
    each = torch.stack([logit_laplace(parameters, pixels[..., i : i + 1])[0] for i in range(0, 4000, 10)])
    inside = float((-each).exp().sum() * (x[10] - x[0]))
    scale = math.exp(ln_scale)

    def below(at: float) -> float:
        value = math.log(at / (1 - at)) - mu
        return 0.5 * math.exp(value / scale) if value < 0 else 1 - 0.5 * math.exp(-value / scale)

    assert inside == pytest.approx(below(0.9) - below(0.1), rel=0.01)
    target = pictures(1)
    squeezed = 0.8 * (target + 1) / 2 + 0.1
    exact = torch.cat([torch.logit(squeezed), torch.zeros_like(target)], dim=1)
    assert torch.allclose(logit_laplace_pixels(exact), target, atol=1e-5)
    floor = torch.cat([torch.logit(squeezed), torch.full_like(target, LN_SCALE_FLOOR)], dim=1)
    sharper = torch.cat([torch.logit(squeezed), torch.full_like(target, -50.0)], dim=1)
    assert torch.equal(logit_laplace(floor, target), logit_laplace(sharper, target))


def test_divergence_from_uniform() -> None:
    assert kl_to_uniform(torch.zeros(2, 3, 8)).item() == pytest.approx(0.0, abs=1e-6)
    one = torch.full((1, 1, 8), -50.0)
    one[..., 2] = 50.0
    assert kl_to_uniform(one).item() == pytest.approx(math.log(8), rel=1e-5)


def test_nothing_is_drawn_where_no_code_is_dead(small: DVAE) -> None:
    draws, before = torch.Generator().manual_seed(1), small.codebook.clone()
    start = draws.get_state()
    assert not small.follow(torch.arange(32)[None], draws)
    assert torch.equal(draws.get_state(), start) and torch.equal(small.codebook, before)


def test_dead_codes_split_busy_ones(small: DVAE) -> None:
    ids = torch.tensor([[3] * 12 + [7] * 4])
    head = small.encoder.head
    assert head.bias is not None
    torch.nn.init.normal_(head.bias)
    before, rows, bias = small.codebook.clone(), head.weight.detach().flatten(1).clone(), head.bias.detach().clone()
    for step in range(200):
        revived = small.follow(ids, torch.Generator().manual_seed(step))
        if revived:
            break
    assert int(revived) == 30
    assert not small.follow(ids, torch.Generator().manual_seed(0)), "they count as used once"
    assert torch.isin(head.bias, bias[[3, 7]]).all() and torch.equal(head.bias[[3, 7]], bias[[3, 7]])
    distance = torch.cdist(head.weight.flatten(1), rows[[3, 7]]).amin(1)
    assert distance.max() < 0.25 * rows[[3, 7]].norm(dim=1).max(), "the encoder's rows as well"
    busy = before[[3, 7]]
    nearest = torch.cdist(small.codebook, busy).amin(1)
    assert nearest.max() < 0.25 * busy.norm(dim=1).max()
    assert torch.equal(small.codebook[[3, 7]], busy)
