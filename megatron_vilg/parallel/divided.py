"""Work on whole tensors, divided among the ranks that share them: each does some, and all get every result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

Ranks = DeviceMesh
"""Who shares the work, for modules that only pass it on."""

SHARE_NUMEL = 2**22
"""Elements that a rank works on at most before it sends results, unless one tensor alone has more: small tensors go
together, so that ranks neither wait for each other at each of them nor send many short messages."""


def portions(
    tensors: Iterable[Tensor], mesh: DeviceMesh | None = None, share_numel: int = SHARE_NUMEL
) -> Iterator[list[list[Tensor]]]:
    """Tensors in portions for ``divided``, large ones first: each portion of one mesh, with a list for each rank.

    ``mesh`` is that of plain tensors, which all its ranks hold alike; None: nobody else does.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for tensor in tensors:
        by_mesh.setdefault(tensor.device_mesh if isinstance(tensor, DTensor) else mesh, []).append(tensor)
    for shared_by, those in by_mesh.items():
        those.sort(key=Tensor.numel, reverse=True)  # of one size in one portion, so that nobody waits long for others
        num_ranks = 1 if shared_by is None else shared_by.size()
        shares: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        numels = [0] * num_ranks
        for tensor in those:
            least = min(range(num_ranks), key=numels.__getitem__)
            if shares[least] and numels[least] + tensor.numel() > share_numel:
                yield shares
                shares, numels, least = [[] for _ in range(num_ranks)], [0] * num_ranks, 0
            shares[least].append(tensor)
            numels[least] += tensor.numel()
        yield shares


def divided(
    work: Callable[[Tensor], Tensor], shares: list[list[Tensor]], mesh: DeviceMesh | None = None
) -> Iterator[Tensor]:
    """Results of ``work``, which keeps shape and dtype, on whole tensors.

    Every rank gathers all of them, one after the other, keeps those of its own share, works on them, and sends the
    results to all. All ranks of the mesh must call this with the same shares, and take all results.

    Args:
        work: from a whole tensor to one like it.
        shares: a list for each rank of the mesh, of DTensors of that mesh, or of plain tensors; all of one dtype.
        mesh: as ``portions`` was given it.

    Yields:
        the results, share by share, those of one share at a time so that a rank need not hold all of them whole;
        replicated DTensors where DTensors were given.
    """
    first = shares[0][0]
    shared_by = first.device_mesh if isinstance(first, DTensor) else mesh
    if shared_by is None:
        yield from map(work, shares[0])
        return
    here = tuple(shared_by.get_coordinate() or ())
    owners = [tuple(map(int, np.unravel_index(rank, shared_by.shape))) for rank in range(len(shares))]
    mine: list[Tensor] = []
    for owner, share in zip(owners, shares, strict=True):
        for tensor in share:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if owner == here:
                mine.append(whole)
    done = [work(whole).flatten() for whole in mine]
    del mine
    like = first.to_local() if isinstance(first, DTensor) else first
    for owner, share in zip(owners, shares, strict=True):
        if not share:
            continue
        numels = [tensor.numel() for tensor in share]
        results = torch.cat(done) if owner == here else like.new_empty(sum(numels))
        # Along one axis after the other: first to the owner's row, then from that row to all others.
        for axis in reversed(range(shared_by.ndim)):
            if shared_by.size(axis) > 1:
                dist.broadcast(results, group=shared_by.get_group(axis), group_src=owner[axis])
        for tensor, flat in zip(share, results.split(numels), strict=True):
            result = flat.view(tensor.shape)
            if isinstance(tensor, DTensor):
                result = DTensor.from_local(result, shared_by, [Replicate()] * shared_by.ndim, run_check=False)
            yield result
