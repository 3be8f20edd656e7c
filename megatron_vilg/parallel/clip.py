"""The gradient norm over all parameters of all ranks, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from megatron_vilg.parallel.mesh import Mesh

COUNTED_AXES = ("shard", "tp", "pp")
"""Axes along which ranks hold different values of the weights; replicas hold the same."""


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most ``largest``; returns the norm before.

    Every value counts once: shards are summed over ``shard``, ``tp`` and ``pp``; a weight that all ranks of ``tp`` hold
    counts on the first of them, and replicas hold the same shards.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    if not mesh.is_distributed:
        return torch.nn.utils.clip_grad_norm_(with_grad, largest)
    gradients = [local_part(p.grad) for p in with_grad if p.grad is not None]
    counted = [g for g, p in zip(gradients, with_grad, strict=True) if counts_here(p, mesh)]
    squares = torch.zeros((), device=mesh.device)
    if counted:
        squares = torch.stack(torch._foreach_norm(counted)).square().sum().to(mesh.device)
    norm = mesh.sum(squares, COUNTED_AXES).sqrt()
    if gradients:
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0).to(gradients[0].device))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def counts_here(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this rank's values of a parameter belong in a sum over ``COUNTED_AXES``, so that each counts once."""
    if not mesh.is_distributed:
        return True
    if not isinstance(parameter, DTensor):  # held whole by every rank of its stage
        return mesh.rank("shard") == 0 and mesh.rank("tp") == 0
    return mesh.rank("tp") == 0 or _is_cut(parameter)


def _is_cut(parameter: DTensor) -> bool:
    """Whether each rank of ``tp`` holds other values of it."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tp" in names and not isinstance(parameter.placements[names.index("tp")], Replicate)
