"""Measuring pairs is cut like training on them: the same numbers, no more memory, equally many passes on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import NativeEngine
from tests.helpers import run_distributed
from tests.live_bytes import LiveBytes
from tests.parallel.cases import BATCH, case_model, case_run, codebook
from tests.tiny import tiny_batch

MEASURED = 3 * BATCH + 3


def engine_of(parallel: dict[str, Any]) -> NativeEngine:
    run = case_run(parallel, case_model())
    return NativeEngine(run, build_mesh(run.parallel, "cpu"), codebook(run))


def measured(parallel: dict[str, Any]) -> tuple[list[float], list[int]]:
    """Losses of ``MEASURED`` pairs, and how many pairs each pass through this rank's last part had."""
    engine = engine_of(parallel)
    pairs: list[int] = []
    engine.parts[-1].register_forward_pre_hook(lambda _, inputs: pairs.append(len(inputs[0]) // 2))
    found = engine.eval_step(tiny_batch(engine.run.model, MEASURED))
    return [float(found.loss), float(found.image_ce), float(found.text_ce)], pairs


@pytest.mark.parametrize(
    ("parallel", "ranks", "passes"),
    [
        ({"num_microbatches": 4}, 1, [2] * 13 + [1]),
        ({"num_microbatches": 2}, 2, [2] * 8),
        ({"num_microbatches": 2, "tensor": 2}, 2, [4] * 8),
        ({"num_microbatches": 4, "pipeline": 2}, 2, [2] * 16),
    ],
    ids=["one process", "data 2", "tensor 2", "pipeline 2"],
)
def test_held_out_pairs_are_cut_like_a_training_step(parallel: dict[str, Any], ranks: int, passes: list[int]) -> None:
    expected, at_once = measured({})
    assert at_once == [BATCH] * 3 + [3]
    for losses, pairs in run_distributed(measured, ranks, parallel) if ranks > 1 else [measured(parallel)]:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert pairs == passes


def test_measuring_takes_no_more_memory_than_training() -> None:
    engine = engine_of({"num_microbatches": BATCH})
    engine.train_step(tiny_batch(engine.run.model, BATCH))
    known = [parameter for _, parameter in engine.named_parameters()]
    peaks = []
    for step, pairs in ((engine.train_step, BATCH), (engine.eval_step, 16 * BATCH)):
        batch = tiny_batch(engine.run.model, pairs)
        with LiveBytes(known) as live:
            step(batch)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0], f"{peaks[1]} bytes for measuring, {peaks[0]} for training"
