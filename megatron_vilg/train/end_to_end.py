"""Training generator and reconstructor together: one forward pass gives cross-entropies and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import OptimConfig, RunConfig
from megatron_vilg.data.batch import PairBatch, build_targets
from megatron_vilg.log import get_logger
from megatron_vilg.models.critics import CriticGate, PatchCritic, critic_loss
from megatron_vilg.models.features import load_feature_network
from megatron_vilg.models.reconstructor import Helpers, Reconstructor
from megatron_vilg.models.tokenizers import AnyTokenizer
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.train.engine import NativeEngine, StepResult
from megatron_vilg.train.losses import TokenCounts, weighted_loss
from megatron_vilg.train.optim import build_optimizer, learning_rate, optimizer_state, set_learning_rate
from megatron_vilg.train.weight_average import WeightAverage

log = get_logger(__name__)

PREFIX = "reconstructor."


class EndToEndEngine(NativeEngine):
    """The native engine with a reconstructor on the last hidden states.

    Generator and reconstructor have an optimizer, a clipping norm and a learning rate each. The critic, if there is
    one, is trained on the pictures that the step decoded, and is neither exported nor part of the model.

    Args:
        run: resolved configuration with ``reconstructor.enabled``.
        device: where everything lives.
        tokenizer: the frozen image tokenizer; gives the codebook and the decoder's first weights.
    """

    def __init__(self, run: RunConfig, device: torch.device | str, tokenizer: AnyTokenizer) -> None:
        super().__init__(run, device, tokenizer.codebook)
        self.device = self.mesh.device
        options = run.reconstructor
        part = Reconstructor(options, run.model, run.image_tokenizer)
        named = nn.ModuleDict({"reconstructor": part})  # weights follow from their names in the whole model
        init_weights(named, seed=run.train.seed, std=run.model.init_std, num_layers=run.model.num_layers)
        if options.decoder_start == "tokenizer":
            part.decoder.load_state_dict(tokenizer.decoder.state_dict())
        part.to(self.device)
        part.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.part = part
        self._rates = _rates_of(run.optim, options.lr_share * run.optim.lr, options.grad_clip)
        self.part_optimizer = build_optimizer(list(self._named_part()), self._rates, self.device)
        self.average = WeightAverage(part, options.ema_decay) if options.ema_decay else None
        self._build_helpers(tokenizer)
        self.model.reconstructor = part

    def _build_helpers(self, tokenizer: AnyTokenizer) -> None:
        run, options = self.run, self.run.reconstructor
        self.helpers: Helpers = self.part.helpers
        self.helpers.codebook = tokenizer.codebook.to(self.device)
        if options.perceptual_weight:
            network = load_feature_network(run.image_tokenizer_train.perceptual_network)
            self.helpers.network = network.to(self.device)
        self.critic: PatchCritic | None = None
        self.gate = CriticGate(start_step=options.critic_start_step, threshold=options.critic_gate).to(self.device)
        if options.critic_weight:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(run.train.seed + 1)
                self.critic = PatchCritic(options.critic_channels).to(self.device)
            self._critic_rates = _rates_of(run.optim, options.critic_lr, options.grad_clip)
            self.critic_optimizer = build_optimizer(self.critic.named_parameters(), self._critic_rates, self.device)

    def _named_part(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((PREFIX + name, parameter) for name, parameter in self.part.named_parameters())

    def train_step(self, batch: PairBatch) -> StepResult:
        """One step of both parts, and of the critic; one that is not finite changes nothing."""
        run, options = self.run, self.run.reconstructor
        self.model.train()
        if run.model.dropout > 0.0:
            torch.manual_seed(run.train.seed * 1_000_003 + self.step)
        self.helpers.warming = self.step < options.warmup_steps
        totals = self._forward(batch, backward=True)
        of_generator = [p for name, p in self.model.named_parameters() if not name.startswith(PREFIX)]
        norm = nn.utils.clip_grad_norm_([p for p in of_generator if p.grad is not None], run.optim.grad_clip)
        part_norm = nn.utils.clip_grad_norm_(
            [p for p in self.part.parameters() if p.grad is not None], options.grad_clip
        )
        skipped = (~torch.isfinite(norm + part_norm + totals[0])).float()
        rate = learning_rate(self.step, run.optim, run.train.num_steps)
        # In the warm-up the generator keeps still: with a rate of 0 neither gradient nor decay moves it.
        set_learning_rate(self.optimizer, 0.0 if self.helpers.warming else rate)
        set_learning_rate(self.part_optimizer, rate * options.lr_share)
        for optimizer in (self.optimizer, self.part_optimizer):
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        extra = self._reports(totals) | {"grad_norm/reconstructor": part_norm.detach()}
        accepted = not bool(skipped) if self.average is not None or self.critic is not None else True
        if accepted and self.average is not None:
            self.average.update(self.part)
        if self.critic is not None:
            extra |= self._train_critic(batch, totals, accepted)
        self.step += 1
        return StepResult(totals[0], totals[1], totals[2], norm.detach(), skipped, extra)

    @torch.no_grad()
    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a batch with dropout off."""
        self.model.eval()
        self.helpers.warming = False
        totals = self._forward(batch, backward=False)
        zero = torch.zeros_like(totals[0])
        return StepResult(totals[0], totals[1], totals[2], zero, zero, self._reports(totals))

    def _forward(self, batch: PairBatch, *, backward: bool) -> Tensor:
        """Sums of (loss, image_ce, text_ce, reconstruction, pixel error, code distance) over micro-batches."""
        if batch.pixels is None:
            raise ValueError("an end-to-end run needs batches with pixels; give the loader a PixelCache")
        batch = batch.to(self.device)
        targets = build_targets(batch, self.run.model.spec)
        counts = TokenCounts.of(targets, self.run.model.spec.num_image_tokens)
        pieces = self.run.parallel.num_microbatches if backward else 1
        size = -(-len(batch) // pieces)
        totals = torch.zeros(6, device=self.device)
        generation_weight = 0.0 if self.helpers.warming else 1.0
        for start in range(0, len(batch), size):
            piece = batch.slice(start, start + size)
            text_ids, image_ids, text_len = piece.rows()
            with self._autocast():
                image, text, figures = self.model(
                    text_ids,
                    image_ids,
                    text_len=text_len,
                    targets=targets[start : start + size],
                    loss=self.run.loss,
                    pixels=piece.pixels,
                )
            result = weighted_loss(image, text, counts, self.run.loss)
            figures = figures.sum(0) / len(batch)
            loss = generation_weight * result.loss + self.run.reconstructor.weight * figures[0]
            if backward:
                loss.backward()
            totals += torch.cat([torch.stack([loss, result.image_ce, result.text_ce]), figures]).detach()
        return totals

    def _reports(self, totals: Tensor) -> dict[str, Tensor]:
        name = "nats" if self.part.loss == "logit_laplace" else "l1"
        return {
            f"loss/reconstruction({name})": totals[3],
            "reconstruction/pixel_error(0..1)": 0.5 * totals[4],
            "reconstruction/code_distance": totals[5],
        }

    def _train_critic(self, batch: PairBatch, totals: Tensor, accepted: bool) -> dict[str, Tensor]:
        """Let the critic learn from this step's pictures, and decide whether it works in the next."""
        assert self.critic is not None and batch.pixels is not None
        extra = {"critic/open(0-1)": self.gate.is_open.float()}
        if self.helpers.pictures and accepted:
            fake = torch.cat(self.helpers.pictures)
            real = batch.pixels.to(self.device).float() / 127.5 - 1.0
            with self._autocast():
                loss = critic_loss(self.critic(real), self.critic(fake))
            self.critic_optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self._critic_rates.grad_clip)
            if bool(torch.isfinite(norm)):
                rate = learning_rate(self.step, self._critic_rates, self.run.train.num_steps)
                set_learning_rate(self.critic_optimizer, rate)
                self.critic_optimizer.step()
            extra |= {"loss/critic": loss.detach()}
        self.helpers.pictures.clear()
        if accepted and not self.helpers.warming:
            works = self.gate.update(self.step, 0.5 * totals[4])
            self.helpers.critic = self.critic if works else None
        return extra

    def state_dict(self) -> dict[str, Any]:
        """As the native engine's, with the reconstructor's optimizer, averages, gate and critic."""
        state = super().state_dict()
        state["reconstructor_optimizer"] = optimizer_state(self.part_optimizer, self._named_part())
        state["gate"] = self.gate.state_dict()
        if self.average is not None:
            state["reconstructor_average"] = self.average.state_dict()
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = optimizer_state(self.critic_optimizer, self.critic.named_parameters())
        return state

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        super().resume(step)
        self.helpers.critic = self.critic if bool(self.gate.is_open) else None

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole tensors; of the reconstructor the averaged ones, where there are any."""
        averaged = {} if self.average is None else self.average.named()
        for name, value in super().export():
            yield name, averaged.get(name.removeprefix(PREFIX), value) if name.startswith(PREFIX) else value


def _rates_of(optim: OptimConfig, lr: float, grad_clip: float) -> OptimConfig:
    return dataclasses.replace(optim, lr=lr, grad_clip=grad_clip)
