"""Training generator and reconstructor together: one forward pass gives cross-entropies and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import OptimConfig, RunConfig
from megatron_vilg.data.batch import PairBatch, build_targets
from megatron_vilg.models.channels_last import to_channels_last
from megatron_vilg.models.features import load_feature_network
from megatron_vilg.models.reconstructor import FIGURES, Helpers, Reconstructor, pixel_loss_of
from megatron_vilg.models.tokenizers import AnyTokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.clip import clip_gradients
from megatron_vilg.parallel.gather import whole_tensors
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh
from megatron_vilg.parallel.replicas import average_together
from megatron_vilg.train.engine import NativeEngine, StepResult
from megatron_vilg.train.joint_critic import JointCritic
from megatron_vilg.train.losses import TokenCounts, weighted_loss
from megatron_vilg.train.optim import (
    build_optimizer,
    learning_rate,
    optimizer_state,
    set_learning_rate,
    state_was_filled,
    update,
)
from megatron_vilg.train.weight_average import WeightAverage

PREFIX = "reconstructor."


class EndToEndEngine(NativeEngine):
    """The native engine with a reconstructor on the last hidden states.

    Generator and reconstructor have an optimizer, a clipping norm and a learning rate each. The reconstructor lives on
    the ranks of the last pipeline stage. It is small, so each of them holds it whole, and its gradients are averaged
    over the data ranks; ranks of ``tp`` all compute the same, and take the gradients of their first one.

    The critic, if there is one, is trained on the pictures that the step decoded, and is neither exported nor part of
    the model.

    Args:
        run: resolved configuration with ``reconstructor.enabled``, checked for the number of processes.
        mesh: the grid of ranks, or the device of a single process.
        tokenizer: the frozen image tokenizer; gives the codebook and the decoder's first weights.
    """

    num_totals = 3 + len(FIGURES)

    def __init__(self, run: RunConfig, mesh: Mesh | torch.device | str, tokenizer: AnyTokenizer) -> None:
        super().__init__(run, mesh, tokenizer.codebook)
        self.device = self.mesh.device
        self.part: Reconstructor | None = None
        self.average: WeightAverage | None = None
        self._rates = _rates_of(run.optim, run.reconstructor.lr_share * run.optim.lr, run.reconstructor.grad_clip)
        if self.parts[-1].norm is not None:
            self._build_part(self.parts[-1], tokenizer)
        self.critic = JointCritic(run, self.mesh, None if self.part is None else self.part.helpers)
        self._set_warming(self._next_warms)

    def _build_part(self, last: ViLG, tokenizer: AnyTokenizer) -> None:
        run, options = self.run, self.run.reconstructor
        part = Reconstructor(options, run.model, run.image_tokenizer)
        named = nn.ModuleDict({"reconstructor": part})  # weights follow from their names in the whole model
        init_weights(named, seed=run.train.seed, std=run.model.init_std, num_layers=run.model.num_layers)
        if options.decoder_start == "tokenizer":
            part.decoder.load_state_dict(tokenizer.decoder.state_dict())
        part.to(self.device)
        to_channels_last(part.decoder)
        self.part = last.reconstructor = part
        self.part_optimizer = build_optimizer(list(self._named_part()), self._rates, self.device)
        self.average = WeightAverage(part, options.ema_decay) if options.ema_decay else None
        self.helpers: Helpers = part.helpers
        self.helpers.codebook = tokenizer.codebook.to(self.device)
        if options.perceptual_weight:
            network = load_feature_network(run.image_tokenizer_train.perceptual_network)
            self.helpers.network = network.to(self.device)

    def _named_part(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self.part is not None
        return ((PREFIX + name, parameter) for name, parameter in self.part.named_parameters())

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters of this rank's parts of the generator, without the reconstructor's."""
        return [named for named in super().named_parameters() if not named[0].startswith(PREFIX)]

    def train_step(self, batch: PairBatch) -> StepResult:
        """One step of both parts, and of the critic; one that is not finite changes nothing."""
        run = self.run
        self._set_mode(training=True)
        batch = batch.to(self.device)
        targets = build_targets(batch, run.model.spec)
        self._counts = TokenCounts.of(targets, run.model.spec.num_image_tokens).summed(self.mesh)
        totals = self.mesh.sum(self._run_micro_batches(batch, targets, backward=True), (*DATA_AXES, "pp"))
        totals = self.mesh.same(totals, "tp")  # the gate opens on all ranks or on none
        norm = clip_gradients((p for _, p in self.named_parameters()), run.optim.grad_clip, self.mesh)
        part_norm = self._clip_part()
        skipped = (~torch.isfinite(norm + part_norm + totals[0])).float()
        self._update(skipped)
        extra = self._reports(totals) | {"grad_norm/reconstructor": part_norm}
        judged = bool(run.reconstructor.critic_weight)
        accepted = not bool(skipped) if self.average is not None or judged else True
        if accepted and self.average is not None and self.part is not None:
            self.average.update(self.part)
        if judged:
            assert batch.pixels is not None
            now = {"accepted": accepted, "warming": self.warming}
            extra |= self.critic.after_step(batch.pixels, 0.5 * totals[4], self.step, **now)
        self.step += 1
        self._set_warming(self._next_warms)
        return StepResult(totals[0], totals[1], totals[2], norm.detach(), skipped, extra)

    def eval_step(self, batch: PairBatch) -> StepResult:
        """Losses of a batch with dropout off."""
        self._set_warming(False)
        try:
            return super().eval_step(batch)
        finally:
            self._set_warming(self._next_warms)

    @property
    def _next_warms(self) -> bool:
        """Whether the next step is one of the warm-up."""
        return self.step < self.run.reconstructor.warmup_steps

    def _set_warming(self, warming: bool) -> None:
        """Between two calls this is as the next step needs it: instruments look at the model then."""
        self.warming = warming
        if self.part is not None:
            self.helpers.warming = warming

    def _clip_part(self) -> Tensor:
        """Average the reconstructor's gradients over its copies, clip them; their norm before, on all ranks."""
        norm = torch.zeros((), device=self.device)
        if self.part is not None:
            gradients = [p.grad for p in self.part.parameters() if p.grad is not None]
            if self.mesh.has_copies:
                average_together(gradients, self.mesh.copies_mean)
            with_grad = [p for p in self.part.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(with_grad, self._rates.grad_clip).detach()
        return self.mesh.sum(norm, ("pp",))

    def _update(self, skipped: Tensor) -> None:
        run = self.run
        rate = learning_rate(self.step, run.optim, run.train.num_steps)
        # In the warm-up the generator keeps still, its moments too: updates with no gradient would count as steps, and
        # the first real ones would find averages near zero and no correction for that.
        still = torch.ones_like(skipped) if self.warming else skipped
        steps = [(self.optimizer, rate, still.to(self._home))]
        if self.part is not None:
            steps.append((self.part_optimizer, rate * run.reconstructor.lr_share, skipped.to(self.device)))
        for optimizer, lr, leave_out in steps:
            set_learning_rate(optimizer, lr)
            update(optimizer, leave_out)
            optimizer.zero_grad()

    def _more_inputs(self, batch: PairBatch) -> dict[str, Tensor]:
        if batch.pixels is None:
            raise ValueError("an end-to-end run needs batches with pixels; give the loader a PixelCache")
        return {"pixels": batch.pixels}

    def _loss_of(self, result: Any) -> tuple[Tensor, Tensor]:
        """As the native engine's, and the reconstructor's figures [P, 3] as means over the pairs of the whole step."""
        image, text, figures = result
        pair = weighted_loss(image, text, self._counts, self.run.loss)
        pairs = torch.as_tensor(self._counts.image) // self.run.model.spec.num_image_tokens
        sums = figures.sum(0) / pairs.clamp(min=1)
        loss = (0.0 if self.warming else 1.0) * pair.loss + self.run.reconstructor.weight * sums[0]
        numbers = torch.cat([torch.stack([loss, pair.image_ce, pair.text_ce]), sums]).detach()
        return loss * self.mesh.data_size, numbers

    def _reports(self, totals: Tensor) -> dict[str, Tensor]:
        name = "nats" if pixel_loss_of(self.run.reconstructor, self.run.image_tokenizer) == "logit_laplace" else "l1"
        return {
            f"loss/reconstruction({name})": totals[3],
            "reconstruction/pixel_error(0..1)": 0.5 * totals[4],
            "reconstruction/code_distance": totals[5],
        }

    def state_dict(self) -> dict[str, Any]:
        """As the native engine's, with the reconstructor's optimizer, averages, gate and critic."""
        state = super().state_dict() | self.critic.state_dict()
        if self.part is None:
            return state
        state["reconstructor_optimizer"] = optimizer_state(self.part_optimizer, self._named_part())
        if self.average is not None:
            state["reconstructor_average"] = self.average.state_dict()
        return state

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps, once the tensors of ``state_dict`` have been filled in place."""
        super().resume(step)
        self._set_warming(self._next_warms)
        if self.part is not None:
            state_was_filled(self.part_optimizer)
        self.critic.resume()

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical names and whole tensors; of the reconstructor the averaged ones, where there are any."""
        state = dict(self.state_dict()["model"])
        if self.average is not None:
            state |= {PREFIX + name: value for name, value in self.average.named().items()}
        names = {name: (tensor.shape, tensor.dtype) for name, tensor in self._empty_model().state_dict().items()}
        yield from whole_tensors(state, names, self.mesh)

    @property
    def _exports_live_weights(self) -> bool:
        return self.average is None

    def _empty_model(self) -> ViLG:
        model = super()._empty_model()
        with torch.device("meta"):
            model.reconstructor = Reconstructor(self.run.reconstructor, self.run.model, self.run.image_tokenizer)
        return model


def _rates_of(optim: OptimConfig, lr: float, grad_clip: float) -> OptimConfig:
    return dataclasses.replace(optim, lr=lr, grad_clip=grad_clip)
