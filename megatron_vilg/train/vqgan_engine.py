"""One training step of the VQGAN, and everything that must be saved to repeat it exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import ImageTokenizerTrainConfig, RunConfig
from megatron_vilg.log import get_logger
from megatron_vilg.models.critics import CriticGate, PatchCritic, adaptive_weight, critic_loss, deceive_loss
from megatron_vilg.models.quantizer import Quantised
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.train.optim import build_optimizer, optimizer_state
from megatron_vilg.train.pixel_source import PixelSource, seeded
from megatron_vilg.train.tokenizer_engine import TokenizerEngine, TokenizerStep, rates_of

log = get_logger(__name__)

_VECTORS_PER_CODE = 32
"""Encoder outputs that k-means sees, per code."""


class Phase(Enum):
    """What the codebook does in a step."""

    CONTINUOUS = "continuous"
    """Not used yet: the decoder sees encoder outputs."""
    LEARNING = "learning"
    """Follows the encoder."""
    FROZEN = "frozen"
    """Stands still, so that the decoder settles."""


def phase_of(step: int, options: ImageTokenizerTrainConfig, *, started: bool = False) -> Phase:
    """The phase of the step with this number (from 0); a codebook that has ``started`` stays in use."""
    if step < first_quantised_step(options) and not started:
        return Phase.CONTINUOUS
    frozen_steps = round(options.frozen_codebook_fraction * options.num_steps)
    return Phase.FROZEN if step >= options.num_steps - frozen_steps else Phase.LEARNING


def first_quantised_step(options: ImageTokenizerTrainConfig) -> int:
    """Step before which k-means sets the codebook."""
    return round(options.continuous_fraction * options.num_steps)


class VQGANEngine(TokenizerEngine):
    """Reconstruction, commitment, and a critic that waits for its gate."""

    model: VQGAN

    def __init__(self, run: RunConfig, device: torch.device | str = "cpu", replicas: Replicas | None = None) -> None:
        """Build everything from ``image_tokenizer_train.seed``; raises what the base class does."""
        super().__init__(run, device, replicas)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.options.seed + 1) % 2**64)
            critic = PatchCritic(self.options.critic_channels) if self.options.critic_weight else None
        self.critic = critic.to(self.device) if critic else None
        self.gate = CriticGate(start_step=self.options.critic_start_step, threshold=self.options.critic_gate)
        self.gate.to(self.device)
        self.started = False
        """Whether k-means has set the codebook."""
        self._critic_rates = rates_of(self.options, self.options.critic_lr)
        self.critic_optimizer = (
            build_optimizer(self.critic.named_parameters(), self._critic_rates, self.device) if self.critic else None
        )

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of the very tensors a checkpoint fills and saves."""
        state = super().state_dict() | {"gate": self.gate.state_dict()}
        if self.critic is not None and self.critic_optimizer is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = optimizer_state(self.critic_optimizer, self.critic.named_parameters())
        return state

    def state_metrics(self, step: int) -> dict[str, float | Tensor]:
        """The critic's gate."""
        return {
            "critic/open(0-1)": self.gate.is_open.float(),
            "critic/pixel_error(0..1)": torch.nan_to_num(self.gate.average),
        }

    def before_step(self, step: int, source: PixelSource) -> None:
        """Start the codebook where the continuous phase ends, or at once where a shorter run's has ended already."""
        if step >= first_quantised_step(self.options) and not self.started:
            self.start_codebook(source)
            log.info("step %d: the codebook starts at the k-means centres of encoder outputs", step)

    def resumed(self, found: Manifest, before: Mapping[str, Any]) -> None:
        """A codebook is trained on, though with more steps or a longer continuous phase it would start later."""
        spans = {name: before[name] for name in ("num_steps", "continuous_fraction")}
        first = first_quantised_step(dataclasses.replace(self.options, **spans))
        # Counts of use move at the first accepted step and are saved: also a run extended twice knows.
        self.started = found.step > first or bool((self.model.quantizer.ema_count != 1.0).any())

    @torch.no_grad()
    def start_codebook(self, source: PixelSource) -> None:
        """Set the codebook by k-means on encoder outputs, of batches that lie behind those of the run."""
        config = self.model.config
        wanted = _VECTORS_PER_CODE * config.codebook_size
        count = -(-wanted // (self.options.batch_size * config.grid_side**2))
        batches = [source.batch(self.options.num_steps + k).to(self.device) for k in range(count)]
        vectors = torch.cat([self._encode(pixels).flatten(0, 1) for pixels in batches])
        quantizer = self.model.quantizer
        quantizer.fit_kmeans(vectors, seeded(self.options.seed, "k-means"))
        # On a GPU sums come in any order, and one vector that changes its cluster would change all that follows.
        self.replicas.fill_from_main([quantizer.code, quantizer.ema_sum, quantizer.ema_count])
        self.started = True

    def train_step(self, step: int, pixels: Tensor) -> TokenizerStep:
        """Learn from this process's part [b, 3, S, S] of a batch, in [-1, 1]."""
        phase = phase_of(step, self.options, started=self.started)
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        self.model.train()
        vectors = self._encode(pixels)
        quantised: Quantised | None = None
        if phase is not Phase.CONTINUOUS:
            quantised = self.model.quantizer(vectors.flatten(0, 1), frozen=phase is Phase.FROZEN)
        with self._autocast():
            output = self.model.decode(vectors if quantised is None else quantised.vectors.view_as(vectors))
        losses = self._picture_losses(output, pixels)
        reconstruction = self._weighted(losses)
        total = reconstruction
        if quantised is not None:
            losses |= {"loss/commitment": quantised.commitment_loss, "loss/codebook": quantised.codebook_loss}
            total = total + self.model.config.commitment_weight * quantised.commitment_loss + quantised.codebook_loss
        pixel_error = self.replicas.mean(0.5 * losses["loss/pixel(l1)"].detach())
        critic_works = self.critic is not None and self.gate.update(step, pixel_error)
        if critic_works:
            adversarial, weight = self._adversarial(output, reconstruction)
            losses |= {"loss/adversarial": adversarial, "critic/weight": weight}
            total = total + weight * adversarial
        losses |= {"loss/total": total}
        finite, norm = self._update(self.model, self.optimizer, total, self._rates, step)
        losses |= {"grad_norm": norm}
        if finite and quantised is not None:
            self._follow(vectors, quantised.ids, phase, step)
        if finite and critic_works:
            losses |= {"loss/critic": self._train_critic(pixels, output.detach(), step)}
        self._note(finite)
        return self._report(losses, finite)

    def _encode(self, pixels: Tensor) -> Tensor:
        with self._autocast():
            return self.model.features(pixels)

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        options = self.options
        total = options.pixel_weight * losses["loss/pixel(l1)"] + options.edge_weight * losses["loss/edge(l1)"]
        if "loss/perceptual" in losses:
            total = total + options.perceptual_weight * losses["loss/perceptual"]
        return total

    def _adversarial(self, output: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of being told apart, and its weight."""
        assert self.critic is not None
        self.critic.requires_grad_(False)
        with self._autocast():
            adversarial = deceive_loss(self.critic(output))
        self.critic.requires_grad_(True)
        weight = torch.full_like(adversarial, self.options.critic_weight)
        if self.options.critic_adaptive_weight:
            weight = weight * adaptive_weight(reconstruction, adversarial, self.model.decoder.last_weight)
            weight = self.replicas.mean(weight)
        return adversarial, weight

    def _train_critic(self, real: Tensor, fake: Tensor, step: int) -> Tensor:
        assert self.critic is not None and self.critic_optimizer is not None
        with self._autocast():
            loss = critic_loss(self.critic(real), self.critic(fake))
        self._update(self.critic, self.critic_optimizer, loss, self._critic_rates, step)
        return loss

    def _follow(self, vectors: Tensor, ids: Tensor, phase: Phase, step: int) -> None:
        """Count the codes [M] of the vectors [b, N, C], and let the codebook follow; both of the whole batch."""
        ids = self.replicas.whole(ids.view(vectors.shape[:2])).flatten()
        self.code_counts += torch.bincount(ids, minlength=len(self.code_counts))
        if phase is Phase.LEARNING:
            draws = seeded(self.options.seed, "revive", step)
            everyone = self.replicas.whole(vectors.detach()).flatten(0, 1)
            self.revived += self.model.quantizer.follow(everyone, ids, draws)
