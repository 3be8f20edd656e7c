"""Output layer and cross-entropy in one: logits exist for a few rows at a time, and never twice.

Peers: ``LigerFusedLinearCrossEntropy`` and Apple's cut cross-entropy (arXiv 2411.09009). As in Liger, gradients are
computed in the forward pass, where a chunk's logits are at hand, and only scaled in the backward pass; so the weight is
not needed again, and nothing of the size of the logits is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_vilg.ops.linear import linear

IGNORE = -100
"""Label of a row that is not predicted."""
CHUNKS = 24
"""Large logits are cut into this many chunks: with their copy in the arithmetic's type they stay below an eighth."""
FEWEST_ROWS = 128
"""Smaller chunks read and write the weight and its gradient too often."""


FREE_BYTES = (2 << 20, 32 << 20)
"""Logits of this size (CPU, GPU) are not cut: on a CPU it is about a core's cache."""


def chunk_rows(num_rows: int, vocabulary: int, device_type: str) -> int:
    """Rows of float32 logits that are computed at a time."""
    smallest = FREE_BYTES[device_type == "cuda"] // (4 * vocabulary)
    return max(FEWEST_ROWS, smallest, -(-num_rows // CHUNKS))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    rows_each: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of ``-log softmax(hidden @ weight.T)[label]`` over rows whose label is not ``IGNORE``.

    Products are computed in autocast's type (else in that of the inputs), everything else in fp32.

    Args:
        hidden: [..., D].
        weight: [V, D].
        labels: int64 [...].
        z_loss: weight of ``log(Z) ** 2``.
        label_smoothing: probability spread evenly over the vocabulary.
        rows_each: rows per chunk; None: ``chunk_rows``.

    Returns:
        0-dim float32: the sum with z-loss and smoothing, to be differentiated, and the bare cross-entropy without.
    """
    rows, flat = hidden.flatten(0, -2), labels.flatten()
    if rows.device.type == "cpu":  # elsewhere the selection would wait for the device
        kept = (flat != IGNORE).nonzero().flatten()
        if len(kept) < len(flat):
            rows, flat = rows.index_select(0, kept), flat[kept]
    if rows_each is None:
        rows_each = chunk_rows(len(rows), len(weight), rows.device.type)
    if not torch.is_grad_enabled():  # needs_input_grad does not ask, and the weight's gradient would be computed
        weight = weight.detach()
    total, bare = _LinearCrossEntropy.apply(rows, weight, flat, z_loss, label_smoothing, rows_each)
    return total, bare


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, smoothing: float, rows_each: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            cast_weight = weight.to(dtype)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight: Tensor | None = None
            sums = torch.zeros(2, device=hidden.device)
            for start in range(0, len(hidden), rows_each):
                part = slice(start, start + rows_each)
                rows = hidden[part].to(dtype)
                logits = linear(rows, cast_weight)
                loss, slope = _chunk(logits, labels[part], z_loss, smoothing, gradient=needs_hidden or needs_weight)
                sums += loss
                if grad_hidden is not None:
                    grad_hidden[part] = linear(slope, cast_weight.T)
                if needs_weight:
                    grad_weight = _add_product(grad_weight, slope, rows)
            if needs_weight:
                grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        bare = sums[1].clone()
        ctx.mark_non_differentiable(bare)
        return sums.sum(), bare

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a scaled copy would be as large as what was saved. A second backward pass is refused by autograd.
        grads = (None if saved is None else saved.mul_(grad.to(saved.dtype)) for saved in ctx.saved_tensors)
        return *grads, None, None, None, None


def _add_product(total: Tensor | None, slope: Tensor, rows: Tensor) -> Tensor:
    """``total + slope.T @ rows`` in float32; None stands for nothing yet."""
    if total is None:
        return (slope.T @ rows).float()
    return total.addmm_(slope.T, rows) if slope.dtype == total.dtype else total.add_(slope.T @ rows)


def _chunk(logits: Tensor, labels: Tensor, z_loss: float, smoothing: float, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Sums (extra, bare) of one chunk, float32 [2], and the gradient by the logits in their type; uses logits up."""
    ignored = None if labels.device.type == "cpu" else (labels == IGNORE)[:, None]

    def drop(x: Tensor) -> Tensor:
        return x if ignored is None else x.masked_fill_(ignored, 0.0)

    labels = labels.clamp(min=0)[:, None]
    picked = logits.gather(1, labels).float()
    if logits.dtype == torch.float32:
        log_p = torch.log_softmax(logits, dim=1, out=logits)
    else:
        log_p = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    surprise = -log_p.gather(1, labels)
    log_z = picked + surprise
    extra = torch.zeros((), device=logits.device)
    if z_loss > 0.0:
        extra = extra + z_loss * drop(log_z.square()).sum()
    if smoothing > 0.0:
        extra = extra + smoothing * drop(-log_p.mean(dim=1, keepdim=True) - surprise).sum()
    sums = torch.stack([extra, drop(surprise).sum()])
    if not gradient:
        return sums, logits
    slope = log_p.exp_()
    if z_loss > 0.0:
        slope.mul_(1.0 + 2.0 * z_loss * log_z)
    if smoothing > 0.0:
        slope.sub_(smoothing / slope.shape[1])
    slope.scatter_add_(1, labels, torch.full_like(picked, smoothing - 1.0))
    return sums, drop(slope).to(logits.dtype)
