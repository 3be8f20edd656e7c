from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models import quantizer as quantizer_module
from megatron_vilg.models.quantizer import VectorQuantizer, codebook_use

CONFIG = ImageTokenizerConfig(codebook_size=16, codebook_dim=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(**changes: object) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("normalise", [True, False])
def test_nearest_is_the_nearest_in_distance_and_slices_agree(normalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = build(l2_normalise=normalise)
    vectors = quantizer.prepare(torch.randn(50, 4) * 3)
    expected = torch.cdist(vectors, quantizer.codebook).argmin(1)
    assert torch.equal(quantizer.nearest(vectors), expected)
    monkeypatch.setattr(quantizer_module, "_MAX_SCORES", 16 * 7)
    assert torch.equal(quantizer.nearest(vectors), expected)


def test_gradients_pass_straight_through() -> None:
    quantizer = build()
    vectors = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    result = quantizer(vectors)
    assert torch.allclose(result.vectors, quantizer.codebook[result.ids], atol=1e-6)
    upstream = torch.randn(6, 4)
    (gradient,) = torch.autograd.grad(result.vectors, vectors, upstream)
    assert torch.equal(gradient, upstream)


def test_losses_reach_the_side_they_are_meant_for() -> None:
    quantizer = build(codebook_update="gradient", l2_normalise=False)
    vectors = torch.randn(6, 4, requires_grad=True)
    result = quantizer(vectors)
    assert torch.autograd.grad(result.commitment_loss, quantizer.code, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(result.codebook_loss, vectors, retain_graph=True, allow_unused=True) == (None,)
    (pull,) = torch.autograd.grad(result.codebook_loss, quantizer.code)
    assert pull.abs().sum() > 0
    assert quantizer(vectors, frozen=True).codebook_loss.requires_grad is False
    assert build()(vectors.detach()).codebook_loss == 0


def test_averages_move_codes_to_the_mean_of_their_vectors() -> None:
    quantizer = build(l2_normalise=False, ema_decay=0.5, dead_code_threshold=0.0)
    start = quantizer.code.clone()
    vectors = torch.stack([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 2.0, 1.0, 0.0])])
    replaced = quantizer.follow(vectors, torch.tensor([5, 5]), generator())
    assert replaced == 0
    assert quantizer.ema_count[5] == pytest.approx(0.5 * 1 + 0.5 * 2)
    expected = (0.5 * start[5] + 0.5 * vectors.sum(0)) / 1.5
    assert torch.allclose(quantizer.code[5], expected)
    assert torch.allclose(quantizer.code[6], start[6])
    for _ in range(40):
        quantizer.follow(vectors, torch.tensor([5, 5]), generator())
    assert torch.allclose(quantizer.code[5], vectors.mean(0), atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_codes_that_nobody_chooses_stay_where_they_are(normalise: bool) -> None:
    quantizer = build(l2_normalise=normalise, ema_decay=0.5, dead_code_threshold=0.0)
    start = quantizer.code.clone()
    vectors = quantizer.prepare(torch.randn(2, 4, generator=generator()))
    for _ in range(300):
        assert quantizer.follow(vectors, torch.tensor([5, 5]), generator()) == 0
    assert quantizer.ema_count[6] == 0 and quantizer.ema_sum[6].abs().max() == 0
    others = [code for code in range(16) if code != 5]
    assert torch.allclose(quantizer.code[others], start[others], rtol=1e-5, atol=1e-6)
    quantizer.follow(vectors, torch.tensor([6, 6]), generator())  # somebody does
    assert torch.allclose(quantizer.codebook[6], quantizer.prepare(vectors.mean(0)), atol=1e-6)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_become_encoder_outputs(update: str) -> None:
    quantizer = build(codebook_update=update, ema_decay=0.5, dead_code_threshold=0.3)
    vectors = F.normalize(torch.randn(8, 4), dim=1)
    ids = torch.zeros(8, dtype=torch.int64)
    assert quantizer.follow(vectors, ids, generator()) == 0
    revived = quantizer.follow(vectors, ids, generator(3))
    assert revived == 15
    distance = torch.cdist(quantizer.codebook[1:], vectors).min(1).values
    assert distance.max() < 1e-3
    assert torch.equal(quantizer.ema_count[1:], torch.ones(15))
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(16), atol=1e-5)
    other = build(codebook_update=update, ema_decay=0.5, dead_code_threshold=0.3)
    other.follow(vectors, ids, generator())
    other.follow(vectors, ids, generator(3))
    assert torch.equal(quantizer.code, other.code)


def test_kmeans_ends_at_the_means_of_its_clusters() -> None:
    quantizer = build()
    centres = torch.eye(4).repeat_interleave(60, 0)
    vectors = F.normalize(centres + 0.05 * torch.randn(240, 4, generator=generator()), dim=1)
    quantizer.fit_kmeans(vectors, generator(1), iterations=50)
    ids = quantizer.nearest(vectors)
    assert len(ids.unique()) == 16
    for code in range(16):
        mean = F.normalize(vectors[ids == code].mean(0), dim=0)
        assert torch.allclose(quantizer.codebook[code], mean, atol=1e-3)
    assert (quantizer.codebook[ids] * centres).sum(1).min() > 0.95
    assert torch.equal(quantizer.ema_sum, quantizer.code)


def test_kmeans_with_fewer_vectors_than_codes_uses_them_all() -> None:
    quantizer = build()
    vectors = F.normalize(torch.randn(5, 4), dim=1)
    quantizer.fit_kmeans(vectors, generator())
    assert len(quantizer.nearest(vectors).unique()) == 5


def test_use_of_the_codebook() -> None:
    assert codebook_use(torch.tensor([9, 0, 0, 0])).perplexity == pytest.approx(1.0)
    even = codebook_use(torch.tensor([3, 3, 3, 3, 0, 0, 0, 0]))
    assert even.used == 0.5 and even.perplexity == pytest.approx(4.0)
