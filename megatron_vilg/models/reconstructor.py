"""From hidden states straight to pixels: what the paper trains end to end with the generator (section 3.1.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, ReconstructorConfig
from megatron_vilg.models.critics import Mean, PatchCritic, adaptive_weight, deceive_loss
from megatron_vilg.models.features import FeatureNetwork
from megatron_vilg.models.pixel_losses import (
    edge_error,
    logit_laplace,
    logit_laplace_pixels,
    perceptual_distance,
    pixel_error,
)
from megatron_vilg.models.tokenizers import build_decoder

FIGURES = ("loss", "pixel_l1", "code_distance")
"""Columns of what :meth:`Reconstructor.forward` returns."""


def pixel_loss_of(config: ReconstructorConfig, tokenizer: ImageTokenizerConfig) -> Literal["logit_laplace", "l1"]:
    """What ``reconstructor.loss`` comes to with this tokenizer."""
    if config.loss == "auto":
        return "logit_laplace" if tokenizer.kind == "dvae" else "l1"
    return config.loss


class Mapping(nn.Module):
    """LayerNorm, Linear, GELU, Linear: hidden states [..., D] to vectors in the place of codebook rows [..., C].

    The paper says "mapped non-linearly" and no more.
    """

    def __init__(self, width: int, inner: int, code_dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, code_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 out, whatever the precision inside."""
        mapped: Tensor = self.down(F.gelu(self.up(self.norm(hidden))))
        return mapped.float()


@dataclass(slots=True)
class Helpers:
    """Frozen or separately trained networks that a loss needs; no part of the reconstructor's weights."""

    codebook: Tensor | None = None
    """float32 [K, C]: what the mapping regresses in its warm-up, and is measured against."""
    network: FeatureNetwork | None = None
    """Of the perceptual distance."""
    critic: PatchCritic | None = None
    """Works only where this is set; the engine opens and closes the gate."""
    mean: Mean | None = None
    """Over processes that see different pictures; None: there is one."""
    pictures: list[Tensor] = field(default_factory=list)
    """What was decoded since the engine last trained the critic, without gradient."""
    adversarial: list[Tensor] = field(default_factory=list)
    """Of each of those micro-batches the loss of being told apart, and its weight: float32 [2], without gradient."""
    warming: bool = False
    """Only the mapping learns, to hit the codebook rows."""

    def forget(self) -> None:
        """Drop what was kept for the critic."""
        self.pictures.clear()
        self.adversarial.clear()


class Reconstructor(nn.Module):
    """The mapping, and a decoder of the image tokenizer's shape. P pairs, N tokens, D width, S pixels a side."""

    def __init__(self, config: ReconstructorConfig, model: ModelConfig, tokenizer: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.side = tokenizer.grid_side
        self.loss = pixel_loss_of(config, tokenizer)
        self.kind = tokenizer.kind
        inner = config.mapping_width or model.width
        self.mapping = Mapping(model.width, inner, tokenizer.codebook_dim, model.norm_eps)
        self.decoder = build_decoder(tokenizer)
        # In a tuple, so that the networks in it are neither saved, moved nor trained with the weights.
        self._helpers = (Helpers(),)

    @property
    def helpers(self) -> Helpers:
        """What the loss needs besides; set by the engine."""
        return self._helpers[0]

    def pictures_of(self, output: Tensor) -> Tensor:
        """The decoder's output to pixels float32 [P, 3, S, S], not clamped."""
        return logit_laplace_pixels(output) if self.kind == "dvae" else output.float()

    def decode_vectors(self, z_emb: Tensor) -> Tensor:
        """Vectors [P, N, C] to the decoder's output [P, 3 or 6, S, S]."""
        grid = z_emb.transpose(1, 2).unflatten(2, (self.side, self.side))
        output: Tensor = self.decoder(grid.contiguous(memory_format=torch.channels_last))
        return output

    @torch.no_grad()
    def decode(self, hidden: Tensor) -> Tensor:
        """States [P, N, D] to pixels float32 [P, 3, S, S], not clamped."""
        return self.pictures_of(self.decode_vectors(self.mapping(hidden)))

    def forward(self, hidden: Tensor, pixels: Tensor, ids: Tensor) -> Tensor:
        """Losses of pairs.

        Args:
            hidden: states [P, N, D] that belong to the N image tokens.
            pixels: uint8 [P, 3, S, S], the true pictures.
            ids: int64 [P, N], their codes.

        Returns:
            float32 [P, 3], columns as in :data:`FIGURES`: what is trained on, the mean absolute pixel error (pixels
            in [-1, 1]), and the squared distance from the codebook rows per number.
        """
        if self.config.detach:
            hidden = hidden.detach()
        # Gathered weights of a sharded generator are bfloat16; those here are float32 on every rank.
        halves = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.bfloat16
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=halves):
            return self._figures(hidden, pixels, ids)

    def _figures(self, hidden: Tensor, pixels: Tensor, ids: Tensor) -> Tensor:
        helpers = self.helpers
        z_emb = self.mapping(hidden.detach() if helpers.warming else hidden)
        distance = torch.zeros(len(hidden), device=hidden.device)
        if helpers.codebook is not None:
            distance = (z_emb - helpers.codebook[ids]).square().mean((1, 2))
        target = pixels.to(hidden.device).float() / 127.5 - 1.0
        if helpers.warming:
            return torch.stack([distance, torch.zeros_like(distance), distance.detach()], dim=1)
        output = self.decode_vectors(z_emb)
        pictures = self.pictures_of(output)
        error = pixel_error(pictures, target)
        loss = self._reconstruction(output, pictures, target, error)
        if helpers.critic is not None and torch.is_grad_enabled():
            helpers.pictures.append(pictures.detach())
            loss = loss + self._adversarial(helpers.critic, pictures, loss)
        return torch.stack([loss, error.detach(), distance.detach()], dim=1)

    def _reconstruction(self, output: Tensor, pictures: Tensor, target: Tensor, error: Tensor) -> Tensor:
        config = self.config
        loss = logit_laplace(output, target) if self.loss == "logit_laplace" else error
        if config.edge_weight:
            loss = loss + config.edge_weight * edge_error(pictures, target)
        network = self.helpers.network
        if network is not None and config.perceptual_weight:
            with torch.autocast(pictures.device.type, enabled=False):
                loss = loss + config.perceptual_weight * perceptual_distance(network, pictures, target)
        return loss

    def _adversarial(self, critic: PatchCritic, pictures: Tensor, reconstruction: Tensor) -> Tensor:
        """What the critic adds to every pair's loss: 0-dim, weighted."""
        critic.requires_grad_(False)
        adversarial = deceive_loss(critic(pictures))
        critic.requires_grad_(True)
        weight = torch.full_like(adversarial, self.config.critic_weight, requires_grad=False)
        if self.config.critic_adaptive_weight:
            last, mean = self.decoder.last_weight, self.helpers.mean
            weight = weight * adaptive_weight(reconstruction.mean(), adversarial, last, mean)
        self.helpers.adversarial.append(torch.stack([adversarial.detach(), weight]))
        return weight * adversarial
