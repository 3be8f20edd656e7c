"""Products with a layer's matrix. On a CPU in fp32 they go to oneDNN, which is ahead of what torch calls there (MKL).

``torch.nn.functional.linear`` gives fp32 products on CPUs to MKL, and only those in bf16 to oneDNN. With AVX-512 on a
processor that is not Intel's, oneDNN gets through a fifth to a quarter more products of the sizes of a training step
(``docs/performance.md``), forward and for the gradient by the input; the gradient by the weight is as fast in MKL.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@cache
def has_onednn() -> bool:
    """Whether this build of torch and this processor have oneDNN's products."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, by oneDNN where that pays, else by torch; differentiable.

    Args:
        x: [..., D].
        weight: [E, D].
        bias: [E].

    Returns:
        [..., E].
    """
    if not _onednn_pays(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return onednn_product(x, weight, bias)


def _onednn_pays(x: Tensor, weight: Tensor) -> bool:
    """Plain fp32 tensors on a CPU; a DTensor, or anything else that overrides torch's functions, is left to torch."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and has_onednn()
    )


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``linear`` by oneDNN without gradient.

    Args:
        weight: [E, D], also one that oneDNN packed beforehand.
        activation: ``none``, or what is applied to the result while it is in the cache: ``gelu`` (the exact one).
    """
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none"))


class _Linear(torch.autograd.Function):
    """The product and its three gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            onednn_product(grad, weight.T, None) if needs_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
