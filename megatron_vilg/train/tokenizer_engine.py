"""What training any image tokenizer has in common: optimizer, averaged weights, counters, steps that are skipped."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import ImageTokenizerTrainConfig, OptimConfig, RunConfig
from megatron_vilg.models.features import load_feature_network
from megatron_vilg.models.pixel_losses import edge_error, perceptual_distance, pixel_error
from megatron_vilg.models.tokenizers import AnyTokenizer, build_image_tokenizer
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.train.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from megatron_vilg.train.pixel_source import PixelSource
from megatron_vilg.train.precision import settle_precision
from megatron_vilg.train.weight_average import WeightAverage


@dataclass(frozen=True, slots=True)
class TokenizerStep:
    """What a step reports; tensors stay on the device until a log line needs them."""

    losses: Mapping[str, Tensor]
    """Unweighted parts by metric name."""
    finite: bool
    """False: nothing was updated."""


class TokenizerEngine(ABC):
    """A tokenizer, its optimizer and counters on one device. Every step is a function of (seed, step, weights).

    Several processes hold the same and see ``replicas.part`` of each batch: their weights stay equal to those of one
    process, but for the critic's batch statistics and its adaptive weight, which are those of a part.
    """

    def __init__(self, run: RunConfig, device: torch.device | str = "cpu", replicas: Replicas | None = None) -> None:
        """Build everything from ``image_tokenizer_train.seed``.

        Raises:
            MissingPackageError: the perceptual network's package is not installed.
            ConfigError: there is no such network.
        """
        self.device = torch.device(device)
        run = settle_precision(run, self.device)
        self.options = run.image_tokenizer_train
        self.replicas = replicas or Replicas()
        self.network = (
            load_feature_network(self.options.perceptual_network).to(self.device)
            if self.options.perceptual_weight
            else None
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed % 2**64)
            self.model: AnyTokenizer = build_image_tokenizer(run.image_tokenizer).to(self.device)
        self.average = (
            WeightAverage(self.model, self.options.weights_ema_decay) if self.options.weights_ema_decay else None
        )
        self._rates = dataclasses.replace(rates_of(self.options, self.options.lr), name=self.options.optimizer)
        ranks = self.replicas.ranks(self.device)
        in_bf16 = self.options.precision == "bf16"
        self.optimizer = build_optimizer(
            self.model.named_parameters(), self._rates, self.device, in_bf16=in_bf16, ranks=ranks
        )
        self.code_counts = torch.zeros(run.image_tokenizer.codebook_size, dtype=torch.int64, device=self.device)
        """How often each code was used since the last log line."""
        self.revived = torch.zeros((), dtype=torch.int64, device=self.device)
        """Dead codes replaced since the last log line."""
        self.skipped = torch.zeros((), dtype=torch.int64)
        """Steps that were not finite, since the start."""

    @abstractmethod
    def before_step(self, step: int, source: PixelSource) -> None:
        """Whatever happens once before some step."""

    @abstractmethod
    def resumed(self, found: Manifest, before: Mapping[str, Any]) -> None:
        """Note how far a run has come that goes on from a loaded checkpoint with this manifest.

        Args:
            before: its ``image_tokenizer_train`` so far. With another ``num_steps`` schedules must not go back.
        """

    def counters(self, step: int) -> dict[str, int]:
        """What the manifest of a checkpoint after ``step`` steps says for ``resumed``, beside step and options."""
        return {}

    @abstractmethod
    def train_step(self, step: int, pixels: Tensor) -> TokenizerStep:
        """Learn from this process's part [b, 3, S, S] of a batch, in [-1, 1]; losses are means over the whole batch."""

    @abstractmethod
    def state_metrics(self, step: int) -> dict[str, float | Tensor]:
        """What a log line says of schedules and gates at a step."""

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of the very tensors a checkpoint fills and saves."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model.named_parameters()),
            "window": {"code_counts": self.code_counts, "revived": self.revived, "skipped": self.skipped},
        }
        if self.average is not None:
            state["average"] = self.average.state_dict()
        return state

    def finished(self) -> AnyTokenizer:
        """What is measured and kept: the averaged weights where there are any."""
        if self.average is None:
            return self.model
        tokenizer = copy.deepcopy(self.model)
        tokenizer.load_state_dict(self.average.named())
        return tokenizer

    def rate(self, step: int) -> float:
        """Learning rate of the tokenizer at a step."""
        return learning_rate(step, self._rates, self.options.num_steps)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _picture_losses(self, output: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Errors of decoded pictures, means over the batch."""
        losses = {
            "loss/pixel(l1)": pixel_error(output, pixels).mean(),
            "loss/edge(l1)": edge_error(output, pixels).mean(),
        }
        chosen = round(self.options.perceptual_share * len(pixels) * self.replicas.size)
        if self.network is not None and chosen:
            # The first ones of the whole batch: parts may have more or fewer of them, or none.
            own = len(self.replicas.part(torch.empty(chosen)))
            # fp32 on CPU: there bfloat16 makes the backward pass of depthwise convolutions slower.
            enabled = self.device.type != "cpu" and self.options.precision == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
                distance = perceptual_distance(self.network, output[:own], pixels[:own]) if own else output.new_zeros(1)
            losses["loss/perceptual"] = distance.sum() * (self.replicas.size / chosen)
        return losses

    def _update(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rates: OptimConfig, step: int
    ) -> tuple[bool, Tensor]:
        """One optimizer step, left out if the gradient is not finite."""
        optimizer.zero_grad()
        loss.backward()
        self.replicas.average_gradients(module.parameters())
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.options.grad_clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            set_learning_rate(optimizer, learning_rate(step, rates, self.options.num_steps))
            optimizer.step()
        return finite, norm

    def _report(self, losses: Mapping[str, Tensor], finite: bool) -> TokenizerStep:
        return TokenizerStep(self.replicas.means({name: value.detach() for name, value in losses.items()}), finite)

    def _note(self, finite: bool) -> None:
        """Count a skipped step, or average the weights of an accepted one; last in every step."""
        self.skipped += int(not finite)
        if finite and self.average is not None:
            self.average.update(self.model)


def rates_of(options: ImageTokenizerTrainConfig, lr: float) -> OptimConfig:
    """The tokenizer's optimizer options in the form that the package's optimizer code reads."""
    return OptimConfig(
        lr=lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        grad_clip=options.grad_clip,
        warmup_steps=options.warmup_steps,
        min_lr_share=0.02,
    )
