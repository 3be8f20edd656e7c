"""How far a decoded picture is from the true one; one number per picture, so that losses of micro-batches add up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vilg.models.features import FeatureNetwork

_MARGIN = 0.1
"""Pixels are squeezed into [0.1, 0.9] before the logit, where it is finite (DALL-E, appendix A.3)."""
LN_SCALE_FLOOR = -3.0
"""Least ln b. One grey level at white is 0.035 on the logit scale; a sharper likelihood of rounded pixels is
unbounded on even ground and says nothing."""


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def pixel_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of pictures [B, 3, S, S]: float32 [B]."""
    return (output - target).abs().flatten(1).mean(1)


def edge_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of neighbouring pixels' differences, [B]: punishes blur, which the plain error forgives."""
    pairs = zip(edges(output), edges(target), strict=True)
    return torch.stack([pixel_error(ours, theirs) for ours, theirs in pairs]).mean(0)


def perceptual_distance(network: FeatureNetwork, output: Tensor, target: Tensor) -> Tensor:
    """Squared distance of unit feature vectors, averaged over positions and summed over the network's maps: [B]."""
    with torch.no_grad():
        wanted = network.maps(target)
    pairs = zip(network.maps(output), wanted, strict=True)
    return torch.stack([(ours - theirs).square().sum(1).mean((1, 2)) for ours, theirs in pairs]).sum(0)


def logit_laplace(parameters: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of DALL-E's dVAE (appendix A.3), nats per pixel and channel.

    Args:
        parameters: [B, 6, S, S]: the location mu, then ln b, on the logit scale.
        target: pixels [B, 3, S, S] in [-1, 1].

    Returns:
        float32 [B].
    """
    mu, ln_scale = parameters.float().chunk(2, dim=1)
    ln_scale = ln_scale.clamp(min=LN_SCALE_FLOOR)
    x = squeezed(target.float())
    distance = (torch.logit(x) - mu).abs() * torch.exp(-ln_scale)
    return (distance + ln_scale + math.log(2.0) + (x * (1.0 - x)).log()).flatten(1).mean(1)


def logit_laplace_pixels(parameters: Tensor) -> Tensor:
    """The picture that parameters [B, 6, S, S] stand for: float32 [B, 3, S, S], in [-1, 1] up to the margin."""
    mu = parameters.float().chunk(2, dim=1)[0]
    return (torch.sigmoid(mu) - _MARGIN) * (2.0 / (1.0 - 2.0 * _MARGIN)) - 1.0


def squeezed(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] mapped to [0.1, 0.9]."""
    return (1.0 - 2.0 * _MARGIN) * (pixels + 1.0) * 0.5 + _MARGIN
