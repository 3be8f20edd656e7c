"""How much of a picture survives the image tokenizer, and how much of its codebook lives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.models.image_tokenizer import ImageTokenizer

SSIM_WINDOW = 11
"""Pixels a side of the window that structural similarity looks through."""
_PICTURES_AT_A_TIME = 64
"""Through the networks of the image tokenizer."""


@dataclass(frozen=True, slots=True)
class ReconstructionScore:
    """Errors of reconstructed pictures, on pixel values between 0 and 1."""

    l1: float
    """Mean absolute error."""
    psnr: float
    """Peak signal-to-noise ratio in dB: mean of the pictures' own values."""
    count: int
    """Pictures."""


@torch.no_grad()
def encode(tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """Codes of pictures, a few at a time.

    Args:
        pixels: float32 [B, 3, S, S] in [-1, 1].

    Returns:
        int64 [B, N] on the CPU, wherever the tokenizer is.
    """
    return torch.cat(
        [tokenizer.encode(block.to(tokenizer.codebook.device)).cpu() for block in pixels.split(_PICTURES_AT_A_TIME)]
    )


@torch.no_grad()
def decode(tokenizer: ImageTokenizer, ids: Tensor) -> Tensor:
    """Pictures of codes [B, N], a few at a time: float32 [B, 3, S, S] clamped to [-1, 1], on the CPU."""
    return torch.cat(
        [
            tokenizer.decode(tokenizer.lookup(block.to(tokenizer.codebook.device))).float().clamp(-1.0, 1.0).cpu()
            for block in ids.split(_PICTURES_AT_A_TIME)
        ]
    )


def mean_score(scores: Sequence[ReconstructionScore]) -> ReconstructionScore:
    """The score of all pictures from those of some parts of them."""
    count = sum(score.count for score in scores)
    return ReconstructionScore(
        l1=sum(score.l1 * score.count for score in scores) / count,
        psnr=sum(score.psnr * score.count for score in scores) / count,
        count=count,
    )


def score_reconstruction(pixels: Tensor, reconstructed: Tensor) -> ReconstructionScore:
    """Compare pictures [B, 3, S, S] in [-1, 1] with their reconstructions."""
    if pixels.shape != reconstructed.shape or not len(pixels):
        raise ValueError(f"need equal, non-empty shapes: {tuple(pixels.shape)}, {tuple(reconstructed.shape)}")
    error = (reconstructed.double() - pixels.double()) / 2.0
    squared = error.square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return ReconstructionScore(
        l1=error.abs().mean().item(), psnr=(-10.0 * squared.log10()).mean().item(), count=len(pixels)
    )


def structural_similarity(pixels: Tensor, reconstructed: Tensor) -> float:
    """Mean structural similarity (SSIM) of brightness, as published: Gaussian window of 11 pixels, deviation 1.5.

    Args:
        pixels, reconstructed: float32 [B, 3, S, S] in [-1, 1], S at least ``SSIM_WINDOW``.

    Raises:
        ValueError: smaller pictures.
    """
    if min(pixels.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"pictures {list(pixels.shape)}: structural similarity needs {SSIM_WINDOW} pixels a side")
    axis = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None])[None, None]
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]

    def grey(x: Tensor) -> Tensor:
        return ((x.double() + 1.0) * 0.5 * weights).sum(1, keepdim=True)

    def blurred(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window)

    x, y = grey(pixels), grey(reconstructed)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((ratio / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def codebook_use(ids: Tensor, codebook_size: int) -> float:
    """Share of the codebook that occurs in ``ids`` (any shape) at least once."""
    return ids.unique().numel() / codebook_size
