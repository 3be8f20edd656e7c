"""Who this process is among the processes of its job, read from the environment, as torchrun sets it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vilg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class World:
    """One process of a job."""

    rank: int = 0
    """Number of this process, 0 to ``size - 1``; rank 0 reports and writes."""
    size: int = 1
    """Processes of the job."""
    local_rank: int = 0
    """Number of this process on its machine; it takes the GPU of this number."""
    local_size: int = 1
    """Processes on its machine, as far as the launcher says: torchrun does."""

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes for all."""
        return self.rank == 0


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """The world that the launcher describes; one process without a launcher.

    Args:
        environment: variables to read instead of those of this process.

    Raises:
        ConfigError: a variable is missing or no number, or the rank does not exist.
    """
    env = os.environ if environment is None else environment
    size = _number(env, "WORLD_SIZE", "1")
    alone = "0" if size == 1 else ""
    local = _number(env, "LOCAL_RANK", alone), _number(env, "LOCAL_WORLD_SIZE", "1")
    world = World(_number(env, "RANK", alone), size, *local)
    if not 0 <= world.rank < size:
        raise ConfigError([f"RANK={world.rank}: must be below WORLD_SIZE={size}. Works: 0 to {size - 1}."])
    return world


def _number(env: Mapping[str, str], name: str, default: str) -> int:
    value = env.get(name, default)
    if not value.isdecimal():
        raise ConfigError([f"{name}={value!r}: must be a number. Works: let torchrun or srun start the processes."])
    return int(value)
