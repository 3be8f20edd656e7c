"""Batch normalisation over the pictures of all data ranks: what one process with all of them computes.

torch's ``SyncBatchNorm`` does the same on CUDA devices only, and this must be comparable on any.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vilg.parallel.mesh import DATA_AXES, Mesh

_BATCH_AND_PLACES = (0, 2, 3)


def share_batch_norms(module: nn.Module, mesh: Mesh) -> None:
    """Let every ``BatchNorm2d`` in a module take its mean and variance from all data ranks' equally large batches.

    For layers without running statistics. All data ranks must run the module, forward and backward, in the same order.
    """
    if mesh.data_size == 1:
        return
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert not layer.track_running_stats, "running statistics would be those of one rank"
            layer.forward = partial(_normalise, layer, mesh)  # type: ignore[method-assign]


def _normalise(layer: nn.BatchNorm2d, mesh: Mesh, x: Tensor) -> Tensor:
    """[B, C, H, W] to the same, normalised per channel in float32."""
    with torch.autocast(x.device.type, enabled=False):
        values = x.float()
        count = mesh.data_size * values[:, 0].numel()
        mean = _TotalOverData.apply(values.sum(_BATCH_AND_PLACES, keepdim=True), mesh) / count
        values = values - mean  # first the mean, then the variance: a difference of squares would lose digits
        variance = _TotalOverData.apply(values.square().sum(_BATCH_AND_PLACES, keepdim=True), mesh) / count
        values = values * torch.rsqrt(variance + layer.eps)
        return (values * layer.weight[:, None, None] + layer.bias[:, None, None]).to(x.dtype)


class _TotalOverData(torch.autograd.Function):
    """Sum over data ranks. Each rank's loss depends on it, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return mesh.sum(value, DATA_AXES)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.mesh.sum(grad, DATA_AXES), None
