"""Join the processes of a job in one process group, and let them wait for the first one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_vilg.config.world import World
from megatron_vilg.errors import ConfigError
from megatron_vilg.log import get_logger

log = get_logger(__name__)
Value = TypeVar("Value")
_POLL = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Job:
    """All processes of this run."""

    world: World
    store: dist.Store | None
    """Where processes leave each other small notes; None for one process."""

    def main_first(self, name: str, work: Callable[[], Value]) -> Value:
        """Do ``work`` on the main process, then on all others, however long the first takes.

        Args:
            name: a word for this meeting, used once in a job.
            work: called once on every process.
        """
        if self.store is None or self.world.is_main:
            result = work()
            if self.store is not None:
                self.store.set(name, "done")
            return result
        while not self._has(name):
            log.info("waiting for the main process: %s", name)
        return work()

    def _has(self, name: str) -> bool:
        assert self.store is not None
        try:
            self.store.wait([name], _POLL)
        except dist.DistStoreError as error:
            if "timeout" not in str(error).lower():
                raise
            return False
        return True


@contextmanager
def joined(world: World, device: torch.device, timeout_seconds: int) -> Iterator[Job]:
    """One process group of all processes for the time of the block; nothing at all for one process.

    CPU tensors travel by gloo, those of GPUs by NCCL. A collective that waits longer than ``timeout_seconds`` for
    another process fails.

    Raises:
        ConfigError: the launcher gave no address to meet at.
    """
    if world.size == 1:
        yield Job(world, None)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError([f"{name}: not set, so {world.size} processes cannot meet. Works: torchrun sets it."])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Job(world, dist.PrefixStore("notes", store))
    finally:
        dist.destroy_process_group()


def device_of(world: World, device: torch.device) -> torch.device:
    """The device of this process: where there are several processes, the GPU of its local rank.

    Raises:
        ConfigError: the machine has fewer GPUs than processes.
    """
    if device.type != "cuda" or world.size == 1:
        return device
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise ConfigError([f"LOCAL_RANK={world.local_rank}: this machine has {count} GPUs. Works: 0 to {count - 1}."])
    return torch.device("cuda", world.local_rank)
