"""The option ``--tensor``: one generator shared out among the ranks of a launcher, to draw or to caption."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_vilg.cli.device import chosen_device
from megatron_vilg.config.world import World

if TYPE_CHECKING:
    from megatron_vilg.parallel.mesh import Mesh

WAIT_SECONDS = 3600
"""How long a rank waits for another: groups of ranks with fewer prompts for those with more, all for the one that
writes."""


def add_tensor_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--tensor`` to a verb."""
    parser.add_argument(
        "--tensor",
        metavar="T",
        type=int,
        default=1,
        help="cut the generator over T ranks of torchrun or srun, where it does not fit one device (default: 1)",
    )


def problems_of_tensor(args: argparse.Namespace, world: World) -> list[str]:
    """One line for each reason why ``--tensor`` cannot work with these processes and the other options."""
    ranks = args.tensor
    if ranks < 1:
        return [f"--tensor={ranks}: must be at least 1"]
    if ranks == 1:
        return []
    problems = []
    if world.size == 1:
        launch = f"torchrun --nproc-per-node {ranks} -m megatron_vilg {args.verb} ..."
        problems.append(f"--tensor={ranks}: needs {ranks} processes, there is one. Works: {launch}, or --tensor 1")
    elif world.size % ranks:
        works = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        problems.append(f"--tensor={ranks}: must divide the number of processes, {world.size}. Works: {works}")
    if args.precision == "int8":
        problems.append(
            f"--precision=int8: with --tensor={ranks} its scales, and so the pictures, would depend on the number of "
            "ranks. Works: fp32, bf16"
        )
    return problems


@contextmanager
def generator_ranks(tensor: int, world: World, device: str) -> Iterator[Mesh]:
    """The grid of ranks for the time of the block, ``tensor`` neighbours along ``tp``; with 1 each process is alone.

    Args:
        tensor: checked with ``problems_of_tensor``.
        world: the processes of the launcher.
        device: the option ``--device``; of several GPUs a process gets the one of its local rank.

    Raises:
        ConfigError: the device cannot be used, or the launcher gave no address to meet at.
        LostRankError: another process failed inside the block or is gone.
    """
    from megatron_vilg.config.schema import ParallelConfig
    from megatron_vilg.parallel.launch import device_of, joined
    from megatron_vilg.parallel.mesh import Mesh, build_mesh

    own = device_of(world, chosen_device(device))
    if tensor == 1:
        yield Mesh(own)
        return
    with joined(world, own, WAIT_SECONDS):
        mesh = build_mesh(ParallelConfig(tensor=tensor), own)
        mesh.any(False)  # who leaves with an error while others still connect would cost them a clear message
        yield mesh
