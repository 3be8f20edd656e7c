"""The critic beside the generator: when it works, and how it learns from the pictures that a step decoded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.critics import CriticGate, PatchCritic, critic_loss
from megatron_vilg.models.reconstructor import Helpers
from megatron_vilg.parallel.batch_norm import share_batch_norms
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh
from megatron_vilg.parallel.replicas import average_together
from megatron_vilg.train.optim import (
    build_optimizer,
    learning_rate,
    optimizer_state,
    set_learning_rate,
    state_was_filled,
)

_REPORTED = ("loss/critic", "loss/adversarial", "critic/weight")


class JointCritic:
    """A PatchGAN critic whose gate is on every rank, and whose weights are on those of the last pipeline stage.

    Batch statistics, gradients and adaptive weight are those of the pictures of all data ranks. For the generator it
    judges each micro-batch on its own; it learns from all pictures of a step at once. So its weights are those of one
    process with the same micro-batches.

    Args:
        run: resolved configuration with ``reconstructor.critic_*``.
        mesh: the grid of ranks.
        helpers: of this rank's reconstructor, which is told when the critic works; None before the last stage.
    """

    def __init__(self, run: RunConfig, mesh: Mesh, helpers: Helpers | None) -> None:
        options = run.reconstructor
        self._run, self._mesh, self._helpers = run, mesh, helpers
        self.gate = CriticGate(start_step=options.critic_start_step, threshold=options.critic_gate).to(mesh.device)
        self.works = False
        """Whether the next step's pictures are judged."""
        self.critic: PatchCritic | None = None
        if helpers is None or not options.critic_weight:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((run.train.seed + 1) % 2**64)
            self.critic = PatchCritic(options.critic_channels).to(mesh.device)
        share_batch_norms(self.critic, mesh)
        helpers.mean = mesh.data_mean if mesh.data_size > 1 else None
        self._rates = dataclasses.replace(run.optim, lr=options.critic_lr, grad_clip=options.grad_clip)
        self._optimizer = build_optimizer(self.critic.named_parameters(), self._rates, mesh.device)

    def after_step(
        self, pixels: Tensor, pixel_error: Tensor, step: int, *, accepted: bool, warming: bool
    ) -> dict[str, Tensor]:
        """Learn from a step's pictures, and decide whether the critic works in the next; all ranks make this call.

        Args:
            pixels: uint8 [P, 3, S, S], this data rank's true pictures.
            pixel_error: 0-dim, mean absolute error of the whole step, for pixels from 0 to 1.
            step: number of the step, from 0.
            accepted: whether the step was finite and changed the weights.
            warming: whether only the mapping learnt, and nothing was decoded.

        Returns:
            What to report by metric name, the same on all ranks.
        """
        found = {"critic/open(0-1)": self.gate.is_open.float()}
        if self.works and accepted and not warming:
            numbers = torch.zeros(len(_REPORTED), device=self._mesh.device)
            if self.critic is not None:
                numbers = self._learn(self.critic, pixels, step)
            numbers = self._mesh.sum(numbers, (*DATA_AXES, "pp")) / self._mesh.data_size
            found |= dict(zip(_REPORTED, numbers.unbind(), strict=True))
        if self._helpers is not None:
            self._helpers.forget()
        if accepted and not warming:
            self._let_work(self.gate.update(step, pixel_error))
        return found

    def _learn(self, critic: PatchCritic, pixels: Tensor, step: int) -> Tensor:
        """One step of the critic; what is reported, of this rank's pictures: float32 [3]."""
        assert self._helpers is not None
        real = pixels.to(self._mesh.device).float() / 127.5 - 1.0
        with torch.autocast(self._mesh.device.type, torch.bfloat16, enabled=self._run.train.precision == "bf16"):
            loss = critic_loss(critic(real), critic(torch.cat(self._helpers.pictures)))
        self._optimizer.zero_grad()
        loss.backward()
        if self._mesh.has_copies:
            average_together([p.grad for p in critic.parameters() if p.grad is not None], self._mesh.copies_mean)
        norm = nn.utils.clip_grad_norm_(critic.parameters(), self._rates.grad_clip)
        if bool(torch.isfinite(norm)):
            set_learning_rate(self._optimizer, learning_rate(step, self._rates, self._run.train.num_steps))
            self._optimizer.step()
        return torch.cat([loss.detach()[None], torch.stack(self._helpers.adversarial).mean(0)])

    def _let_work(self, works: bool) -> None:
        self.works = works
        if self._helpers is not None:
            self._helpers.critic = self.critic if works else None

    def state_dict(self) -> dict[str, Any]:
        """The tensors that a checkpoint keeps: the gate, and on the last stage the critic and its optimizer."""
        state: dict[str, Any] = {"gate": self.gate.state_dict()}
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = optimizer_state(self._optimizer, self.critic.named_parameters())
        return state

    def resume(self) -> None:
        """Go on from the state that was filled in place."""
        if self.critic is not None:
            state_was_filled(self._optimizer)
        self._let_work(bool(self._run.reconstructor.critic_weight) and bool(self.gate.is_open))
