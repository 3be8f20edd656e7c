"""One training step of the image tokenizer, and everything that must be saved to repeat it exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import ImageTokenizerTrainConfig, OptimConfig, RunConfig
from megatron_vilg.models.critics import CriticGate, PatchCritic, adaptive_weight, critic_loss, deceive_loss
from megatron_vilg.models.features import FeatureNetwork, load_feature_network
from megatron_vilg.models.quantizer import Quantised
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.train.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from megatron_vilg.train.pixel_source import PixelSource, seeded

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


def phase_of(step: int, options: ImageTokenizerTrainConfig) -> Phase:
    """The phase of the step with this number (from 0)."""
    if step < first_quantised_step(options):
        return Phase.CONTINUOUS
    frozen_steps = round(options.frozen_codebook_fraction * options.num_steps)
    return Phase.FROZEN if step >= options.num_steps - frozen_steps else Phase.LEARNING


def first_quantised_step(options: ImageTokenizerTrainConfig) -> int:
    """Step before which k-means sets the codebook."""
    return round(options.continuous_fraction * options.num_steps)


@dataclass(frozen=True, slots=True)
class TokenizerStep:
    """What a step reports; tensors stay on the device until a log line needs them."""

    losses: Mapping[str, Tensor]
    """Unweighted parts by metric name."""
    finite: bool
    """False: nothing was updated."""


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., :, 1:] - pixels[..., :, :-1]


def edge_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of neighbouring pixels' differences: punishes blur, which the plain error forgives."""
    pairs = zip(edges(output), edges(target), strict=True)
    return torch.stack([(ours - theirs).abs().mean() for ours, theirs in pairs]).mean()


def perceptual_distance(network: FeatureNetwork, output: Tensor, target: Tensor) -> Tensor:
    """Squared distance of unit feature vectors, averaged over positions and summed over the network's maps."""
    with torch.no_grad():
        wanted = network.maps(target)
    pairs = zip(network.maps(output), wanted, strict=True)
    return torch.stack([(ours - theirs).square().sum(1).mean() for ours, theirs in pairs]).sum()


