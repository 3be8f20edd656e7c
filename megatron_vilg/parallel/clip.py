"""The gradient norm over all parameters of all ranks, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_vilg.parallel.mesh import Mesh


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most ``largest``; returns the norm before.

    Every value counts once: shards are summed over ``shard``, ``tp`` and ``pp``; a weight that all ranks of ``tp`` hold
    counts on the first of them, and replicas hold the same shards.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not mesh.is_distributed:
        return torch.nn.utils.clip_grad_norm_(with_grad, largest)
    gradients = [_local(p.grad) for p in with_grad if p.grad is not None]
    counted = [g for g, p in zip(gradients, with_grad, strict=True) if mesh.rank("tp") == 0 or _is_cut(p)]
    squares = torch.zeros((), device=mesh.device)
    if counted:
        squares = torch.stack(torch._foreach_norm(counted)).square().sum().to(mesh.device)
    norm = mesh.sum(squares, ("shard", "tp", "pp")).sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))
    return norm


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _is_cut(parameter: nn.Parameter) -> bool:
    """Whether each rank of ``tp`` holds other values of it."""
    assert isinstance(parameter, DTensor), "every parameter of a distributed model is a DTensor"
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in names and not isinstance(parameter.placements[names.index("tp")], Replicate)
