"""Processes with equal weights that see different pictures of each batch: what small models need of data parallelism.

FSDP and DDP wrap one ``forward``. An image tokenizer's step calls encoder, codebook, decoder and critic on their own,
with a moving average in between that must see all vectors; so its gradients are averaged in one piece after the
backward pass, as a bucket of DDP would be, and vectors are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from megatron_vilg.parallel.divided import Ranks


@dataclass(frozen=True, slots=True)
class Replicas:
    """This process among ``size`` alike; of one process every method returns its argument."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_group(cls) -> Replicas:
        """All processes of the default group; this one alone where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes for all."""
        return self.rank == 0

    def ranks(self, device: torch.device) -> Ranks | None:
        """All of them as a mesh of one axis; None for one process alone. All processes must call this together."""
        return init_device_mesh(device.type, (self.size,)) if self.size > 1 else None

    def part(self, batch: Tensor) -> Tensor:
        """Every ``size``-th row of a batch [B, ...], from the own rank on: [B / size, ...].

        So the first half of all parts is the first half of the batch, as for one process.
        """
        return batch[self.rank :: self.size]

    def whole(self, part: Tensor) -> Tensor:
        """All parts [B / size, ...] in the order of the batch: [B, ...], without gradient."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes, without gradient."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def means(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``mean`` of several numbers in one message; all processes give the same names in the same order."""
        if self.size == 1 or not values:
            return dict(values)
        together = self.mean(torch.stack([value.detach().float() for value in values.values()]))
        return dict(zip(values, together.unbind(), strict=True))

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their means over all processes, which all have one for the same parameters."""
        if self.size == 1:
            return
        average_together([parameter.grad for parameter in parameters if parameter.grad is not None], self.mean)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every process, by rank, on all processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's picklable value on all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def fill_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite contiguous tensors, as many and as large on all processes, with those of the main one."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any process; all must ask."""
        if self.size == 1:
            return flag
        value = torch.tensor(int(flag))  # on the CPU: the group of ``launch.joined`` always has gloo for that
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)


def average_together(tensors: Sequence[Tensor], mean: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors by their means over processes, in one message; ``mean`` is that of a flat tensor."""
    flat = mean(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, averaged in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(averaged.view_as(tensor))
