"""Cached decoding: the source is read once, then the target grows token by token (either direction).

The source and the token that opens the target (BOI or BOS) are computed once per source and shared by all its targets;
each target keeps, per layer, only what the layer's pattern can still read (``generate.cache``). A few rows on a CPU
have copies of the source instead: their steps then consist of fewer operations, and quicker ones. All memory is taken
at the start. Shape letters: P sources, n targets of each, R = P * n rows (source-major), A heads, H head size,
S shared positions, K target keys read by one query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.generate.cache import CacheKind, TargetCache, cache_layout, joint_layout
from megatron_vilg.generate.weights import PACK_FROM_STEPS, can_pack, can_pack_block, packed_block, packed_linear
from megatron_vilg.models.layers import Block
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import Prepared, attend, dense_block, prepare
from megatron_vilg.ops.rules import AttentionRule, Pattern, text_keys_used
from megatron_vilg.sequence import Direction

JOINT_ROWS, JOINT_LENGTH = 8, 384
"""Most rows that have copies of their source, and most positions of each. Beside steps with the source apart, those of
four rows of 8 x 8 codes take 0.92 of the time, of 16 rows 1.03, of four rows of 32 x 32 codes 1.04 (AVX-512, one
thread, fp32)."""


@contextmanager
def inference(model: ViLG) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What all targets of a source share, for P sources."""

    direction: Direction
    keys: tuple[Tensor, ...]
    """Per layer [P, A, S + m, H]: the source, the opening token, and m target tokens given beforehand."""
    values: tuple[Tensor, ...]
    used: Tensor
    """bool [P, S]: False for text slots without a token."""
    logits: Tensor
    """[P, V]: predictions of the first token that was not given."""

    @property
    def num_given(self) -> int:
        """m, the target tokens given beforehand."""
        return self.keys[0].shape[2] - self.used.shape[1]

    def select(self, index: Tensor) -> Prefix:
        """Sources number ``index`` (int64, repetitions allowed), without text slots that none of them uses."""
        used = self.used[index]
        shared = used.any(dim=0).nonzero().flatten()
        given = torch.arange(used.shape[1], used.shape[1] + self.num_given, device=index.device)
        position = torch.cat([shared, given])

        def take(stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x[index].index_select(2, position) for x in stored)

        return replace(
            self, keys=take(self.keys), values=take(self.values), used=used[:, shared], logits=self.logits[index]
        )


def prefill(model: ViLG, direction: Direction, source: Tensor, text_len: Tensor, given: Tensor | None = None) -> Prefix:
    """Read P sources, and the beginning of their targets if some is ``given``.

    Args:
        source: text ids [P, L] or codes [P, N].
        text_len: int64 [P]; image-to-text does not look at it.
        given: target ids [P, m].
    """
    assert model.embed is not None
    x = model.embed.source(direction, source)
    parts = [x, model.embed.target_start(direction, source)]
    if given is not None and given.shape[1]:
        parts.append(model.embed.target(direction, given))
    x = torch.cat(parts, dim=1)
    length = x.shape[1]
    used = text_keys_used(model.spec, direction, text_len)
    ready: dict[Pattern, Prepared] = {}
    keys, values = [], []
    for name, block in model.blocks.items():
        block = cast(Block, block)
        pattern = model.patterns[int(name)]
        q, k, v = block.attention.project_alike(block.norm1(x))
        if pattern not in ready:
            ready[pattern] = _prepare(model, model.rule(pattern), direction, used, length, v.dtype)
        out = _attend_padded(q, k, v, ready[pattern])
        x = block.add_mlp(block.add_attention(x, block.attention.out(out.flatten(-2))))
        keys.append(k.transpose(1, 2))
        values.append(v.transpose(1, 2))
    shared = model.spec.source_length(direction) + 1
    return Prefix(direction, tuple(keys), tuple(values), used[:, :shared], predict(model, direction, x[:, -1]))


