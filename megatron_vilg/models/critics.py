"""The PatchGAN critic, its hinge losses, and the two rules that keep it from spoiling the tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_GRADIENT_FLOOR = 1e-4
_MAX_ADAPTIVE_WEIGHT = 1e4


class PatchCritic(nn.Module):
    """Scores overlapping patches of a picture as real (high) or reconstructed (low).

    PatchGAN with three strided layers (pix2pix; sizes and start values as in taming-transformers).
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for target, stride in ((2 * channels, 2), (4 * channels, 2), (8 * channels, 1)):
            parts.append(nn.Conv2d(width, target, 4, stride=stride, padding=1, bias=False))
            parts += [nn.BatchNorm2d(target, track_running_stats=False), nn.LeakyReLU(0.2)]
            width = target
        parts.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*parts)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1], S at least 24, to scores float32 [B, 1, S / 8 - 2, S / 8 - 2]."""
        scores: Tensor = self.layers(pixels)
        return scores.float()


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the critic: real scores above 1, reconstructed ones below -1."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def deceive_loss(fake: Tensor) -> Tensor:
    """Loss of the tokenizer: its reconstructions should score high."""
    return -fake.mean()


Mean = Callable[[Tensor], Tensor]
"""A tensor's mean over the processes that see different pictures, without gradient."""


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor, mean: Mean | None = None
) -> Tensor:
    """How to scale the adversarial loss so that both pull equally on the decoder's last layer (VQGAN equation 7).

    Args:
        reconstruction_loss, adversarial_loss: 0-dim means over this process's pictures.
        last_weight: of the decoder.
        mean: over processes. It is the gradients that are averaged, not their norms: the norm of a whole batch's
            gradient is smaller than the mean of its parts' norms.

    Returns:
        Scalar without gradient, at most 1e4.
    """
    losses = (reconstruction_loss, adversarial_loss)
    gradients = [torch.autograd.grad(loss, last_weight, retain_graph=True)[0] for loss in losses]
    if mean is not None:
        gradients = list(mean(torch.stack(gradients)).unbind())
    wanted, given = (gradient.norm() for gradient in gradients)
    return (wanted / (given + _GRADIENT_FLOOR)).clamp(0.0, _MAX_ADAPTIVE_WEIGHT).detach()


class CriticGate(nn.Module):
    """Keeps the critic out until a step count is reached *and* reconstructions are good enough; then stays open.

    A critic that starts on blurred pictures wins at once and teaches nothing. The state is in buffers, so that
    it is saved with everything else.
    """

    average: Tensor
    is_open: Tensor

    def __init__(self, *, start_step: int, threshold: float, decay: float = 0.98) -> None:
        super().__init__()
        self.start_step, self.threshold, self.decay = start_step, threshold, decay
        self.register_buffer("average", torch.full((), float("nan")))
        self.register_buffer("is_open", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def update(self, step: int, pixel_error: Tensor) -> bool:
        """Take in the mean absolute pixel error (range of pixels: 0 to 1) of a step; return whether the critic works.

        An error that is not finite is left out. Before ``start_step`` nothing waits for the device.
        """
        first = torch.isnan(self.average)
        average = torch.where(first, pixel_error, torch.lerp(pixel_error, self.average, self.decay))
        self.average.copy_(torch.where(torch.isfinite(pixel_error), average, self.average))
        if step < self.start_step:
            return False
        self.is_open |= self.average < self.threshold
        return bool(self.is_open)
