"""A rank dies, fails or hangs; the others say which one, soon."""

from __future__ import annotations

import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from megatron_vilg.config.world import World
from megatron_vilg.errors import ConfigError, LostRankError
from megatron_vilg.parallel.launch import is_lost_connection, joined


def rank_main(rank: int, port: int, how: str, answer: Connection) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), SLURMD_NODENAME=f"n{rank}")
    try:
        with joined(World(rank, 3, rank), torch.device("cpu"), 8):
            dist.all_reduce(torch.ones(()))
            if rank == 1 and how != "fails":
                os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
            if rank == 1:
                raise ValueError("a bad sample")
            dist.all_reduce(torch.ones(()))
    except (LostRankError, ValueError) as error:
        answer.send(f"{type(error).__name__}: {error}")
    finally:
        os._exit(0)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", " gives no sign of life"),
        ("hangs", " gives no sign of life"),
        ("fails", ": ValueError: a bad sample"),
    ],
)
def test_the_lost_rank_is_named(how: str, said: str, free_port: int) -> None:
    context = get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    processes = [context.Process(target=rank_main, args=(rank, free_port, how, pipes[rank][1])) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        answers = [pipes[rank][0].recv() for rank in (0, 2) if pipes[rank][0].poll(60)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Whoever leaves first may leave the other without a store: at least one names the culprit, nobody an innocent.
    culprit = f"rank 1 (node n1, process {processes[1].pid}){said}"
    assert any(culprit in answer for answer in answers), answers
    assert not any("rank 2 (node n2" in answer.split(" Noticed by")[0] for answer in answers)


def test_errors_of_its_own_are_told_from_lost_partners() -> None:
    assert is_lost_connection(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"))
    assert is_lost_connection(dist.DistBackendError("NCCL error"))
    assert not is_lost_connection(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_lost_connection(ValueError("timed out"))
    assert not is_lost_connection(ConfigError(["x"]))
    wrapped = ConfigError(["the checkpoint cannot be written"])
    wrapped.__cause__ = RuntimeError("Connection closed by peer")
    assert is_lost_connection(wrapped)
