"""Whole tensors cut by rows over all processes, in main memory: how state cut otherwise gets into a checkpoint."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard


class Rows:
    """All processes of the job, each with an equal share of the rows of every tensor. All make the same calls."""

    def __init__(self) -> None:
        self._size = dist.get_world_size()
        self._mesh = init_device_mesh("cpu", (self._size,)) if self._size > 1 else None

    def cut(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor that all have: a copy in main memory that knows its place."""
        if self._mesh is None or whole.ndim == 0:
            return whole.detach().to("cpu", copy=True)
        pieces = whole.detach().chunk(self._size)
        rank = self._mesh.get_local_rank()
        mine = pieces[rank] if rank < len(pieces) else whole.detach()[:0]
        return DTensor.from_local(
            mine.to("cpu", copy=True).contiguous(),
            self._mesh,
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=torch.empty(whole.shape, device="meta").stride(),
        )

    def whole(self, part: Tensor) -> Tensor:
        """The tensor that ``part`` was cut from, in main memory, on all processes."""
        return part.full_tensor() if isinstance(part, DTensor) else part
