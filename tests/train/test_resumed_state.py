"""A run that asks for other parts than its checkpoint has is told which option that is, in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, ReconstructorConfig, RunConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.pretrain import resume_latest
from megatron_vilg.train.resumed_state import other_state
from tests.train.test_end_to_end import joint_run, tokenizer_of


def engine_of(run: RunConfig) -> NativeEngine:
    return EndToEndEngine(run, "cpu", tokenizer_of(run)) if run.reconstructor.enabled else NativeEngine(run)


def saved(run: RunConfig, folder: Path) -> Checkpointer:
    checkpointer = Checkpointer(folder, CheckpointConfig())
    checkpointer.save(1, engine_of(run).state_dict(), Manifest(kind="pretrain", step=1))
    return checkpointer


def said_of(before: RunConfig, now: RunConfig, folder: Path) -> str:
    """What is wrong, without the name of the checkpoint."""
    path = saved(before, folder).path(1)
    said = other_state(path, now, engine_of(now).state_dict())
    assert str(path) in said or not said
    return said.replace(str(path), "it")


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {"ema_decay": 0.9}, "ema_decay=0.9: it has no averaged weights. Works: 0"),
        ({"ema_decay": 0.9}, {}, "ema_decay=0: it has averaged weights. Works: a number above 0"),
        ({}, {"critic_weight": 0.2}, "critic_weight=0.2: it has no weights of a critic. Works: 0"),
        ({"critic_weight": 0.2}, {}, "critic_weight=0: it has weights of a critic. Works: a number above 0"),
        ({"critic_weight": 0.2}, {"critic_weight": 0.2, "critic_channels": 6}, "critic_channels=6: it has 4. Works: 4"),
        ({"mapping_width": 8}, {}, "mapping_width=16: it has 8. Works: 8"),
    ],
)
def test_parts_of_the_reconstructor(tmp_path: Path, before: dict[str, Any], now: dict[str, Any], said: str) -> None:
    assert said_of(joint_run(**before), joint_run(**now), tmp_path) == f"reconstructor.{said}, or another --out"


def test_a_reconstructor_that_comes_or_goes(tmp_path: Path) -> None:
    joint = joint_run(critic_weight=0.2, ema_decay=0.9)
    alone = dataclasses.replace(joint, reconstructor=ReconstructorConfig())
    comes = "reconstructor.enabled=True: it has none. Works: false, or `vilg checkpoint convert --from vilg --to end"
    goes = "reconstructor.enabled=False: it has one. Works: true, or `vilg checkpoint convert --from end-to-end --to"
    assert said_of(alone, joint, tmp_path / "a").startswith(comes)
    assert said_of(joint, alone, tmp_path / "b").startswith(goes)


def test_what_has_its_place_may_weigh_more_or_less(tmp_path: Path) -> None:
    before = joint_run(critic_weight=0.2, ema_decay=0.9)
    assert said_of(before, joint_run(critic_weight=0.1, ema_decay=0.5), tmp_path) == ""


def test_resuming_says_it_before_names_are_compared(tmp_path: Path) -> None:
    run = joint_run()
    checkpointer, now = saved(run, tmp_path), joint_run(ema_decay=0.9)
    with pytest.raises(CheckpointError) as caught:
        resume_latest(engine_of(now), checkpointer, Manifest(kind="pretrain"))
    assert str(caught.value).splitlines() == [
        f"reconstructor.ema_decay=0.9: {checkpointer.path(1)} has no averaged weights. Works: 0, or another --out"
    ]
