"""Decoding steps that all look alike, so that a GPU can replay one recording of them.

``Decoder`` slices its caches by the position of the token, which is the fastest way on a CPU and different at every
step. Here the position is a tensor, and what depends on it (the slot to write, the slots to read, which of them count)
comes from tables. Reads are padded to the layer's largest: windows are read whole, a column or a convolution window
through its list of slots; what is not written yet is hidden by a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_vilg.generate.cache import CacheKind, CacheLayout
from megatron_vilg.generate.decode import Decoder, Prefix
from megatron_vilg.models.vilg import ViLG

WARM_UP_STEPS = 3
"""Steps before a recording: libraries choose their algorithms and take their workspaces in them."""


@dataclass(frozen=True, slots=True)
class StepTables:
    """A cache layout as tensors, one row per target token."""

    slot: Tensor
    """int64 [tokens]."""
    reads: Tensor | None
    """int64 [tokens, K]; None: all slots are read."""
    bias: Tensor
    """float32 [tokens, K]: -inf where a slot that is read does not count."""


@lru_cache(maxsize=64)
def step_tables(layout: CacheLayout, device: torch.device) -> StepTables:
    """Tables of a layout."""
    count = len(layout.slot)
    slots = [torch.arange(r.start, r.stop) if isinstance(r, slice) else r.cpu() for r in layout.reads]
    width = max(len(s) for s in slots)
    whole = width == layout.num_slots
    width = layout.num_slots if whole else width
    bias = torch.full((count, width), float("-inf"))
    reads = torch.zeros(count, width, dtype=torch.int64)
    for token, read in enumerate(slots):
        places = read if whole else torch.arange(len(read))
        bias[token, places] = 0.0 if layout.bias is None else layout.bias[token, read].cpu()
        reads[token, places] = read
    return StepTables(torch.tensor(layout.slot, device=device), None if whole else reads.to(device), bias.to(device))


class StaticDecoder(Decoder):
    """``Decoder`` whose steps have the same shapes and the same operations at every position."""

    def __init__(self, model: ViLG, prefix: Prefix, num_targets: int, cache: CacheKind = "pattern") -> None:
        super().__init__(model, prefix, num_targets, cache, joint=False)
        device = prefix.used.device
        self.position = torch.tensor(self.token, device=device)
        self.tables = [step_tables(c.layout, device) for c in self.caches]

    def step(self, ids: Tensor) -> Tensor:
        """Append one target token to every row and predict the next: ids [R] to logits [R, V]."""
        assert self.model.embed is not None and self.model.norm is not None
        x = self.model.embed.target(self.direction, ids[:, None], self.position)
        for i, block in enumerate(self.blocks):
            out = self._attention(i, *block.attention.project_alike(block.norm1(x)))
            x = block.add_mlp(block.add_attention(x, block.attention.out(out)))
        self.position += 1
        return self.head(self.model.norm(x[:, 0]))

    def state(self) -> list[Tensor]:
        """Everything that a step changes."""
        return [self.position, *(store for c in self.caches for store in (c.keys, c.values))]

    def _exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        cache, tables = self.caches[layer], self.tables[layer]
        slot = tables.slot.index_select(0, self.position[None])
        cache.keys.index_copy_(3, slot, key[:, :, :, None])
        cache.values.index_copy_(3, slot, value[:, :, :, None])
        bias = tables.bias.index_select(0, self.position[None])[0]
        if tables.reads is None:
            return cache.keys, cache.values, bias
        read = tables.reads.index_select(0, self.position[None])[0]
        return cache.keys.index_select(3, read), cache.values.index_select(3, read), bias


class Recording:
    """A step as a CUDA graph: one launch instead of a few hundred.

    Args:
        step: a function without arguments that works on tensors that stay where they are.
        state: the tensors that it changes; they are put back after warming up and recording.
    """

    def __init__(self, step: Callable[[], None], state: list[Tensor]) -> None:
        kept = [x.clone() for x in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
                for x, before in zip(state, kept, strict=True):
                    x.copy_(before)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()
        for x, before in zip(state, kept, strict=True):
            x.copy_(before)

    def replay(self) -> None:
        """One step."""
        self.graph.replay()
