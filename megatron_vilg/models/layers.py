"""Attention, feed-forward and block of the transformer: plain modules that know nothing of several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.ops.attention import Prepared, attend
from megatron_vilg.ops.dropout import dropout
from megatron_vilg.ops.linear import linear

Rows = Callable[[Tensor], Tensor]
"""Takes some positions out of [B, T, E]: [R, E]."""


class Linear(nn.Linear):
    """torch's layer; on a CPU in fp32 oneDNN computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return linear(x, self.weight, self.bias)


class Dropout(nn.Dropout):
    """torch's layer, with a cheaper choice on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return dropout(x, self.p, training=self.training)


class SelfAttention(nn.Module):
    """Multi-head attention; heads are counted from the tensors, so a slice of the heads works too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.head_dim = config.head_dim
        self.recompute = False
        """Whether scores and softmax are computed again in the backward pass."""
        self.q = Linear(width, width)
        # A bias on keys shifts all scores of a query alike, which softmax ignores: its gradient would be noise.
        self.k = Linear(width, width, bias=False)
        self.v = Linear(width, width)
        self.out = Linear(width, width)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.norm_eps, bias=False) if config.qk_norm else None

    def project_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [B, T, D] to queries, keys and values [B, T, A, H]."""
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``project_heads``, with queries and keys normalised per head if asked for."""
        q, k, v = self.project_heads(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def project_alike(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``project``, all three in one type: norms of queries and keys are computed in fp32."""
        q, k, v = self.project(x)
        return q.to(v.dtype), k.to(v.dtype), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
        """Softmax attention over [B, T, A, H]: [B, T, A * H]."""
        if self.recompute and torch.is_grad_enabled():
            mixed: Tensor = checkpoint(attend, q, k, v, prepared, use_reentrant=False)
            return mixed.flatten(-2)
        return attend(q, k, v, prepared).flatten(-2)

    def forward(self, x: Tensor, prepared: Prepared, rows: Rows | None = None) -> Tensor:
        """Hidden [B, T, D] -> [B, T, D] under the layer's attention rule, or [R, D] at the positions ``rows`` takes."""
        mixed = self.mix(*self.project_alike(x), prepared)
        return self.out(mixed if rows is None else rows(mixed))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.mlp_ratio * config.width)
        self.down = Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block; the sandwich norms of CogView on request."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.width, eps=config.norm_eps)

        self.norm1 = norm()
        self.attention = SelfAttention(config)
        self.norm2 = norm()
        self.mlp = FeedForward(config)
        self.post_norm1 = norm() if config.sandwich_norm else nn.Identity()
        self.post_norm2 = norm() if config.sandwich_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.recompute = False
        """Whether all but the input is computed again in the backward pass."""
        self._before_attention: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
        self._behind_attention: Callable[[Tensor, Tensor], Tensor] | None = None

    def compile_around_attention(self) -> None:
        """Have torch's compiler fuse what stands around attention: norms, projections, sums, feed-forward.

        Attention itself stays as it is: it has kernels of its own. All blocks of a model share two compiled pieces.
        """
        self._before_attention = torch.compile(self._enter)
        self._behind_attention = torch.compile(self._leave)

    def add_attention(self, x: Tensor, update: Tensor) -> Tensor:
        """Residual sum behind attention."""
        return x + self.dropout(self.post_norm1(update))

    def add_mlp(self, x: Tensor) -> Tensor:
        """Feed-forward and its residual sum."""
        return x + self.dropout(self.post_norm2(self.mlp(self.norm2(x))))

    def forward(self, x: Tensor, prepared: Prepared, rows: Rows | None = None) -> Tensor:
        """Hidden [B, T, D] -> [B, T, D].

        With ``rows`` the result is [R, D], that of the positions it takes: behind attention every position is on its
        own, so in a last block none is computed there that nobody reads.
        """
        if self.recompute and torch.is_grad_enabled():
            computed: Tensor = checkpoint(self._forward, x, prepared, rows, use_reentrant=False)
            return computed
        return self._forward(x, prepared, rows)

    def _forward(self, x: Tensor, prepared: Prepared, rows: Rows | None) -> Tensor:
        before, behind = self._before_attention, self._behind_attention
        # Compiled pieces would pass by whoever looks into the attention layer (``train.state_watch``); and measuring,
        # with other sizes and a dropout that is off, would be compiled for a few calls.
        if before is None or behind is None or not self.training or self.attention._forward_pre_hooks:
            update = self.attention(self.norm1(x), prepared, rows=rows)
            return self.add_mlp(self.add_attention(x if rows is None else rows(x), update))
        mixed = self.attention.mix(*before(x), prepared)
        return behind(x, mixed) if rows is None else behind(rows(x), rows(mixed))

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.project_alike(self.norm1(x))

    def _leave(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.add_mlp(self.add_attention(x, self.attention.out(mixed)))
