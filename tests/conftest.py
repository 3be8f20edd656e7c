"""What holds for every test: one torch thread, fixed seeds."""

from __future__ import annotations

import os
import random

# Before torch is imported anywhere: tests fork later, and a fork behind OpenMP's threads can hang.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """Tests that draw without a generator of their own draw the same numbers, in any order of tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
