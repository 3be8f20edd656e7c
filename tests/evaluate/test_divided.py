"""Several processes that evaluate together draw and say what one alone does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.cli.main import main
from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.evaluate.divided import DividedPipeline
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.parallel.replicas import Replicas
from tests.cli.test_tensor import commands
from tests.helpers import run_distributed
from tests.tiny_run import CAPTIONS, write_tiny_pairs, write_tiny_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided") / "run"
    write_tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pairs(tmp_path_factory.mktemp("data"))


def _draw_and_say(run_folder: Path, count: int) -> list[Any]:
    pipeline = DividedPipeline(Pipeline.load(run_folder), Replicas.of_group())
    prompts = (CAPTIONS * 2)[:count]
    chosen = SampleConfig(rerank=4, rerank_drawing_weight=0.5)
    ids, scores = pipeline.draw_candidates(prompts, num_images=2, settings=chosen, seed=5)
    plain, none = pipeline.draw_candidates(prompts, num_images=2, settings=SampleConfig(), seed=5)
    codes = ids[:, 0]
    said = pipeline.caption(codes), pipeline.caption_of_candidates(codes, 3, seed=5)
    return [ids, scores, plain, none, *said, pipeline.decode(codes)]


@pytest.mark.parametrize("count", [5, 2], ids=["uneven stretches", "one process without any"])
def test_three_processes_draw_and_say_what_one_does(run_folder: Path, count: int) -> None:
    alone = _draw_and_say(run_folder, count)
    assert alone[0].shape[:2] == (count, 4) and alone[3] is None and len(alone[4]) == count
    for found in run_distributed(_draw_and_say, 3, run_folder, count):
        for ours, theirs in zip(found, alone, strict=True):
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            else:
                assert ours == theirs


def test_numbers_of_prompts_and_pictures_decide(run_folder: Path) -> None:
    pipeline = Pipeline.load(run_folder)
    options: dict[str, Any] = {"num_images": 2, "settings": SampleConfig(rerank=3), "seed": 1}
    whole, _ = pipeline.draw_candidates(CAPTIONS[:3], **options)
    part, _ = pipeline.draw_candidates(CAPTIONS[1:3], first_prompt=1, **options)
    assert torch.equal(whole[1:], part)
    codes = whole[:, 0]
    said = pipeline.caption(codes, settings=SampleConfig(), seed=1)
    assert said[1:] == pipeline.caption(codes[1:], settings=SampleConfig(), seed=1, first_picture=1)
    assert said[1:] != pipeline.caption(codes[1:], settings=SampleConfig(), seed=1)
    best = pipeline.caption_of_candidates(codes, 12, seed=1)
    assert best[1:] == pipeline.caption_of_candidates(codes[1:], 12, seed=1, first_picture=1)


def _report(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {key: value for key, value in report.items() if key != "seconds"}


def test_one_of_two_processes_writes_the_report_that_one_alone_writes(
    run_folder: Path, data: Path, tmp_path: Path, free_port: int
) -> None:
    command = ["evaluate", "--load", str(run_folder), "--data", str(data), "--device", "cpu", "--max-prompts", "3"]
    command += ["sample.rerank=3", "sample.caption_candidates=2"]
    assert main([*command, "--out", str(tmp_path / "alone")]) == 0
    found = run_distributed(commands, 2, free_port, [*command, "--out", str(tmp_path / "both")])
    assert [code for [(code, _, _)] in found] == [0, 0]
    assert "report:" in found[0][0][2] and "report:" not in found[1][0][2]
    names = {"report.json", "report.png", "report.html"}
    assert {path.name for path in (tmp_path / "both").iterdir()} == names
    assert _report(tmp_path / "both") == _report(tmp_path / "alone")
