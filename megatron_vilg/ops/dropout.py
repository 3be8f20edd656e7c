"""Dropout whose choices cost a CPU less: fifteen random bits per value instead of a number of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEPS = 2**15
"""Resolution of the probability."""


def dropout(x: Tensor, probability: float, *, training: bool) -> Tensor:
    """Zero values of ``x`` with ``probability`` while training and scale the others up; any shape.

    On a CPU torch draws one Bernoulli number per value, which takes four times as long; the probability is rounded to
    1 / 32768 there. On other devices, and for tensors that override torch's functions, this is torch's own.
    """
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or type(x) is not Tensor or not 0.5 < probability * _STEPS < _STEPS - 0.5:
        return F.dropout(x, probability)
    result: Tensor = _Dropout.apply(x, keep_mask(x, probability), 1.0 / (1.0 - round(probability * _STEPS) / _STEPS))
    return result


def keep_mask(x: Tensor, probability: float) -> Tensor:
    """Which values stay: bool, of the shape of ``x``; from torch's generator."""
    # Each number of random_() has 63 random bits, so the top bit of its last quarter is no choice: leave out all four.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_()
    choices = words.view(torch.int16).bitwise_and_(_STEPS - 1)[: x.numel()]
    return (choices >= round(probability * _STEPS)).view(x.shape)


class _Dropout(torch.autograd.Function):
    """``x * keep * scale``, remembering one byte per value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None
