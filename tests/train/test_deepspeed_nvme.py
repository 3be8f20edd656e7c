"""Optimizer state and weights on a local disk under DeepSpeed: the steps of one native process, and they resume."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.config.schema import RunConfig
from tests.helpers import run_distributed
from tests.train.test_deepspeed import (
    STEPS,
    _imported_before_the_fork,  # noqa: F401 - a fixture
    run_of,
    start,
    steps_then_save,
    train,
    whole_run,
)

pytestmark = pytest.mark.slow
OFFLOADS = {
    "optimizer": {"offload_optimizer": "nvme"},
    "weights": {"offload_weights": "nvme"},
    "both": {"offload_optimizer": "nvme", "offload_weights": "nvme"},
}


@pytest.fixture(scope="module", autouse=True)
def _compiled_before_the_fork() -> None:
    """DeepSpeed compiles its operation at the first use; minutes, once per machine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed cannot compile async_io here; it needs libaio (Debian: libaio-dev) and a C++ compiler")
    AsyncIOBuilder().load(verbose=False)


WIDE = {"width": 512, "num_layers": 2}
"""DeepSpeed leaves tensors below 1 MiB in memory."""


def run_on_disk(folder: Path, what: dict[str, Any]) -> RunConfig:
    parallel = {"zero": 3, "num_microbatches": 2, "offload_folder": str(folder), **what}
    return calm(run_of(parallel=parallel, model=WIDE))


def calm(run: RunConfig) -> RunConfig:
    """A rate at which this width does not magnify rounding."""
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=1e-3))


def run_and_look(run: RunConfig) -> tuple[Any, int]:
    """What ``whole_run`` returns, and the bytes on disk while the engine lived."""
    found = whole_run(run)
    folder = Path(run.parallel.offload_folder)
    return found, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def native() -> Any:
    return whole_run(calm(run_of("native", model=WIDE)))


@pytest.mark.parametrize("what", OFFLOADS.values(), ids=OFFLOADS)
def test_offloaded_steps_equal_one_native_process(what: dict[str, Any], native: Any, tmp_path: Path) -> None:
    found = run_distributed(run_and_look, 2, run_on_disk(tmp_path, what), timeout=600.0)
    steps, held_out, weights = found[0][0]
    for ours, theirs in zip(steps, native[0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert held_out == pytest.approx(native[1], rel=2e-5)
    for name, tensor in native[2].items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0, msg=name)
    assert min(size for _, size in found) > 1 << 20


def test_an_offloaded_run_resumes(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()

    def both(run: RunConfig) -> tuple[Any, Any]:
        straight = train(start(run), range(STEPS))
        folder = tmp_path / "checkpoints"
        return straight, [*steps_then_save(run, folder, range(2)), *steps_then_save(run, folder, range(2, STEPS))]

    run = run_on_disk(tmp_path / "disk", OFFLOADS["both"])
    straight, resumed = run_distributed(both, 2, run, timeout=900.0)[0]
    assert resumed == straight