def _prepare(
    model: ViLG, rule: AttentionRule, direction: Direction, used: Tensor, length: int, dtype: torch.dtype
) -> Prepared:
    """The rule among the first ``length`` positions; an image source keeps the model's fast form."""
    if direction == Direction.IMAGE_TO_TEXT and model.implementation not in ("dense", "sdpa"):
        slots = torch.full((len(used),), rule.spec.num_text_slots, device=used.device)
        return prepare(rule, slots, model.implementation, direction, dtype)
    span = slice(0, length)
    mask = dense_block(rule, direction, span, span, used)
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return Prepared(rule, direction, "sdpa", bias)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    """``attend``, with rows brought to the length that ``prepared`` is made for. [P, M, A, H] in and out."""
    length = q.shape[1]
    full = prepared.rule.spec.length if prepared.bias is None else prepared.bias.shape[-1]
    if full > length:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, full - length)) for x in (q, k, v))
    return attend(q, k, v, prepared)[:, :length]


def predict(model: ViLG, direction: Direction, hidden: Tensor) -> Tensor:
    """Hidden states [..., D] to logits of the direction's target vocabulary [..., V]."""
    assert model.norm is not None
    return cast(Tensor, target_head(model, direction)(model.norm(hidden)))


def target_head(model: ViLG, direction: Direction) -> nn.Linear:
    """The output layer of the direction's target vocabulary."""
    assert model.heads is not None
    return cast(nn.Linear, model.heads["image" if direction == Direction.TEXT_TO_IMAGE else "text"])


