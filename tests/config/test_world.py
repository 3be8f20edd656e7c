"""What a launcher says about a process."""

from __future__ import annotations

import pytest

from megatron_vilg.config.world import World, read_world
from megatron_vilg.errors import ConfigError


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_world({}) == World(0, 1, 0) and read_world({}).is_main


def test_torchrun_is_understood() -> None:
    world = read_world({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert world == World(5, 8, 1, 4) and not world.is_main


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=''.*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK=''"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2.*Works: 0 to 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    ],
)
def test_what_cannot_be_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_world(environment)
