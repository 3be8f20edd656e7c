"""What shows an instability before the loss does: attention logits, last-layer size, log Z, gradients per loss term.

Chameleon (section 2.3) saw the norm of the last layer's output grow long before its loss diverged; growing attention
logits and a growing log Z are the mechanisms that QK norm and z-loss are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.data.batch import IGNORE, PairBatch, build_targets
from megatron_vilg.models.layers import Block
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import prepare
from megatron_vilg.sequence import Direction

PAIRS = 4
"""Pairs of a batch that are looked at."""
_TERMS = ("text_to_image", "image_to_text", "reconstruction")


class Instruments:
    """Looks at a whole model on one process, on the first pairs of a batch; changes nothing.

    Costs one forward pass and one backward pass per loss term on :data:`PAIRS` pairs, and a copy of the weights for
    the step in between.
    """

    def __init__(self, model: ViLG) -> None:
        self._model = model
        self._before: dict[str, Tensor] = {}

    def before(self, batch: PairBatch) -> dict[str, float]:
        """Everything but the update: call before the training step on the same batch.

        Returns:
            By metric name: largest attention logit of each layer, root mean square of the last block's output, mean
            log Z of both heads, gradient norm of each loss term over the generator (not weighted), and the cosine
            between the gradients of generation and reconstruction.
        """
        self._before = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        model, was_training = self._model, self._model.training
        helpers = None if model.reconstructor is None else model.reconstructor.helpers
        critic = None if helpers is None else helpers.critic
        if helpers is not None:
            helpers.critic = None  # it would keep these pictures to learn from
        model.eval()
        try:
            return self._probe(batch.slice(0, PAIRS).to(next(model.parameters()).device))
        finally:
            model.train(was_training)
            if helpers is not None:
                helpers.critic = critic

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Size of the last step's update over size of the weights, by part; call after the training step."""
        squares: dict[str, Tensor] = {}
        for name, parameter in self._model.named_parameters():
            old = self._before[name]
            part = name.split(".")[0]
            both = torch.stack([(parameter - old).float().square().sum(), old.float().square().sum()])
            squares[part] = squares.get(part, torch.zeros_like(both)) + both
        self._before = {}
        return {f"update/weight({part})": float((u / w.clamp(min=1e-20)).sqrt()) for part, (u, w) in squares.items()}

    def _probe(self, batch: PairBatch) -> dict[str, float]:
        model = self._model
        assert model.embed is not None and model.norm is not None and model.heads is not None
        text_ids, image_ids, text_len = batch.rows()
        rows = [model.embed(text_ids[d::2], image_ids[d::2], d) for d in Direction]
        with _attention_logits(model, text_len) as logits:
            x = model.run_blocks(torch.stack(rows, dim=1).flatten(0, 1), text_len)
        found = {f"attention/max_logit(layer {layer})": value for layer, value in logits.items()}
        found["hidden/last_rms"] = float(x.detach().float().square().mean().sqrt())
        targets = build_targets(batch, model.spec)
        split = model.spec.num_image_tokens
        losses: list[Tensor] = []
        for direction, name in ((Direction.TEXT_TO_IMAGE, "image"), (Direction.IMAGE_TO_TEXT, "text")):
            states = model.norm(x[direction::2, model.spec.target_slice(direction)])
            scores = cast(Tensor, model.heads[name](states)).float()
            labels = targets[:, :split] if name == "image" else targets[:, split:]
            losses.append(F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE))
            log_z = torch.logsumexp(scores.detach(), dim=-1)[labels != IGNORE]
            found[f"log_z({_TERMS[direction]})"] = float(log_z.mean())
        if model.reconstructor is not None and batch.pixels is not None:
            ids = targets[:, :split]
            losses.append(model.reconstructor(model.image_states(x[0::2]), batch.pixels, ids)[:, 0].mean())
        return found | self._gradients(losses)

    def _gradients(self, losses: list[Tensor]) -> dict[str, float]:
        generator = [p for name, p in self._model.named_parameters() if not name.startswith("reconstructor.")]
        found: dict[str, float] = {}
        generation: list[Tensor] = []
        for name, loss in zip(_TERMS, losses, strict=False):
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, generator, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, generator, strict=True)]
            norm = _norm(filled)
            found[f"gradient({name})"] = float(norm)
            if name == "reconstruction":
                dot = sum((a * b).sum() for a, b in zip(generation, filled, strict=True))
                found["gradient/cosine(generation, reconstruction)"] = float(
                    dot / (norm * _norm(generation)).clamp(min=1e-20)
                )
            else:
                generation = [a + b for a, b in zip(generation, filled, strict=True)] if generation else filled
        return found


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).norm()


@contextmanager
def _attention_logits(model: ViLG, text_len: Tensor) -> Iterator[dict[str, float]]:
    """Fills the largest allowed score of each layer while the blocks run."""
    found: dict[str, float] = {}
    handles = []

    def watch(layer: str, block: Block) -> Any:
        prepared = prepare(model.rule(model.patterns[int(layer)]), text_len, "dense", None, torch.float32)

        @torch.no_grad()
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            q, k, _v = block.attention.project(inputs[0])
            scores = torch.einsum("bqah,bkah->baqk", q.float(), k.float()) * q.shape[-1] ** -0.5
            assert prepared.bias is not None
            found[layer] = float((scores + prepared.bias).amax())

        return block.attention.register_forward_pre_hook(hook)

    try:
        for layer, block in model.blocks.items():
            handles.append(watch(layer, cast(Block, block)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
