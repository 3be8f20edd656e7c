"""Folded attention for CPUs: head by head, so that scores stay in the cache, with a backward pass of its own.

Windows of keys are overlapping views of one padded copy, softmax works in place, unused text slots are left out
instead of hidden, and gradients are written where they belong. Arithmetic is fp32 whatever the inputs are: at these
sizes a core gains nothing from bf16. Shape letters: B rows, T positions, A heads, H head size, N image tokens,
G globals of a row, K window, R positions outside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.ops.fold import rest_bias
from megatron_vilg.ops.fold_plan import FoldPlan


@dataclass(frozen=True, slots=True)
class FoldRow:
    """What one row of a batch needs."""

    plan: FoldPlan
    globals: Tensor
    """int64 [G]: positions that its image queries see, unused text slots left out."""
    rest_bias: Tensor
    """float32 [R, rest keys]."""


def fold_rows(plan: FoldPlan, used: Tensor) -> tuple[FoldRow, ...]:
    """Rows of one direction; ``used`` is bool [B, T], False for text slots that hold no token."""
    seen = used[:, plan.globals]
    return tuple(FoldRow(plan, plan.globals[s], b) for s, b in zip(seen, rest_bias(plan, used), strict=True))


def fold_attention_cpu(q: Tensor, k: Tensor, v: Tensor, rows: tuple[FoldRow, ...]) -> Tensor:
    """q, k, v and the result are [B, T, A, H]."""
    out: Tensor = _FoldAttention.apply(q, k, v, rows)
    return out


class _Head:
    """The tokens of one row and head, in the order of its plan, and views of them."""

    def __init__(self, row: FoldRow, size: int) -> None:
        plan = row.plan
        self.row, self.plan, self.size = row, plan, size
        self.count = plan.num_blocks * plan.block
        padded = self.count + plan.before + plan.after
        self.padded_k, self.padded_v = torch.zeros(padded, size), torch.zeros(padded, size)
        inside = slice(plan.before, plan.before + self.count)
        self.image_k, self.image_v = self.padded_k[inside], self.padded_v[inside]
        shape, strides = (plan.num_blocks, plan.window, size), (plan.block * size, size, 1)
        self.window_k = self.padded_k.as_strided(shape, strides)
        self.window_v = self.padded_v.as_strided(shape, strides)

    def load(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take over q, k, v [T, H]."""
        plan = self.plan
        self.q = self.image(q) * self.size**-0.5
        self.image_k.copy_(self.image(k))
        self.image_v.copy_(self.image(v))
        self.global_k, self.global_v = k[self.row.globals].float(), v[self.row.globals].float()
        self.rest_q = q[plan.rest].float() * self.size**-0.5
        self.rest_k, self.rest_v = k[: plan.rest_keys].float(), v[: plan.rest_keys].float()

    def image(self, x: Tensor) -> Tensor:
        """The image tokens of [T, H] in the plan's order, float32 [N, H]."""
        return self.plan.arrange(x[self.plan.image]).float().contiguous()

    def blocks(self, x: Tensor) -> Tensor:
        """[N, ...] as [blocks, block, ...]."""
        return x.view(self.plan.num_blocks, self.plan.block, -1)

    def weights(self, scores: Tensor, rest: Tensor) -> None:
        """Softmax of the image queries over globals and window [N, G + K], and of the others [R, rest keys]."""
        num = len(self.row.globals)
        torch.mm(self.q, self.global_k.T, out=scores[:, :num])
        window = torch.baddbmm(self.plan.window_bias, self.blocks(self.q), self.window_k.transpose(1, 2))
        self.blocks(scores)[:, :, num:] = window
        torch.softmax(scores, dim=-1, out=scores)
        torch.addmm(self.row.rest_bias, self.rest_q, self.rest_k.T, out=rest)
        torch.softmax(rest, dim=-1, out=rest)

    def output(self, scores: Tensor, rest: Tensor, out: Tensor) -> None:
        """Weighted values to ``out`` [T, H]."""
        num = len(self.row.globals)
        image = scores[:, :num] @ self.global_v
        self.blocks(image).baddbmm_(self.blocks(scores)[:, :, num:], self.window_v)
        out[self.plan.image] = self.plan.restore(image)
        out[self.plan.rest] = (rest @ self.rest_v).to(out.dtype)

    def spread(self, per_window: Tensor) -> Tensor:
        """Sum what every block says about its keys: [blocks, K, H] to raster [N, H]."""
        plan = self.plan
        pieces = -(-plan.window // plan.block)
        total = torch.zeros(plan.num_blocks + pieces, plan.block, self.size)
        for piece in range(pieces):
            part = per_window[:, piece * plan.block : (piece + 1) * plan.block]
            total[piece : piece + plan.num_blocks, : part.shape[1]] += part
        return plan.restore(total.view(-1, self.size)[plan.before : plan.before + self.count])

    def gradients(self, scores: Tensor, rest: Tensor, grad: Tensor, into: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add gradients of q, k, v to ``into`` (each float32 [T, H]), for the output's gradient [T, H]."""
        plan, num, scale = self.plan, len(self.row.globals), self.size**-0.5
        grad_q, grad_k, grad_v = into
        image = self.image(grad)
        slope = torch.empty_like(scores)
        torch.mm(image, self.global_v.T, out=slope[:, :num])
        self.blocks(slope)[:, :, num:] = torch.bmm(self.blocks(image), self.window_v.transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(slope, scores, -1, torch.float32, grad_input=slope)
        window_slope, window_scores = self.blocks(slope)[:, :, num:], self.blocks(scores)[:, :, num:]
        query = slope[:, :num] @ self.global_k
        self.blocks(query).baddbmm_(window_slope, self.window_k)
        grad_q[plan.image] = plan.restore(query.mul_(scale))
        grad_k[plan.image] = self.spread(torch.bmm(window_slope.transpose(1, 2), self.blocks(self.q)))
        grad_v[plan.image] = self.spread(torch.bmm(window_scores.transpose(1, 2), self.blocks(image)))
        grad_k[self.row.globals] += slope[:, :num].T @ self.q
        grad_v[self.row.globals] += scores[:, :num].T @ image
        other = grad[plan.rest].float()
        slope = torch._softmax_backward_data(other @ self.rest_v.T, rest, -1, torch.float32)
        grad_q[plan.rest] = (slope @ self.rest_k).mul_(scale)
        grad_k[: plan.rest_keys] += slope.T @ self.rest_q
        grad_v[: plan.rest_keys] += rest.T @ other


class _FoldAttention(torch.autograd.Function):
    """Keeps the weights of softmax for the backward pass, as written-out attention does, but only the folded ones."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: tuple[FoldRow, ...]) -> Tensor:
        _, _, heads, size = q.shape
        keep = any(ctx.needs_input_grad[:3])
        out, kept = torch.empty_like(q), []
        with torch.autocast("cpu", enabled=False):
            for number, row in enumerate(rows):
                head = _Head(row, size)
                width = len(row.globals) + row.plan.window
                copies = heads if keep else 1
                scores, rest = torch.empty(copies, head.count, width), torch.empty(copies, *row.rest_bias.shape)
                for a in range(heads):
                    head.load(q[number, :, a], k[number, :, a], v[number, :, a])
                    head.weights(scores[a % copies], rest[a % copies])
                    head.output(scores[a % copies], rest[a % copies], out[number, :, a])
                kept += [scores, rest]
                out[number, row.plan.num_used :] = v[number, row.plan.num_used :]
        if keep:
            ctx.save_for_backward(q, k, v, *kept)
        ctx.rows = rows
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        total = [torch.zeros(x.shape) for x in (q, k, v)]
        with torch.autocast("cpu", enabled=False):
            for number, row in enumerate(ctx.rows):
                head = _Head(row, q.shape[3])
                scores, rest = kept[2 * number : 2 * number + 2]
                for a in range(q.shape[2]):
                    head.load(q[number, :, a], k[number, :, a], v[number, :, a])
                    grad_q, grad_k, grad_v = (x[number, :, a] for x in total)
                    head.gradients(scores[a], rest[a], grad[number, :, a], (grad_q, grad_k, grad_v))
                total[2][number, row.plan.num_used :] += grad[number, row.plan.num_used :]
        return total[0].to(q.dtype), total[1].to(k.dtype), total[2].to(v.dtype), None
