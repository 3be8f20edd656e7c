"""Whole runs on several ranks: metrics, signals, resuming in another layout, the exported model, sample pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, DataConfig, LogConfig, ParallelConfig, RunConfig
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.pretrain import pretrain
from tests.helpers import run_distributed
from tests.parallel.cases import case_model
from tests.tiny import tiny_run
from tests.train.token_caches import CODES, write_cache

STEPS, STOP_AT = 6, 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return write_cache(tmp_path_factory.mktemp("cache") / "tokens", {"train": 10, "val": 3})


@pytest.fixture
def run(cache: TokenCache) -> RunConfig:
    words = cache.settings["text_vocab_size"]
    model = case_model(text_vocab_size=words + words % 2, image_vocab_size=CODES + CODES % 2, codebook_dim=0)
    base = tiny_run(model, num_steps=STEPS, batch_size=8, eval_every=3, eval_pairs=3, sample_every=2)
    return dataclasses.replace(
        base,
        data=DataConfig(caption_dropout=0.2, image_input_noise=0.1, image_source_noise=0.1),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def with_layout(run: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(run, parallel=ParallelConfig(**values))


def train(run: RunConfig, cache: TokenCache, out: Path, stop_rank: int = -1) -> tuple[bool, list[int]]:
    """Whether the run was completed, and the steps at which this rank drew samples."""
    drawn: list[int] = []

    def on_sample(model: ViLG, step: int, writer: object) -> None:
        assert torch.isfinite(next(iter(model.parameters()))).all() and model.norm is not None
        drawn.append(step)

    mesh = build_mesh(run.parallel, "cpu")
    if dist.is_initialized() and dist.get_rank() == stop_rank:
        any_rank, calls = type(mesh).any, [0]

        def stop_then_ask(self: object, flag: bool) -> bool:
            calls[0] += 1
            if calls[0] == STOP_AT:
                os.kill(os.getpid(), signal.SIGUSR1)
            return any_rank(self, flag or calls[0] == STOP_AT)  # type: ignore[arg-type]

        type(mesh).any = stop_then_ask  # type: ignore[method-assign, assignment]
    return pretrain(run, cache, out, mesh=mesh, on_sample=on_sample), drawn


def rows(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("step", "loss", "grad", "lr", "val"))} for row in lines]


def assert_same_run(out: Path, straight: Path) -> None:
    found, expected = rows(out), rows(straight)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-5)
    (_, weights), (_, expected_weights) = load_model_folder(out / "export"), load_model_folder(straight / "export")
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_stopped_in_one_layout_and_resumed_in_another_equals_a_straight_run(
    tmp_path: Path, cache: TokenCache, run: RunConfig
) -> None:
    assert train(run, cache, tmp_path / "straight")[0]
    out = tmp_path / "out"
    first = with_layout(run, pipeline=2, num_microbatches=2)
    assert run_distributed(train, 2, first, cache, out, 1) == [(False, [2]), (False, [])]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    assert not (out / "export").exists()
    second = dataclasses.replace(
        with_layout(run, replica=2, zero=2, num_microbatches=2), checkpoint=CheckpointConfig(every=2, async_save=True)
    )
    answers = run_distributed(train, 2, second, cache, out)
    assert answers == [(True, [4, 6]), (True, [])]
    assert_same_run(out, tmp_path / "straight")
    third = tmp_path / "out" / "checkpoints" / f"step-{STEPS:08d}"
    assert json.loads((third / "manifest.json").read_text())["layout"]["replica"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (4, {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 2, "num_microbatches": 2}),
        (2, {"cpu_offload": True}),
        (8, {"tensor": 2, "pipeline": 2, "num_microbatches": 2}),
    ],
    ids=["interleaved", "offloaded", "2 x 2 x 2"],
)
def test_whole_run_in_a_rarer_layout(
    tmp_path: Path, cache: TokenCache, run: RunConfig, world_size: int, layout: dict[str, Any]
) -> None:
    assert train(run, cache, tmp_path / "straight")[0]
    run_distributed(train, world_size, with_layout(run, **layout), cache, tmp_path / "out", timeout=300)
    assert_same_run(tmp_path / "out", tmp_path / "straight")


def save_and_load_wrongly(folder: Path) -> list[str]:
    """Every rank writes a tensor of its own, then expects another shape on rank 1 alone."""
    mesh = build_mesh(ParallelConfig(), "cpu")
    checkpointer = Checkpointer(folder, CheckpointConfig(), mesh)
    rank = dist.get_rank()
    checkpointer.save(1, {"model": {f"w{rank}": torch.full((2,), float(rank))}}, Manifest(kind="test", step=1))
    path = checkpointer.latest()
    assert path is not None
    right = torch.zeros(2)
    checkpointer.load(path, {"model": {f"w{rank}": right}})
    assert right.tolist() == [rank, rank]
    try:
        checkpointer.load(path, {"model": {f"w{rank}": torch.zeros(2 + rank)}})
    except CheckpointError as error:
        return str(error).splitlines()[1:]
    return []


def test_ranks_may_hold_other_names_and_refuse_together(tmp_path: Path) -> None:
    answers = run_distributed(save_and_load_wrongly, 2, tmp_path / "checkpoints")
    works = "  Works: the options that it was written with, or another output folder"
    assert answers == [["  model.w1: checkpoint has shape (2,), expected (3,)", works]] * 2
