"""Work on whole tensors, divided among the ranks that share them: each does some, and all get every result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


def portions(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in lists for ``divided``, large ones first: of one mesh each, no longer than that has ranks."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        by_mesh.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else None, []).append(tensor)
    for mesh, those in by_mesh.items():
        those.sort(key=Tensor.numel, reverse=True)  # of one size in one list, so that nobody waits long for others
        size = 1 if mesh is None else mesh.size()
        yield from (those[first : first + size] for first in range(0, len(those), size))


def divided(work: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> Iterator[Tensor]:
    """Results of ``work``, which keeps shape and dtype, on whole tensors.

    Every rank gathers all of them, one after the other, keeps the one whose place in the list is its own, works on
    that, and sends the result to all. All ranks of the mesh must call this with the same list, and take all results.

    Args:
        work: from a whole tensor to one like it.
        tensors: DTensors of one mesh, as many as it has ranks or fewer; or plain tensors, for which nothing is divided.

    Yields:
        the results in order, one at a time so that a rank need not hold all of them whole; replicated DTensors where
        DTensors were given.
    """
    first = tensors[0]
    if not isinstance(first, DTensor):
        yield from map(work, tensors)
        return
    mesh = first.device_mesh
    here = tuple(mesh.get_coordinate() or ())
    owners = [tuple(map(int, np.unravel_index(place, mesh.shape))) for place in range(len(tensors))]
    mine: Tensor | None = None
    for owner, tensor in zip(owners, tensors, strict=True):
        assert isinstance(tensor, DTensor)
        whole = tensor.full_tensor()
        if owner == here:
            mine = whole
    if mine is not None:
        mine = work(mine).contiguous()
    for owner, tensor in zip(owners, tensors, strict=True):
        result = mine if owner == here and mine is not None else first.to_local().new_empty(tensor.shape)
        # Along one axis after the other: first to the owner's row, then from that row to all others.
        for axis in reversed(range(mesh.ndim)):
            if mesh.size(axis) > 1:
                dist.broadcast(result, group=mesh.get_group(axis), group_src=owner[axis])
        yield DTensor.from_local(result, mesh, [Replicate()] * mesh.ndim, run_check=False)
