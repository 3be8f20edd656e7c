"""Where a layer keeps the keys and values of target tokens, and which of them a query reads.

Everything is derived from ``AttentionRule.allowed``: the rule between target tokens is written down as a matrix, and
the layout is the tightest one whose reads are exactly that matrix:

* *window*: a query sees itself and the ``size - 1`` tokens before it (row layers: W + 1; a convolution window wider
  than the grid; text; ``full``): a ring of ``size`` slots, whose order does not matter;
* *columns*: a query sees its column so far: slots in column-major order, so that a read is one contiguous run;
* *gather*: any other rule (convolution): a ring, and a list of slots per query.

*dense* keeps all tokens and hides by a bias; it is the reference.

The source and the token that opens the target are kept apart, once for all targets of a source, or (*joint*) in front
of each target's own slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.ops.rules import AttentionRule, full_length_mask, layer_patterns
from megatron_vilg.sequence import Direction

CacheKind = Literal["pattern", "dense"]


@dataclass(frozen=True, slots=True, eq=False)
class CacheLayout:
    """Slots of one layer. Target tokens are counted from 0: the first code, or the first text token."""

    name: str
    num_slots: int
    slot: tuple[int, ...]
    """Slot that each target token is written to; it overwrites a token that nobody reads any more."""
    reads: tuple[slice | Tensor, ...]
    """Slots that each target token reads, its own included: a run, or an index tensor."""
    bias: Tensor | None = None
    """dense: float32 [tokens, slots], -inf where a slot that is read must not count."""

    def num_read(self, token: int) -> int:
        """Slots that this target token reads."""
        read = self.reads[token]
        return read.stop - read.start if isinstance(read, slice) else read.numel()


def target_mask(rule: AttentionRule, direction: Direction) -> Tensor:
    """The rule between target tokens, without the token that opens the target: bool [tokens, tokens] on the CPU.

    Raises:
        ValueError: the rule hides source tokens from targets; a shared source would be wrong.
    """
    spec = rule.spec
    first = spec.source_length(direction) + 1
    mask = full_length_mask(rule, direction, torch.device("cpu"))[first : spec.num_used]
    if not mask[:, :first].all():
        raise ValueError(f"{rule}: some targets do not see the whole source")
    return mask[:, first : spec.num_used]


@lru_cache(maxsize=64)
def cache_layout(rule: AttentionRule, direction: Direction, kind: CacheKind, device: torch.device) -> CacheLayout:
    """The layout of layers with this rule; ``kind`` "dense" asks for the reference."""
    mask = target_mask(rule, direction)
    if kind == "dense":
        return _dense(mask, device)
    return _window(mask) or _columns(mask, rule.spec.image_side) or _gather(mask, device)


@lru_cache(maxsize=64)
def joint_layout(layout: CacheLayout, shared: int, device: torch.device) -> CacheLayout:
    """The layout behind ``shared`` more slots, the first ones, which every token reads first."""
    front = torch.arange(shared, device=device)

    def read(own: slice | Tensor) -> slice | Tensor:
        if isinstance(own, Tensor):
            return torch.cat([front, own + shared])
        if own.start == 0:
            return slice(0, own.stop + shared)
        return torch.cat([front, torch.arange(own.start + shared, own.stop + shared, device=device)])

    bias = None if layout.bias is None else F.pad(layout.bias, (shared, 0))
    slots = tuple(slot + shared for slot in layout.slot)
    return CacheLayout(layout.name, layout.num_slots + shared, slots, tuple(map(read, layout.reads)), bias)


def _dense(mask: Tensor, device: torch.device) -> CacheLayout:
    count = len(mask)
    bias = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf")).to(device)
    return CacheLayout("dense", count, tuple(range(count)), tuple(slice(0, i + 1) for i in range(count)), bias)


def _window(mask: Tensor) -> CacheLayout | None:
    count = len(mask)
    size = int(mask.sum(dim=1).max())
    token = torch.arange(count)
    age = token[:, None] - token[None, :]
    if not torch.equal(mask, (age >= 0) & (age < size)):
        return None
    reads = tuple(slice(0, min(i + 1, size)) for i in range(count))
    return CacheLayout("window", size, tuple(i % size for i in range(count)), reads)


def _columns(mask: Tensor, side: int) -> CacheLayout | None:
    count = len(mask)
    token = torch.arange(count)
    same_column = token[:, None] % side == token[None, :] % side
    if count != side * side or not torch.equal(mask, same_column & (token[None, :] <= token[:, None])):
        return None
    slots = tuple(i % side * side + i // side for i in range(count))
    return CacheLayout("columns", count, slots, tuple(slice(s - i // side, s + 1) for i, s in enumerate(slots)))


def _gather(mask: Tensor, device: torch.device) -> CacheLayout:
    count = len(mask)
    keys = [row.nonzero().flatten() for row in mask]
    size = max(i - int(k[0]) for i, k in enumerate(keys)) + 1
    reads = tuple((k % size).to(device) for k in keys)
    return CacheLayout("gather", size, tuple(i % size for i in range(count)), reads)


class TargetCache:
    """Keys and values of one layer's target tokens, [P, A, n, slots, H]: n targets for each of P sources."""

    def __init__(self, layout: CacheLayout, shape: tuple[int, int, int], head_dim: int, like: Tensor) -> None:
        self.layout = layout
        # Zeros: a read of fixed size also takes slots that are not written yet, and hides them by a bias.
        self.keys = like.new_zeros(*shape, layout.num_slots, head_dim)
        self.values = torch.zeros_like(self.keys)

    def write_front(self, keys: Tensor, values: Tensor) -> None:
        """Fill the first S slots of all targets of a source (``joint_layout``): keys and values [P, A, S, H]."""
        self.keys[:, :, :, : keys.shape[2]] = keys[:, :, None]
        self.values[:, :, :, : keys.shape[2]] = values[:, :, None]

    def write(self, token: int, key: Tensor, value: Tensor) -> None:
        """Store key and value [P, A, n, H] of a target token."""
        slot = self.layout.slot[token]
        self.keys[:, :, :, slot] = key
        self.values[:, :, :, slot] = value

    def read(self, token: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """What this target token reads: keys and values [P, A, n, K, H], and a bias [K] or None."""
        read = self.layout.reads[token]
        if isinstance(read, slice):
            bias = None if self.layout.bias is None else self.layout.bias[token, read]
            return self.keys[:, :, :, read], self.values[:, :, :, read], bias
        return self.keys.index_select(3, read), self.values.index_select(3, read), None

    def select(self, index: Tensor) -> None:
        """Let target ``i`` of source ``p`` continue target ``index[p, i]`` of the same source; index is [P, n]."""
        source = torch.arange(len(index), device=index.device)[:, None]
        for store in (self.keys, self.values):
            store.copy_(store[source, :, index].transpose(1, 2))


def kv_elements_read(config: ModelConfig, *, num_targets: int = 1, kind: CacheKind = "pattern") -> int:
    """Numbers of keys and values that all image steps of ``num_targets`` pictures of one prompt read.

    Every text slot counts as used. The source and BOI are read once per step for all pictures together.
    """
    shared = config.spec.source_length(Direction.TEXT_TO_IMAGE) + 1
    steps = config.spec.num_image_tokens - 1  # BOI's step belongs to the source, the last code is not fed
    count = 0
    for layout in _layouts(config, kind):
        count += steps * shared + num_targets * sum(layout.num_read(token) for token in range(steps))
    return 2 * config.width * count


def kv_elements_stored(config: ModelConfig, *, num_targets: int = 1, kind: CacheKind = "pattern") -> int:
    """Numbers of keys and values kept for ``num_targets`` pictures of one prompt."""
    shared = config.spec.source_length(Direction.TEXT_TO_IMAGE) + 1
    slots = sum(shared + num_targets * layout.num_slots for layout in _layouts(config, kind))
    return 2 * config.width * slots


def pictures_within(config: ModelConfig, num_bytes: int, *, rows: int = 1) -> int:
    """How many pictures, of prompts of their own and in fp32, keep their keys and values in ``num_bytes``: at least 1.

    Args:
        rows: what is drawn with guidance has one for each condition, and one without.
    """
    return max(1, num_bytes // (4 * rows * kv_elements_stored(config)))


def _layouts(config: ModelConfig, kind: CacheKind) -> list[CacheLayout]:
    """Of every layer, for pictures."""
    rules = (
        AttentionRule(pattern, config.spec, config.conv_kernel, config.conv_wrap, config.image_to_text_row)
        for pattern in layer_patterns(config.num_layers, config.pattern)
    )
    return [cache_layout(rule, Direction.TEXT_TO_IMAGE, kind, torch.device("cpu")) for rule in rules]
