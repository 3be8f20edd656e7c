"""A run that has other parts than its checkpoint is refused by the option that decides it, not by all its tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, RunConfig
from megatron_vilg.train.same_parts import other_parts_of_run, other_parts_of_tokenizer

PLAIN = {"model": {"w": torch.zeros(2)}, "optimizer": {"exp_avg": {"w": torch.zeros(2)}}}
JOINT = {**PLAIN, "reconstructor_optimizer": {"step": {"w": torch.zeros(())}}, "gate": {"average": torch.zeros(())}}
CRITIC = {"critic": {"w": torch.zeros(2)}}
AVERAGE = {"reconstructor_average": {"values": {"w": torch.zeros(2)}}}


def saved(folder: Path, state: dict[str, Any]) -> Path:
    return Checkpointer(folder, CheckpointConfig()).save(1, state, Manifest(kind="test", step=1))


def run_with(section: str = "reconstructor", **options: object) -> RunConfig:
    run = RunConfig()
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **options)})


END_TO_END = run_with(enabled=True)


@pytest.mark.parametrize(
    ("state", "run", "expected"),
    [
        (PLAIN, RunConfig(), ""),
        (JOINT, END_TO_END, ""),
        (JOINT | CRITIC | AVERAGE, run_with(enabled=True, critic_weight=0.5, ema_decay=0.9), ""),
        (
            JOINT | CRITIC,
            RunConfig(),
            "reconstructor.enabled=False: a reconstructor is what this run has not, and the checkpoint PATH has. "
            "Works: true, or another --out",
        ),
        (
            PLAIN,
            END_TO_END,
            "reconstructor.enabled=True: a reconstructor is what this run has, and the checkpoint PATH has not. "
            "Works: false, vilg checkpoint convert --from vilg --to end-to-end, which starts such a run from this one, "
            "or another --out",
        ),
        (
            JOINT | CRITIC,
            run_with(enabled=True, ema_decay=0.9),
            "reconstructor.critic_weight=0.0: a critic is what this run has not, and the checkpoint PATH has. Works: "
            "the value of before, or another --out\n"
            "reconstructor.ema_decay=0.9: averaged weights are what this run has, and the checkpoint PATH has not. "
            "Works: 0, or another --out",
        ),
    ],
)
def test_parts_of_a_run(tmp_path: Path, state: dict[str, Any], run: RunConfig, expected: str) -> None:
    path = saved(tmp_path, state)
    assert other_parts_of_run(path, run, state) == expected.replace("PATH", str(path))


@pytest.mark.parametrize(
    ("more", "options", "expected"),
    [
        (CRITIC, {"critic_weight": 0.5}, ""),
        (CRITIC, {"critic_weight": 0.0}, "image_tokenizer_train.critic_weight=0.0: a critic is what this run has not,"),
        ({}, {"critic_weight": 0.5}, "image_tokenizer_train.critic_weight=0.5: a critic is what this run has,"),
        (
            {"average": {"values": {"w": torch.zeros(2)}}},
            {"critic_weight": 0.0, "weights_ema_decay": 0.0},
            "image_tokenizer_train.weights_ema_decay=0.0: averaged weights are what this run has not,",
        ),
    ],
)
def test_parts_of_an_image_tokenizer(
    tmp_path: Path, more: dict[str, Any], options: dict[str, float], expected: str
) -> None:
    path = saved(tmp_path, PLAIN | more)
    found = other_parts_of_tokenizer(path, run_with("image_tokenizer_train", **options), PLAIN)
    assert found.startswith(expected.replace("PATH", str(path))) and bool(found) == bool(expected)


def test_the_optimizer_of_an_image_tokenizer_is_called_by_its_own_option(tmp_path: Path) -> None:
    muon = {"model": PLAIN["model"], "optimizer": {"momentum_buffer": {"w": torch.zeros(2)}}}
    path, run = saved(tmp_path, muon), run_with("image_tokenizer_train", critic_weight=0.0)
    assert other_parts_of_tokenizer(path, run, PLAIN) == (
        f"image_tokenizer_train.optimizer: the checkpoint {path} has muon, this run has adamw. "
        "Works: image_tokenizer_train.optimizer=muon, or another --out"
    )
