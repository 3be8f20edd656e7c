"""What shows an instability before the loss does: attention logits, last-layer size, log Z, gradients per loss term.

Chameleon (section 2.3) saw the norm of the last layer's output grow long before its loss diverged; growing attention
logits and a growing log Z are the mechanisms that QK norm and z-loss are for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import LossConfig
from megatron_vilg.data.batch import IGNORE, PairBatch, build_targets
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.clip import COUNTED_AXES, counts_here, local_part
from megatron_vilg.parallel.mesh import DATA_AXES, Mesh
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.losses import TokenCounts
from megatron_vilg.train.passes import Passes
from megatron_vilg.train.state_watch import StateWatch

PAIRS = 4
"""Pairs of a batch that are looked at."""
_TERMS = ("text_to_image", "image_to_text", "reconstruction")
_PARTS = ("embed", "blocks", "norm", "heads", "reconstructor")


class Instruments:
    """Looks at the first pairs of a batch in the layout of an engine; changes nothing. All ranks make the same calls.

    Every data rank takes the same pairs, so that gradients averaged over them are those of these pairs. Costs one
    forward and one backward pass per loss term on :data:`PAIRS` pairs (on a multiple of the pipeline's stages), and a
    copy of this rank's weights for the step in between. Numbers are those of the run's precision, without dropout.
    """

    def __init__(self, engine: NativeEngine) -> None:
        self._engine, run = engine, engine.run
        self._pieces = run.parallel.pipeline
        self._count = min(PAIRS, run.train.batch_size)
        self._padded = -(-self._count // self._pieces) * self._pieces
        probe = dataclasses.replace(
            run,
            loss=LossConfig(),  # bare cross-entropies
            train=dataclasses.replace(run.train, batch_size=self._padded * engine.mesh.data_size),
            parallel=dataclasses.replace(run.parallel, num_microbatches=self._pieces),
        )
        self._passes = Passes(probe, engine.mesh, engine.parts, self._loss_of, 1)
        self._counts = TokenCounts(1, 1)
        self._term = 0
        self._before: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether the step with this number, counted from 1, is looked at."""
        every = self._engine.run.log.instruments_every
        return bool(every) and step % every == 0

    def before(self, batch: PairBatch) -> dict[str, float]:
        """Everything but the update: call before the training step on the same batch (this data rank's share).

        Returns:
            By metric name: largest attention logit of each layer, root mean square of the last block's output, mean
            log Z of both heads, gradient norm of each loss term over the generator (not weighted), and the cosine
            between the gradients of generation and reconstruction. The same on all ranks.
        """
        engine = self._engine
        self._before = {name: local_part(p).detach().clone() for name, p in self._parameters()}
        modes = [part.training for part in engine.parts]
        for part in engine.parts:
            part.eval()
        try:
            with _without_critic(engine.parts[-1]):
                return self._probe(first_pairs(batch.to(engine.mesh.device), self._count, engine.mesh))
        finally:
            for part, mode in zip(engine.parts, modes, strict=True):
                part.train(mode)

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Size of the last step's update over size of the weights, by part; call after the training step."""
        mesh = self._engine.mesh
        squares = torch.zeros(len(_PARTS), 2, device=mesh.device)
        for name, parameter in self._parameters():
            if counts_here(parameter, mesh):
                old, new = self._before[name], local_part(parameter)
                both = torch.stack([(new - old).float().square().sum(), old.float().square().sum()])
                squares[_PARTS.index(name.split(".")[0])] += both.to(mesh.device)
        self._before = {}
        updates, weights = mesh.sum(squares, COUNTED_AXES).sqrt().unbind(1)
        ratios = (updates / weights.clamp(min=1e-10)).tolist()
        return {f"update/weight({part})": r for part, r, w in zip(_PARTS, ratios, weights, strict=True) if w > 0}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [named for part in self._engine.parts for named in part.named_parameters()]

    def _probe(self, batch: PairBatch) -> dict[str, float]:
        """One pass per term; the states are looked at in the first."""
        engine, spec = self._engine, self._engine.run.model.spec
        places = torch.arange(self._padded, device=engine.mesh.device)
        targets = build_targets(batch, spec)
        self._counts = TokenCounts.of(targets, spec.num_image_tokens)
        batch = batch.take(places.clamp(max=self._count - 1))
        targets = targets[places.clamp(max=self._count - 1)].masked_fill((places >= self._count)[:, None], IGNORE)
        more = {} if batch.pixels is None else {"pixels": batch.pixels}
        found: dict[str, float] = {}
        norms: list[Tensor] = []
        generation: list[Tensor] = []
        for self._term in range(3 if more else 2):
            if self._term == 0:
                with StateWatch(engine.parts, engine.mesh) as watch:
                    self._passes.step(batch, targets, more, backward=True)
                found |= watch.read(engine.run.model.num_layers)
            else:
                self._passes.step(batch, targets, more, backward=True)
            gradients = self._take_gradients()
            norms.append(self._product(gradients, gradients).sqrt())
            if self._term == 2:
                cosine = self._product(generation, gradients)
                cosine = cosine / (norms[2] * self._product(generation, generation).sqrt()).clamp(min=1e-20)
                norms.append(cosine)
            elif self._term == 1:
                torch._foreach_add_(generation, gradients)
            else:
                generation = gradients
        names = [*(f"gradient({term})" for term in _TERMS), "gradient/cosine(generation, reconstruction)"]
        return found | dict(zip(names, torch.stack(norms).tolist(), strict=False))

    def _loss_of(self, result: Any) -> tuple[Tensor, Tensor]:
        """One term of a micro-batch, as a mean over all pairs that are looked at; the others with weight 0.

        They stay in the graph, so that every weight has a gradient and sharded ones are reduced alike in all passes.
        """
        image, text, *rest = result
        terms = [image[0] / self._counts.image, text[0] / self._counts.text]
        terms += [figures[:, 0].sum() / self._count for figures in rest]
        loss = torch.stack([float(place == self._term) * term for place, term in enumerate(terms)]).sum()
        return loss, loss.detach()[None]

    def _take_gradients(self) -> list[Tensor]:
        """This rank's parts of the generator's gradients, each value on one rank; all gradients are dropped."""
        taken = []
        for name, parameter in self._parameters():
            if not name.startswith("reconstructor.") and counts_here(parameter, self._engine.mesh):
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                taken.append(local_part(gradient).detach())
            parameter.grad = None
        return taken

    def _product(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """Inner product over all ranks, 0-dim."""
        mesh = self._engine.mesh
        own = torch.zeros((), device=mesh.device)
        for a, b in zip(left, right, strict=True):
            own += (a.float() * b.float()).sum().to(mesh.device)
        return mesh.sum(own, COUNTED_AXES)


def first_pairs(batch: PairBatch, count: int, mesh: Mesh) -> PairBatch:
    """The first pairs of the batch of all data ranks, on each of them; ``batch`` is this rank's share, in order."""

    def gathered(own: Tensor) -> Tensor:
        start = mesh.data_rank * len(own)
        part = own[: max(0, count - start)]
        whole = own.new_zeros(count, *own.shape[1:])
        whole[start : start + len(part)] = part
        return mesh.sum(whole, DATA_AXES)

    return batch.each(gathered)


@contextmanager
def _without_critic(last: ViLG) -> Iterator[None]:
    """It would keep the pictures to learn from."""
    helpers = None if last.reconstructor is None else last.reconstructor.helpers
    critic = None if helpers is None else helpers.critic
    if helpers is not None:
        helpers.critic = None
    try:
        yield
    finally:
        if helpers is not None:
            helpers.critic = critic
