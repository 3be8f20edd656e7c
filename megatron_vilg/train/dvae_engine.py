"""One training step of the discrete VAE: a relaxed sample, its likelihood, the divergence from a uniform choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import ImageTokenizerTrainConfig
from megatron_vilg.models.dvae import DVAE, kl_to_uniform
from megatron_vilg.models.pixel_losses import logit_laplace, logit_laplace_pixels
from megatron_vilg.train.pixel_source import PixelSource, seeded
from megatron_vilg.train.tokenizer_engine import TokenizerEngine, TokenizerStep

_REACHED = "schedule_step"
"""Counter of a manifest: the step up to which the schedules have come; without it, its step."""


def temperature_at(step: int, options: ImageTokenizerTrainConfig) -> float:
    """Temperature of the Gumbel-softmax in the step with this number (from 0): a cosine, then constant."""
    length = max(1, round(options.temperature_fraction * options.num_steps))
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / length)))
    return options.temperature_end + (options.temperature_start - options.temperature_end) * share


def kl_weight_at(step: int, options: ImageTokenizerTrainConfig) -> float:
    """Weight of the divergence in the step with this number: a line from 0, then constant."""
    length = max(1, round(options.kl_warmup_fraction * options.num_steps))
    return options.kl_weight * min(1.0, step / length)


class DVAEEngine(TokenizerEngine):
    """DALL-E, appendix A.2: logit-Laplace likelihood and divergence, both divided by the number of pixel values.

    ``edge_weight`` and ``perceptual_weight`` may add what DALL-E does not have.
    """

    model: DVAE
    _reached: int = 0
    """No step takes temperature and weight of the divergence from before this one of their schedules."""

    def before_step(self, step: int, source: PixelSource) -> None:
        """Nothing: a dVAE's codes learn from the first step on."""

    def resumed(self, found: Manifest, before: Mapping[str, Any]) -> None:
        """With more steps the schedules stand still until the run comes to where they are."""
        reached = int(found.counters.get(_REACHED, found.step))
        self._reached = reached * self.options.num_steps // int(before["num_steps"])

    def counters(self, step: int) -> dict[str, int]:
        """Where the schedules are, if ahead of ``step``."""
        return {_REACHED: self._reached} if self._reached > step else {}

    def train_step(self, step: int, pixels: Tensor) -> TokenizerStep:
        """Learn from this process's part [b, 3, S, S] of a batch, in [-1, 1]."""
        options, model, place = self.options, self.model, max(step, self._reached)
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        model.train()
        with self._autocast():
            logits = model.features(pixels)
        vectors = model.soft_codes(logits, temperature_at(place, options), self._uniforms(step, logits))
        with self._autocast():
            parameters = model.parameters_of(vectors)
        losses = {
            "loss/logit_laplace(nats)": logit_laplace(parameters, pixels).mean(),
            "loss/kl(nats/token)": kl_to_uniform(logits),
        }
        losses |= self._picture_losses(logit_laplace_pixels(parameters), pixels)
        tokens_per_value = model.config.grid_side**2 / pixels[0].numel()
        total = options.pixel_weight * losses["loss/logit_laplace(nats)"]
        total = total + kl_weight_at(place, options) * tokens_per_value * losses["loss/kl(nats/token)"]
        total = total + options.edge_weight * losses["loss/edge(l1)"]
        if "loss/perceptual" in losses:
            total = total + options.perceptual_weight * losses["loss/perceptual"]
        finite, norm = self._update(model, self.optimizer, total, self._rates, step)
        losses |= {"loss/total": total, "grad_norm": norm}
        if finite:
            ids = self.replicas.whole(logits.detach().argmax(-1))
            self.code_counts += torch.bincount(ids.flatten(), minlength=len(self.code_counts))
            if step < (1.0 - options.frozen_codebook_fraction) * options.num_steps:
                self.revived += model.follow(ids, seeded(options.seed, "revive", step))
        self._note(finite)
        return self._report(losses, finite)

    def _uniforms(self, step: int, logits: Tensor) -> Tensor:
        """Uniform numbers for logits [b, N, K]: those of picture i of a batch are the same on whatever process it is.

        A device has a stream of its own: same seed and same kind of device, same numbers.
        """
        found = torch.empty(logits.shape, device=logits.device)
        for row, numbers in enumerate(found):
            picture = row * self.replicas.size + self.replicas.rank
            seed = seeded(self.options.seed, f"gumbel {picture}", step).initial_seed()
            numbers.uniform_(generator=torch.Generator(self.device).manual_seed(seed))
        return found

    def state_metrics(self, step: int) -> dict[str, float | Tensor]:
        """Temperature and weight of the divergence."""
        place = max(step, self._reached)
        return {
            "gumbel/temperature": temperature_at(place, self.options),
            "gumbel/kl_weight": kl_weight_at(place, self.options),
        }
