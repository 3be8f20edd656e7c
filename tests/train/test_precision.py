"""precision=auto is settled once for a run, by all of its processes, and kept on resuming."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vilg.checkpoint.image_tokenizer import WORK_NAME
from megatron_vilg.checkpoint.manifest import Manifest, write_manifest
from megatron_vilg.config.load import RUN_FILE, write_run_folder_config
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.ops import precision as ops_precision
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.precision import settle_precision
from megatron_vilg.train.vqgan_engine import VQGANEngine
from tests.helpers import run_distributed
from tests.tiny import tiny_run
from tests.train.vqgan_case import tiny_run as tiny_tokenizer_run

FAST, SLOW = {"avx512_bf16": True}, {"avx2": True}


def both(run: RunConfig) -> tuple[str, str]:
    return run.train.precision, run.image_tokenizer_train.precision


def pretend(monkeypatch: pytest.MonkeyPatch, instructions: dict[str, Any]) -> None:
    monkeypatch.setattr(ops_precision, "cpu_instructions", lambda: instructions)


@pytest.mark.parametrize(("instructions", "expected"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_by_hardware(instructions: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, instructions)
    assert both(settle_precision(RunConfig(), "cpu")) == (expected, expected)


def test_asked_for_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SLOW)
    run = RunConfig()
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, precision="bf16"))
    assert both(settle_precision(run, "cpu")) == ("bf16", "fp32")


def test_a_run_keeps_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, FAST)
    write_run_folder_config(settle_precision(RunConfig(), "cpu", tmp_path), tmp_path)
    pretend(monkeypatch, SLOW)
    with caplog.at_level(logging.INFO):
        assert both(settle_precision(RunConfig(), "cpu", tmp_path)) == ("bf16", "bf16")
    assert "train.precision: bf16 (as this run began)" in caplog.text
    assert "this CPU has no bfloat16 instructions, so this is slow here. train.precision=fp32 is faster" in caplog.text


def test_a_run_folder_that_never_settled_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run_folder_config(RunConfig(), tmp_path)
    pretend(monkeypatch, SLOW)
    assert both(settle_precision(RunConfig(), "cpu", tmp_path)) == ("fp32", "fp32")


def test_an_image_tokenizer_keeps_what_its_checkpoints_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SLOW)
    write_run_folder_config(settle_precision(RunConfig(), "cpu"), tmp_path)
    step = tmp_path / WORK_NAME / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    write_manifest(step, Manifest(kind="image-tokenizer", counters={"options": '{"precision": "bf16"}'}))
    assert both(settle_precision(RunConfig(), "cpu", tmp_path)) == ("fp32", "bf16")


@pytest.mark.parametrize("left_behind", ["step-00000002.partial", "step-00000002"])
def test_a_checkpoint_that_was_never_finished_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: str
) -> None:
    """A process killed while it saved, or a disk that lost the manifest: training itself takes the one before."""
    pretend(monkeypatch, SLOW)
    folder = tmp_path / WORK_NAME / "checkpoints"
    for name in ("step-00000001", left_behind):
        (folder / name).mkdir(parents=True)
    identity = Manifest(kind="image-tokenizer", counters={"options": '{"precision": "bf16"}'})
    write_manifest(folder / "step-00000001", identity)
    assert both(settle_precision(RunConfig(), "cpu", tmp_path)) == ("fp32", "bf16")


@pytest.mark.parametrize("content", ["", "[]", '{"train": []}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    pretend(monkeypatch, SLOW)
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(ConfigError, match="config.json: cannot be read .* Works: .* train.precision=fp32 or bf16"):
        settle_precision(RunConfig(), "cpu", tmp_path)
    run = RunConfig()
    run = dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, precision="fp32"),
        image_tokenizer_train=dataclasses.replace(run.image_tokenizer_train, precision="fp32"),
    )
    assert both(settle_precision(run, "cpu", tmp_path)) == ("fp32", "fp32")


def settled_with_unlike_processors() -> tuple[str, str]:
    instructions = SLOW if dist.get_rank() else FAST
    ops_precision.cpu_instructions = lambda: dict(instructions)
    return both(settle_precision(RunConfig(), "cpu"))


def test_processes_agree() -> None:
    assert run_distributed(settled_with_unlike_processors, 2) == [("fp32", "fp32")] * 2


def test_engines_settle_what_nobody_did(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FAST)
    assert NativeEngine(tiny_run(precision="auto")).run.train.precision == "bf16"
    assert VQGANEngine(tiny_tokenizer_run(precision="auto")).options.precision == "bf16"