class TokenizerEngine:
    """Tokenizer, critic, optimizers and counters of a run on one device."""

    def __init__(self, run: RunConfig, device: torch.device | str = "cpu") -> None:
        """Build everything from ``image_tokenizer_train.seed``.

        Raises:
            MissingPackageError: the perceptual network's package is not installed.
            ConfigError: there is no such network.
        """
        self.options = run.image_tokenizer_train
        self.device = torch.device(device)
        self.network = (
            load_feature_network(self.options.perceptual_network).to(self.device)
            if self.options.perceptual_weight
            else None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.model = VQGAN(run.image_tokenizer).to(self.device)
            critic = PatchCritic(self.options.critic_channels) if self.options.critic_weight else None
        self.critic = critic.to(self.device) if critic else None
        self.gate = CriticGate(start_step=self.options.critic_start_step, threshold=self.options.critic_gate)
        self.gate.to(self.device)
        self._rates = _rates(self.options, self.options.lr)
        self._critic_rates = _rates(self.options, self.options.critic_lr)
        self.optimizer = build_optimizer(self.model.named_parameters(), self._rates, self.device)
        self.critic_optimizer = (
            build_optimizer(self.critic.named_parameters(), self._critic_rates, self.device) if self.critic else None
        )
        self.code_counts = torch.zeros(run.image_tokenizer.codebook_size, dtype=torch.int64, device=self.device)
        """How often each code was used since the last log line."""
        self.revived = torch.zeros((), dtype=torch.int64, device=self.device)
        """Dead codes replaced since the last log line."""
        self.skipped = torch.zeros((), dtype=torch.int64)
        """Steps that were not finite, since the start."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of the very tensors a checkpoint fills and saves."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model.named_parameters()),
            "gate": self.gate.state_dict(),
            "window": {"code_counts": self.code_counts, "revived": self.revived, "skipped": self.skipped},
        }
        if self.critic is not None and self.critic_optimizer is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = optimizer_state(self.critic_optimizer, self.critic.named_parameters())
        return state

    def rate(self, step: int) -> float:
        """Learning rate of the tokenizer at a step."""
        return learning_rate(step, self._rates, self.options.num_steps)

    @torch.no_grad()
    def start_codebook(self, source: PixelSource) -> None:
        """Set the codebook by k-means on encoder outputs, of batches that lie behind those of the run."""
        config = self.model.config
        wanted = _VECTORS_PER_CODE * config.codebook_size
        count = -(-wanted // (self.options.batch_size * config.grid_side**2))
        batches = [source.batch(self.options.num_steps + k).to(self.device) for k in range(count)]
        vectors = torch.cat([self._encode(pixels).flatten(0, 1) for pixels in batches])
        self.model.quantizer.fit_kmeans(vectors, seeded(self.options.seed, "k-means"))

    def train_step(self, step: int, pixels: Tensor) -> TokenizerStep:
        """Learn from one batch [B, 3, S, S] in [-1, 1]."""
        phase = phase_of(step, self.options)
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        self.model.train()
        vectors = self._encode(pixels)
        quantised: Quantised | None = None
        if phase is not Phase.CONTINUOUS:
            quantised = self.model.quantizer(vectors.flatten(0, 1), frozen=phase is Phase.FROZEN)
        with self._autocast():
            output = self.model.decode(vectors if quantised is None else quantised.vectors.view_as(vectors))
        losses = self._reconstruction_losses(output, pixels)
        reconstruction = self._weighted(losses)
        total = reconstruction
        if quantised is not None:
            losses |= {"loss/commitment": quantised.commitment_loss, "loss/codebook": quantised.codebook_loss}
            total = total + self.model.config.commitment_weight * quantised.commitment_loss + quantised.codebook_loss
        critic_works = self.critic is not None and self.gate.update(step, 0.5 * losses["loss/pixel(l1)"].detach())
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
        self.skipped += int(not finite)
        return TokenizerStep({name: value.detach() for name, value in losses.items()}, finite)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _encode(self, pixels: Tensor) -> Tensor:
        with self._autocast():
            return self.model.features(pixels)

    def _reconstruction_losses(self, output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        losses = {"loss/pixel(l1)": (output - pixels).abs().mean(), "loss/edge(l1)": edge_error(output, pixels)}
        chosen = round(self.options.perceptual_share * len(pixels))
        if self.network is not None and chosen:
            # fp32 on CPU: there bfloat16 makes the backward pass of depthwise convolutions slower.
            enabled = self.device.type != "cpu" and self.options.precision == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
                losses["loss/perceptual"] = perceptual_distance(self.network, output[:chosen], pixels[:chosen])
        return losses

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
        return adversarial, weight

    def _train_critic(self, real: Tensor, fake: Tensor, step: int) -> Tensor:
        assert self.critic is not None and self.critic_optimizer is not None
        with self._autocast():
            loss = critic_loss(self.critic(real), self.critic(fake))
        self._update(self.critic, self.critic_optimizer, loss, self._critic_rates, step)
        return loss

    def _update(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rates: OptimConfig, step: int
    ) -> tuple[bool, Tensor]:
        """One optimizer step, left out if the gradient is not finite."""
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.options.grad_clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            set_learning_rate(optimizer, learning_rate(step, rates, self.options.num_steps))
            optimizer.step()
        return finite, norm

    def _follow(self, vectors: Tensor, ids: Tensor, phase: Phase, step: int) -> None:
        self.code_counts += torch.bincount(ids, minlength=len(self.code_counts))
        if phase is Phase.LEARNING:
            draws = seeded(self.options.seed, "revive", step)
            self.revived += self.model.quantizer.follow(vectors.detach().flatten(0, 1), ids, draws)


def _rates(options: ImageTokenizerTrainConfig, lr: float) -> OptimConfig:
    """The tokenizer's optimizer options in the form that the package's optimizer code reads."""
    return OptimConfig(
        lr=lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        grad_clip=options.grad_clip,
        warmup_steps=options.warmup_steps,
        min_lr_share=0.02,
    )
