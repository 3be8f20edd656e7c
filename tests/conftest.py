"""What holds for every test: one torch thread, fixed seeds."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Iterator

# Before torch is imported anywhere: tests fork later, and a fork behind OpenMP's threads can hang.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Before anything imports Triton (torchao does): its own functions are built for the interpreter or not at all.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """Tests that draw without a generator of their own draw the same numbers, in any order of tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forcing files to the disk guards against a loss of power, which no test stages, and takes most of their time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A test that runs a command configures logging; the next test shall not notice."""
    _forget_logging()  # what a fixture of a module configured
    yield
    _forget_logging()


def _forget_logging() -> None:
    logger = logging.getLogger("megatron_vilg")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
