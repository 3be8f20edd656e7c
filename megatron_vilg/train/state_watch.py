"""Looks at hidden states while a model runs, in whatever layout: attention logits, the last block's size, log Z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from megatron_vilg.models.layers import Block
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import prepare
from megatron_vilg.ops.cross_entropy import IGNORE
from megatron_vilg.parallel.mesh import Mesh

_HEADS = {"image": "text_to_image", "text": "image_to_text"}


class StateWatch:
    """A context in which forward passes with targets are watched; pairs without labels are left out of all means.

    Args:
        parts: this rank's parts of the model, of which all ranks watch theirs.
        mesh: the grid of ranks.
    """

    def __init__(self, parts: Sequence[ViLG], mesh: Mesh) -> None:
        self._parts, self._mesh = parts, mesh
        self._handles: list[Any] = []
        self._logits: dict[int, Tensor] = {}
        self._sums = torch.zeros(3, 2, device=mesh.device)
        """Sum and number: squares of the last block's outputs that predict a token, log Z of images, and of texts."""
        self._text_len = torch.zeros(0)
        self._labels = torch.zeros(0)
        self._in_block: set[int] = set()

    def __enter__(self) -> Self:
        for part in self._parts:
            self._handles.append(part.register_forward_pre_hook(self._note_batch, with_kwargs=True))
            for name, block in part.blocks.items():
                self._watch_block(part, int(name), cast(Block, block))
            if part.norm is not None and part.heads is not None:
                *_, last = part.blocks.values()
                self._handles.append(last.register_forward_hook(self._size_hook(part)))
                for place, name in enumerate(_HEADS):
                    hook = self._log_z_hook(1 + place)
                    self._handles.append(part.heads[name].register_forward_pre_hook(hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def read(self, num_layers: int) -> dict[str, float]:
        """What was seen, by metric name; the same on all ranks, which all must ask."""
        logits = torch.full((num_layers,), float("-inf"), device=self._mesh.device)
        for layer, value in self._logits.items():
            logits[layer] = value
        largest = self._mesh.max(logits, ("tp", "pp")).tolist()
        sums, counts = self._mesh.sum(self._sums, ("pp",)).unbind(1)
        squares, *log_z = (sums / counts).tolist()
        found = {f"attention/max_logit(layer {layer})": value for layer, value in enumerate(largest)}
        found["hidden/last_rms"] = squares**0.5
        return found | {f"log_z({name})": value for name, value in zip(_HEADS.values(), log_z, strict=True)}

    def _note_batch(self, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._text_len, self._labels = options["text_len"], options["targets"]

    def _watch_block(self, part: ViLG, layer: int, block: Block) -> None:
        """Attention is looked at inside the block's own call only, not where a backward pass computes it again: the
        next micro-batch may have begun by then."""
        rule = part.rule(part.patterns[layer])

        @torch.no_grad()
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if layer not in self._in_block:
                return
            q, k, _v = block.attention.project(inputs[0])
            bias = prepare(rule, self._text_len, "dense", None, torch.float32).bias
            assert bias is not None
            for row in range(len(q)):  # one by one: scores of all rows would be by far the largest tensor of a run
                scores = torch.einsum("qah,kah->aqk", q[row].float(), k[row].float()) * q.shape[-1] ** -0.5
                top = (scores + bias[row]).amax()
                self._logits[layer] = torch.maximum(self._logits.get(layer, top), top)

        def enter(*_: Any) -> None:
            self._in_block.add(layer)

        def leave(*_: Any) -> None:
            self._in_block.discard(layer)

        self._handles += [
            block.register_forward_pre_hook(enter),
            block.attention.register_forward_pre_hook(look),
            block.register_forward_hook(leave),
        ]

    def _size_hook(self, part: ViLG) -> Callable[[nn.Module, Any, Tensor], None]:
        """For outputs of the last block, [2P, T, D] or the predicted ones alone: those that have a label."""

        @torch.no_grad()
        def look(_: nn.Module, inputs: Any, hidden: Tensor) -> None:
            predicted = hidden if hidden.ndim == 2 else part.predicted(hidden)
            by_direction = self._labels.tensor_split([part.spec.num_image_tokens], dim=1)
            labels = torch.cat([each.flatten() for each in by_direction])
            self._add(0, predicted[labels != IGNORE].float().square())

        return look

    def _log_z_hook(self, place: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @torch.no_grad()
        def look(head: nn.Module, inputs: tuple[Any, ...]) -> None:
            states, labels = inputs[0], inputs[1]
            logits = head.forward(states).float()  # with tensor parallelism this rank's share of the vocabulary
            top = self._mesh.max(logits.amax(-1), ("tp",))
            below = self._mesh.sum((logits - top[..., None]).exp().sum(-1), ("tp",))
            self._add(place, (top + below.log())[labels != IGNORE])

        return look

    def _add(self, place: int, values: Tensor) -> None:
        self._sums[place] += torch.stack([values.sum(), torch.tensor(float(values.numel()), device=values.device)])
