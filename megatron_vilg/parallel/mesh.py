"""Where a process stands in the grid of ranks, and the small sums that training needs over its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_vilg.config.schema import ParallelConfig
from megatron_vilg.parallel.launch import Job

Value = TypeVar("Value")
AXES = ("pp", "replica", "shard", "tp")
"""Pipeline, copies of the sharded weights, shards, tensor: the last one changes fastest from rank to rank."""
DATA_AXES = ("replica", "shard")
"""Axes along which ranks see different pairs."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """The grid of ranks, passed around; there are no global groups.

    Without a process group (``root`` None) every axis has size 1 and every sum is the value itself.
    """

    device: torch.device
    """The device of this rank."""
    root: DeviceMesh | None = None
    """Axes ``AXES``."""
    job: Job | None = None
    """Where ranks wait for the main one without a time limit; None: they do not."""

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group."""
        return self.root is not None

    @property
    def is_main(self) -> bool:
        """Whether this rank reports and writes for all."""
        return self.root is None or dist.get_rank() == 0

    @property
    def place(self) -> tuple[int, int]:
        """This rank's number among all, and how many there are."""
        return (0, 1) if self.root is None else (dist.get_rank(), dist.get_world_size())

    def axis(self, *names: str) -> DeviceMesh:
        """The part of the grid along these axes that this rank belongs to."""
        assert self.root is not None, "one process has no mesh"
        return self.root[names if len(names) > 1 else names[0]]

    def size(self, name: str) -> int:
        """Ranks along an axis."""
        return 1 if self.root is None else self.root[name].size()

    def rank(self, name: str) -> int:
        """This rank's number along an axis."""
        return 0 if self.root is None else self.root.get_local_rank(name)

    @property
    def data_size(self) -> int:
        """Groups of ranks that see different pairs."""
        return self.size("replica") * self.size("shard")

    @property
    def data_rank(self) -> int:
        """The share of each batch that this rank sees."""
        return self.rank("replica") * self.size("shard") + self.rank("shard")

    def sum(self, value: Tensor, axes: Sequence[str]) -> Tensor:
        """``value`` summed over all ranks along ``axes``; the same on each of them."""
        value = value.clone()
        for name in axes:
            if self.size(name) > 1:
                dist.all_reduce(value, group=self.axis(name).get_group())
        return value

    def max(self, value: Tensor, axes: Sequence[str]) -> Tensor:
        """The largest ``value`` of all ranks along ``axes``, number by number; the same on each of them."""
        value = value.clone()
        for name in axes:
            if self.size(name) > 1:
                dist.all_reduce(value, dist.ReduceOp.MAX, group=self.axis(name).get_group())
        return value

    def data_mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all data ranks, without gradient."""
        value = value.detach()
        return value if self.data_size == 1 else self.sum(value, DATA_AXES) / self.data_size

    def same(self, value: Tensor, axis: str) -> Tensor:
        """The ``value`` of the first rank along an axis, on all of them; those of the others have the same shape."""
        if self.size(axis) == 1:
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        dist.broadcast(value, group=self.axis(axis).get_group(), group_src=0)
        return value

    @property
    def has_copies(self) -> bool:
        """Whether other ranks hold what is whole on each rank of a pipeline stage."""
        return self.data_size * self.size("tp") > 1

    def copies_mean(self, value: Tensor) -> Tensor:
        """``data_mean`` for what is whole on each rank of ``tp``: that of the first one, on all of them.

        They compute the same from the same inputs, but on a GPU not to the last bit, so that copies would drift apart.
        """
        return self.same(self.data_mean(value), "tp")

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank; all ranks must ask."""
        if self.root is None:
            return flag
        value = torch.tensor(int(flag))  # on the CPU, by gloo: no rank waits for what its GPU has still to do
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, by rank, on all ranks."""
        if self.root is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's picklable value on all ranks."""
        if self.root is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_first(self, name: str, work: Callable[[], Value]) -> Value:
        """``Job.main_first`` of the job, if there is one; all ranks make this call."""
        return work() if self.job is None else self.job.main_first(name, work)


def build_mesh(parallel: ParallelConfig, device: torch.device | str, job: Job | None = None) -> Mesh:
    """The grid for the current process group, of whose size ``parallel`` has been checked; or none for one process.

    Args:
        parallel: sizes of the axes.
        device: of this rank.
        job: all ranks, if they may have to wait long for the main one.
    """
    device = torch.device(device)
    if not dist.is_initialized():
        return Mesh(device)
    fixed = parallel.pipeline * parallel.replica * parallel.tensor
    shard = parallel.shard if parallel.shard > 0 else dist.get_world_size() // fixed
    shape = (parallel.pipeline, parallel.replica, shard, parallel.tensor)
    return Mesh(device, init_device_mesh(device.type, shape, mesh_dim_names=AXES), job)
