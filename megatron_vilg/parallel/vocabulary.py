"""Output head and cross-entropy where each rank of ``tp`` has the logits of its share of the vocabulary.

The twin of ``ops/cross_entropy.py`` (same sums, gradients computed chunk by chunk in the forward pass): logits stay
where they are, ranks exchange three numbers per row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.ops.cross_entropy import IGNORE, chunk_rows


def parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: dist.ProcessGroup,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` over ranks; the same result and the same hidden gradient on each.

    Args:
        hidden: [..., D], the same on all ranks of ``group``.
        weight: [V / n, D], this rank's rows.
        labels: int64 [...], of the whole vocabulary.
        group: n ranks that share the vocabulary, in order.
        z_loss: weight of ``log(Z) ** 2``.
        label_smoothing: probability spread evenly over the vocabulary.

    Returns:
        0-dim float32: the sum with z-loss and smoothing, and the bare cross-entropy without.
    """
    if not torch.is_grad_enabled():  # needs_input_grad does not ask, and the weight's gradient would be computed
        weight = weight.detach()
    total, bare = _ParallelLinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, labels.flatten(), group, z_loss, label_smoothing
    )
    return total, bare


class SameInput(torch.autograd.Function):
    """Identity for an input that all ranks share; its gradient is summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def parallel_logits(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's logits [..., V / n] of hidden states [..., D] that all ranks share."""
    return F.linear(SameInput.apply(hidden, group), weight)


class _ParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup,
        z_loss: float,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        share = _Share(group, len(weight), z_loss, smoothing)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        sums = torch.zeros(2, device=hidden.device)
        rows_each = chunk_rows(len(hidden), len(weight), hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows_each):
                rows = hidden[start : start + rows_each]
                loss, slope = share.chunk((rows @ weight.T).float(), labels[start : start + rows_each])
                sums += loss
                slope = slope.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows_each] = slope @ weight
                if grad_weight is not None:
                    grad_weight += slope.T @ rows
        if grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.types = hidden.dtype, weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        bare = sums[1].clone()
        ctx.mark_non_differentiable(bare)
        return sums.sum(), bare

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return (*scaled, None, None, None, None)


class _Share:
    """This rank's part of the vocabulary."""

    def __init__(self, group: dist.ProcessGroup, size: int, z_loss: float, smoothing: float) -> None:
        self.group, self.size = group, size
        self.first = dist.get_rank(group) * size
        self.vocabulary = dist.get_world_size(group) * size
        self.z_loss, self.smoothing = z_loss, smoothing

    def chunk(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (extra, bare), float32 [2], and the gradient by the logits [n, V / ranks], which are used up."""
        valid = labels != IGNORE
        here = labels - self.first
        inside = valid & (here >= 0) & (here < self.size)
        here = here.clamp(0, self.size - 1)[:, None]
        top = logits.amax(dim=1)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        logits -= top[:, None]
        picked = logits.gather(1, here)[:, 0] * inside
        mean = logits.sum(dim=1) / self.vocabulary
        exponentials = logits.exp_()
        shared = torch.stack([exponentials.sum(dim=1), picked, mean])
        dist.all_reduce(shared, group=self.group)
        below, picked, mean = shared.unbind()
        log_sum, log_z = below.log(), below.log() + top
        bare = ((log_sum - picked) * valid).sum()
        extra = (self.z_loss * log_z.square() + self.smoothing * (picked - mean)) * valid
        slope = exponentials.mul_(((1.0 + 2.0 * self.z_loss * log_z) / below * valid)[:, None])
        if self.smoothing > 0.0:
            slope -= (self.smoothing / self.vocabulary) * valid[:, None]
        slope.scatter_add_(1, here, ((self.smoothing - 1.0) * inside)[:, None])
        return torch.stack([extra.sum(), bare]), slope
