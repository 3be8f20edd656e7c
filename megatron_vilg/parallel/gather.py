"""Whole tensors on the main rank, one at a time, from whatever layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_vilg.parallel.mesh import Mesh


def whole_tensors(
    state: Mapping[str, Tensor], names: Mapping[str, tuple[torch.Size, torch.dtype]], mesh: Mesh
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model in the order of ``names``; all ranks must go through to the end.

    Args:
        state: this rank's tensors or shards by name.
        names: shape and type of every tensor of the whole model, the same on all ranks.
        mesh: the grid of ranks.

    Yields:
        Name and whole tensor on the main rank (on its device, detached), nothing on the others.
    """
    if not mesh.is_distributed:
        yield from state.items()
        return
    owners: dict[str, int] = {}
    for rank, held in enumerate(mesh.gather(sorted(state))):
        for name in held:
            owners.setdefault(name, rank)
    for name, (shape, dtype) in names.items():
        tensor = _whole(state[name], mesh) if name in state else None
        owner = owners[name]  # the first rank of a stage: its number along all other axes is 0
        if owner != 0 and dist.get_rank() == owner:
            assert tensor is not None
            dist.send(tensor, dst=0)
        elif owner != 0 and mesh.is_main:
            tensor = torch.empty(shape, dtype=dtype, device=mesh.device)
            dist.recv(tensor, src=owner)
        if mesh.is_main:
            assert tensor is not None
            yield name, tensor


def _whole(tensor: Tensor, mesh: Mesh) -> Tensor:
    if isinstance(tensor, DTensor):
        here = tensor.to(mesh.device)  # it may be offloaded
        assert isinstance(here, DTensor)
        tensor = here.full_tensor()
    return tensor.detach().contiguous()
