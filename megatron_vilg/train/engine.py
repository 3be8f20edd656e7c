"""Who executes a training step. The loop above knows no device, no precision and no ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.batch import PairBatch, build_targets
from megatron_vilg.log import get_logger
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import choose_implementation
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.train.losses import TokenCounts, weighted_loss
from megatron_vilg.train.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """0-dim tensors on the device, over the whole batch; read them (``.item()``) only where a log line needs them."""

    loss: Tensor
    image_ce: Tensor
    """Text-to-image cross-entropy, nats per token."""
    text_ce: Tensor
    """Image-to-text cross-entropy, nats per token."""
    grad_norm: Tensor
    """Before clipping; 0 for an evaluation step."""
    skipped: Tensor
    """1 if the step was not finite and changed nothing."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What else this engine has to report, by metric name."""


class Engine(Protocol):
    """A model, its optimizer and the step that joins them."""

    step: int
    model: ViLG

    def train_step(self, batch: PairBatch) -> StepResult:
        """One optimizer step on a whole batch."""
        ...

    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses without a step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state, by parameter name; loading fills these tensors in place."""
        ...

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        ...

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole tensors, one at a time."""
        ...


class NativeEngine:
    """Plain PyTorch on one device.

    Args:
        run: resolved configuration (``RunConfig.resolve``).
        device: where the model lives.
        codebook: float32 [K, C], vectors of the image tokenizer; needed when ``model.codebook_dim`` is not 0.
    """

    def __init__(self, run: RunConfig, device: torch.device | str = "cpu", codebook: Tensor | None = None) -> None:
        self.run = run
        self.device = torch.device(device)
        self.step = 0
        implementation, reason = choose_implementation(run.ops.attention, run.model.image_side)
        log.info("attention: %s (%s)", implementation, reason)
        with torch.device("meta"):
            model = ViLG(run.model, implementation)
        model.to_empty(device=self.device)
        init_weights(model, seed=run.train.seed, std=run.model.init_std, num_layers=run.model.num_layers)
        model.recompute = run.parallel.recompute == "block"
        if run.model.codebook_dim:
            if codebook is None:
                raise ValueError("model.codebook_dim is set: NativeEngine needs the tokenizer's codebook")
            assert model.embed is not None
            model.embed.get_buffer("codebook").copy_(codebook)
        self.model = model
        self.optimizer = build_optimizer(list(model.named_parameters()), run.optim, self.device)

    def train_step(self, batch: PairBatch) -> StepResult:
        """Accumulate over micro-batches, clip, step; a step that is not finite changes nothing."""
        run = self.run
        self.model.train()
        if run.model.dropout > 0.0:  # masks depend on the step alone, so that a resumed run draws the same ones
            torch.manual_seed(run.train.seed * 1_000_003 + self.step)
        totals = self._forward(batch, backward=True)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, run.optim.grad_clip)
        skipped = (~torch.isfinite(norm + totals[0])).float()
        set_learning_rate(self.optimizer, learning_rate(self.step, run.optim, run.train.num_steps))
        # The fused kernel leaves everything as it is when this flag is 1, without asking the host.
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepResult(totals[0], totals[1], totals[2], norm.detach(), skipped)

    @torch.no_grad()
    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a batch with dropout off."""
        self.model.eval()
        totals = self._forward(batch, backward=False)
        zero = torch.zeros_like(totals[0])
        return StepResult(totals[0], totals[1], totals[2], zero, zero)

    def _forward(self, batch: PairBatch, *, backward: bool) -> Tensor:
        """Sums of (loss, image_ce, text_ce) over micro-batches: float32 [3]."""
        batch = batch.to(self.device)
        targets = build_targets(batch, self.model.spec)
        counts = TokenCounts.of(targets, self.model.spec.num_image_tokens)
        pieces = self.run.parallel.num_microbatches if backward else 1
        size = -(-len(batch) // pieces)
        totals = torch.zeros(3, device=self.device)
        for start in range(0, len(batch), size):
            piece = batch.slice(start, start + size)
            text_ids, image_ids, text_len = piece.rows()
            with self._autocast():
                image, text = self.model(
                    text_ids, image_ids, text_len=text_len, targets=targets[start : start + size], loss=self.run.loss
                )
            result = weighted_loss(image, text, counts, self.run.loss)
            if backward:
                result.loss.backward()
            totals += torch.stack([result.loss.detach(), result.image_ce, result.text_ce])
        return totals

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.run.train.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optimizer": {slot: {name: tensor}}}``, the live tensors themselves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.model.named_parameters()),
        }

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        self.step = step

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names (those of ``ViLG``) and whole tensors."""
        yield from self.model.state_dict().items()
