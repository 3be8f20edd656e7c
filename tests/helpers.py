"""Run a function on several processes of this machine: fork, gloo, and a file to meet at, so that no port is needed."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` forked processes in one gloo group.

    Returns:
        What each rank returned (pickled through a pipe), by rank.

    Raises:
        AssertionError: a rank failed or did not end within ``timeout`` seconds; with each rank's traceback. All
            processes are gone then.
    """
    assert not torch.cuda.is_initialized(), "a forked process cannot use CUDA that its parent has started"
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_rank_main, args=(rank, world_size, Path(folder, "store"), pipe[1], function, args))
            for rank, pipe in enumerate(pipes)
        ]
        for process, (_, sending) in zip(processes, pipes, strict=True):
            process.start()
            sending.close()
        try:
            answers = _collect([receiving for receiving, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failed = [f"rank {rank}: {text}" for rank, (is_good, text) in enumerate(answers) if not is_good]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def _collect(pipes: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
    """One answer of each rank; after the first failure the others get two seconds."""
    answers: list[tuple[bool, Any]] = [(False, "no answer in time")] * len(pipes)
    waiting = dict(enumerate(pipes))
    while waiting and time.monotonic() < deadline:
        for rank, pipe in list(waiting.items()):
            if pipe.poll(0.01):
                del waiting[rank]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (False, "died without a word")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 2.0)
    return answers


def _rank_main(
    rank: int, world_size: int, store: Path, answer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        answer.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - whatever it was, the parent reports it
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        os._exit(0)
