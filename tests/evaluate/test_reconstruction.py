from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.evaluate.reconstruction import codebook_use, decode, encode, mean_score, score_reconstruction


class GreyLevels:
    """A tokenizer with one token per pixel and four grey levels."""

    config = ImageTokenizerConfig(image_size=4, codebook_size=4, codebook_dim=1)
    codebook = torch.linspace(-1, 1, 4)[:, None]

    def encode(self, pixels: Tensor) -> Tensor:
        return ((pixels.mean(dim=1).flatten(1) + 1) * 1.5).round().long()

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codebook[ids]

    def decode(self, z_emb: Tensor) -> Tensor:
        return z_emb[..., 0].reshape(-1, 1, 4, 4).expand(-1, 3, -1, -1) * 1.5


def test_scores_of_a_known_error() -> None:
    pixels = torch.zeros(3, 3, 4, 4)
    score = score_reconstruction(pixels, pixels + 0.2)
    assert score.l1 == pytest.approx(0.1, abs=1e-6)
    assert score.psnr == pytest.approx(-20 * math.log10(0.1), abs=1e-4)
    assert score.count == 3


def test_psnr_is_the_mean_of_the_pictures_own_values() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    wrong = pixels.clone()
    wrong[0] += 0.2
    wrong[1] += 0.02
    assert score_reconstruction(pixels, wrong).psnr == pytest.approx(30.0, abs=1e-3)


def test_decoded_pictures_are_clamped_and_come_in_batches() -> None:
    pixels = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 3, 4, 4).repeat(50, 1, 1, 1)
    ids = encode(GreyLevels(), pixels)
    pictures = decode(GreyLevels(), ids)
    assert ids.tolist() == [[level] * 16 for level in range(4)] * 50
    assert pictures.shape == pixels.shape and pictures.amax() == 1.0 and pictures.amin() == -1.0
    assert codebook_use(ids, 8) == 0.5


def test_the_score_of_all_is_that_of_their_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels, wrong = (torch.rand(5, 3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    parts = [score_reconstruction(pixels[part], wrong[part]) for part in (slice(0, 3), slice(3, 5))]
    whole, mean = score_reconstruction(pixels, wrong), mean_score(parts)
    assert mean.count == 5
    assert mean.l1 == pytest.approx(whole.l1, rel=1e-12) and mean.psnr == pytest.approx(whole.psnr, rel=1e-12)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        score_reconstruction(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2))