class Decoder:
    """Targets that grow side by side: ``num_targets`` for each source of a prefix.

    Args:
        model: the whole generator, in evaluation mode; call inside ``inference(model)``.
        prefix: the sources.
        num_targets: n, targets per source.
        cache: "pattern" keeps what each layer's pattern can read; "dense" keeps everything (reference).
        joint: whether each row has a copy of its source; by default a few short rows on a CPU do, if that is the
            shorter part of them.
    """

    def __init__(
        self,
        model: ViLG,
        prefix: Prefix,
        num_targets: int,
        cache: CacheKind = "pattern",
        *,
        joint: bool | None = None,
    ) -> None:
        self.model = model
        self.direction = prefix.direction
        self.token = prefix.num_given
        self.num_sources, self.num_targets = len(prefix.used), num_targets
        num_rows, shared = self.num_sources * num_targets, prefix.used.shape[1]
        length = model.spec.num_used
        few = num_rows <= JOINT_ROWS and 2 * shared <= length <= JOINT_LENGTH
        self.joint = (few and prefix.used.device.type == "cpu") if joint is None else joint
        apart = [] if self.joint else list(zip(prefix.keys, prefix.values, strict=True))
        # [P * A, S, H], contiguous: every step multiplies all targets of a source with them at once.
        self.shared_keys = [k[:, :, :shared].flatten(0, 1).contiguous().transpose(1, 2) for k, _ in apart]
        self.shared_values = [v[:, :, :shared].flatten(0, 1).contiguous() for _, v in apart]
        hidden = torch.zeros(prefix.used.shape, dtype=prefix.keys[0].dtype, device=prefix.used.device)
        hidden.masked_fill_(~prefix.used, float("-inf"))
        if self.joint:  # [P * A, 1, 1, S], as queries come then, in place of [P, 1, 1, S]
            hidden = hidden.repeat_interleave(prefix.keys[0].shape[1], dim=0)
        self.shared_bias = None if prefix.used.all() else hidden[:, None, None]
        self.caches = [self._start_cache(i, prefix, cache) for i in range(len(prefix.keys))]
        self.blocks = [cast(Block, block) for block in model.blocks.values()]
        self.head: nn.Module = target_head(model, self.direction)
        steps = len(self.caches[0].layout.slot) - self.token
        if steps >= PACK_FROM_STEPS and can_pack(target_head(model, self.direction).weight):
            self.blocks = [packed_block(block, num_rows) if can_pack_block(block) else block for block in self.blocks]
            self.head = packed_linear(target_head(model, self.direction), num_rows)

    def step(self, ids: Tensor) -> Tensor:
        """Append one target token to every row and predict the next: ids [R] to logits [R, V]."""
        assert self.model.embed is not None and self.model.norm is not None
        x = self.model.embed.target(self.direction, ids[:, None], self.token)
        for i, block in enumerate(self.blocks):
            out = self._attention(i, *block.attention.project_alike(block.norm1(x)))
            x = block.add_mlp(block.add_attention(x, block.attention.out(out)))
        self.token += 1
        return self.head(self.model.norm(x[:, 0]))

    def select(self, index: Tensor) -> None:
        """Let row ``i`` of source ``p`` continue row ``index[p, i]`` of the same source; index is int64 [P, n]."""
        for cache in self.caches:
            cache.select(index)

    def _start_cache(self, layer: int, prefix: Prefix, kind: CacheKind) -> TargetCache:
        """An empty cache, or one that holds the given target tokens."""
        keys, values = prefix.keys[layer], prefix.values[layer]
        rule = self.model.rule(self.model.patterns[layer])
        layout = cache_layout(rule, self.direction, kind, keys.device)
        num_sources, heads, _, head_dim = keys.shape
        shared = prefix.used.shape[1]
        if self.joint:
            layout = joint_layout(layout, shared, keys.device)
        cache = TargetCache(layout, (num_sources, heads, self.num_targets), head_dim, keys)
        if self.joint:
            cache.write_front(keys[:, :, :shared], values[:, :, :shared])
        for token in range(prefix.num_given):
            cache.write(token, keys[:, :, None, shared + token], values[:, :, None, shared + token])
        return cache

    def _exchange(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store key and value [P, A, n, H] of the step, and fetch what its queries read (see ``TargetCache.read``)."""
        cache = self.caches[layer]
        cache.write(self.token, key, value)
        return cache.read(self.token)

    def _attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query per row over the shared and its own keys, in one softmax; q, k, v [R, 1, A, H] to [R, 1, A * H]."""
        sources, targets, heads, size = self.num_sources, self.num_targets, q.shape[2], q.shape[3]

        def by_source(x: Tensor) -> Tensor:  # [P, A, n, H]
            return x.view(sources, targets, heads, size).transpose(1, 2)

        keys, values, bias = self._exchange(layer, by_source(k), by_source(v))
        if self.joint:
            return self._joint_attention(by_source(q), keys, values, bias)
        query = (by_source(q) * size**-0.5).contiguous()
        to_shared = torch.bmm(query.view(sources * heads, targets, size), self.shared_keys[layer])
        to_shared = to_shared.view(sources, heads, targets, -1)
        if self.shared_bias is not None:
            to_shared = to_shared + self.shared_bias
        to_own = torch.bmm(query.view(-1, 1, size), keys.flatten(0, 2).transpose(1, 2)).view(*query.shape[:3], -1)
        if bias is not None:
            to_own = to_own + bias.to(to_own.dtype)
        weights = torch.cat([to_shared, to_own], dim=-1).softmax(dim=-1)
        split = to_shared.shape[-1]
        out = torch.bmm(weights[..., :split].flatten(0, 1), self.shared_values[layer]).view_as(query)
        out = out + torch.bmm(weights[..., split:].flatten(0, 2)[:, None], values.flatten(0, 2)).view_as(query)
        return out.transpose(1, 2).reshape(sources * targets, 1, heads * size)

    def _joint_attention(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The same where each row's keys [P, A, n, K, H] begin with its source's; q [P, A, n, H]."""
        sources, heads, targets, size = q.shape
        mask = None if bias is None else bias.to(q.dtype)[None]
        if self.shared_bias is not None:
            hidden = F.pad(self.shared_bias, (0, keys.shape[3] - self.shared_bias.shape[-1]))
            mask = hidden if mask is None else hidden + mask
        q, keys, values = q.flatten(0, 1)[:, :, None], keys.flatten(0, 1), values.flatten(0, 1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.view(sources, heads, targets, size).transpose(1, 2).reshape(sources * targets, 1, heads * size)
