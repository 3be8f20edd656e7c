"""Going back from a divergence: when, where to, and with which pairs."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint import manager
from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest, read_manifest
from megatron_vilg.config.schema import CheckpointConfig, DataConfig, LogConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError, TrainingError
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.course import WATCHED, Course
from megatron_vilg.train.metrics import MetricWriter
from megatron_vilg.train.pretrain import pretrain
from tests.helpers import run_distributed
from tests.tiny import tiny_config, tiny_run
from tests.train.token_caches import write_cache

OPTIONS = TrainConfig(rollback_factor=1.5, rollback_patience=2)


def losses(total: float) -> dict[str, float]:
    return dict.fromkeys(WATCHED, total / 2)


def test_only_losses_that_stay_high_are_a_divergence() -> None:
    course = Course(OPTIONS)
    answers = [course.lost(step, losses(total)) for step, total in enumerate([4.0, 3.9, 9.0, 3.8, 9.0, math.nan])]
    assert answers == [False] * 5 + [True]
    off = Course(TrainConfig())
    assert not any(off.lost(step, losses(math.nan)) for step in range(5))


def test_counters_carry_everything_over() -> None:
    course = Course(OPTIONS)
    course.lost(1, losses(4.0))
    course.skipped, course.rollbacks = 7, 2
    again = Course(OPTIONS, course.counters)
    assert again.counters == course.counters and again.batch_number(3) == 10
    assert not again.lost(2, losses(6.1)) and again.lost(3, losses(6.1)), "the mean is still 4"


def test_a_row_of_high_losses_goes_on_after_resuming() -> None:
    course = Course(OPTIONS)
    course.lost(20, losses(4.0))
    assert not course.lost(40, losses(9.0))
    again = Course(OPTIONS, course.counters)
    assert again.lost(60, losses(9.0)) and again.last_good == 20


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return write_cache(tmp_path / "tokens", {"train": 10})


def course_run(cache: TokenCache, **train: object) -> RunConfig:
    base = tiny_run(tiny_config(text_vocab_size=cache.settings["text_vocab_size"]), num_steps=8, eval_every=0)
    options: dict[str, object] = {"sample_every": 1, "rollback_factor": 1.5, "rollback_patience": 1}
    return dataclasses.replace(
        base,
        data=DataConfig(),
        train=dataclasses.replace(base.train, **(options | train)),
        checkpoint=CheckpointConfig(every=2, keep_last=4),
        log=LogConfig(every=1, tensorboard=False),
    )


class Poison:
    """Spoils the weights after one step, as often as asked."""

    def __init__(self, step: int, times: int = 1, factor: float = 300.0) -> None:
        self.step, self.times, self.factor = step, times, factor

    def __call__(self, model: ViLG, step: int, writer: MetricWriter) -> None:
        if step == self.step and self.times:
            self.times -= 1
            with torch.no_grad():
                for parameter in model.heads.parameters():  # type: ignore[union-attr]
                    parameter.mul_(self.factor)


def test_run_goes_back_and_past_the_pairs(tmp_path: Path, cache: TokenCache) -> None:
    run = course_run(cache)
    assert pretrain(run, cache, tmp_path / "run", on_sample=Poison(5))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert max(sum(line[name] for name in WATCHED) for line in lines) < 1.5 * sum(lines[0][name] for name in WATCHED)
    folder = Checkpointer(tmp_path / "run" / "checkpoints", run.checkpoint).latest()
    assert folder is not None
    counters = read_manifest(folder).counters
    # Step 6 was high; the checkpoint of step 4 was the last one before it.
    assert (counters["batches_skipped"], counters["rollbacks"]) == (2, 1)


def test_saved_between_two_log_lines_after_the_losses_rose_is_not_before(tmp_path: Path, cache: TokenCache) -> None:
    """Steps 4 and 5 are high, step 5 is saved, and line 6 is the first that says so: back to step 3."""
    run = dataclasses.replace(
        course_run(cache, num_steps=12),
        log=LogConfig(every=3, tensorboard=False),
        checkpoint=CheckpointConfig(every=1, keep_last=9),
    )
    assert pretrain(run, cache, tmp_path / "run", on_sample=Poison(4))
    counters = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000012").counters
    assert (counters["batches_skipped"], counters["rollbacks"]) == (3, 1)


def test_a_checkpoint_that_leads_to_high_losses_again_is_left_behind(tmp_path: Path, cache: TokenCache) -> None:
    """The weights saved with step 3 are spoilt although its line was healthy: step 2 is tried next."""
    run = course_run(cache)
    run = dataclasses.replace(run, checkpoint=CheckpointConfig(every=1, keep_last=9))
    assert pretrain(run, cache, tmp_path / "run", on_sample=Poison(3))
    counters = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000008").counters
    assert counters["rollbacks"] == 2


def test_the_healthy_checkpoint_stays_while_high_losses_are_counted(tmp_path: Path, cache: TokenCache) -> None:
    """Three high lines decide, and step 6 is saved meanwhile: ``keep_last=1`` alone would lose step 4."""
    run = course_run(cache, num_steps=12, rollback_patience=3)
    run = dataclasses.replace(run, checkpoint=CheckpointConfig(every=2, keep_last=1))
    assert pretrain(run, cache, tmp_path / "run", on_sample=Poison(5))
    counters = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000012").counters
    assert (counters["batches_skipped"], counters["rollbacks"]) == (4, 1)


def test_too_many_steps_that_are_not_finite_are_a_reason_to_go_back(tmp_path: Path, cache: TokenCache) -> None:
    """Lines 6 and 7 are, long before ``rollback_patience``: back to step 4. Without going back the run ends."""
    run = course_run(cache, rollback_patience=9, max_skipped_in_row=2, max_rollbacks=1)
    assert pretrain(run, cache, tmp_path / "a", on_sample=Poison(5, factor=math.nan))
    counters = read_manifest(tmp_path / "a" / "checkpoints" / "step-00000008").counters
    assert (counters["batches_skipped"], counters["rollbacks"], counters["steps_skipped"]) == (3, 1, 2)
    with pytest.raises(TrainingError, match=r"max_skipped_in_row=2: .* no way out: after 1 rollbacks\.$"):
        pretrain(run, cache, tmp_path / "b", on_sample=Poison(5, times=9, factor=math.nan))
    off = dataclasses.replace(run, train=dataclasses.replace(run.train, rollback_factor=0.0))
    with pytest.raises(TrainingError, match=r"max_skipped_in_row=2: .* or look at those samples\.$"):
        pretrain(off, cache, tmp_path / "c", on_sample=Poison(5, factor=math.nan))


class KilledError(Exception):
    """Stands for a killed process."""


def killed_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Let the process die right after the first call of this function."""
    function = getattr(owner, name)

    def once(*args: Any) -> None:
        monkeypatch.setattr(owner, name, function)
        function(*args)
        raise KilledError

    monkeypatch.setattr(owner, name, once)


def test_a_run_killed_after_going_back_goes_on_as_one_that_was_not(
    tmp_path: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = course_run(cache)
    assert pretrain(run, cache, tmp_path / "straight", on_sample=Poison(5))
    killed_after(monkeypatch, Course, "go_back")
    with pytest.raises(KilledError):
        pretrain(run, cache, tmp_path / "killed", on_sample=Poison(5))
    noted = read_manifest(tmp_path / "killed" / "checkpoints" / "step-00000004")
    assert (noted.counters["batches_skipped"], noted.counters["rollbacks"]) == (2, 1)
    assert (noted.step, noted.samples_seen) == (4, 6 * run.train.batch_size)
    assert pretrain(run, cache, tmp_path / "killed")
    last = [read_manifest(tmp_path / name / "checkpoints" / "step-00000008") for name in ("straight", "killed")]
    assert last[0].counters == last[1].counters and last[0].samples_seen == last[1].samples_seen == 10 * 4
    straight, killed = (load_model_folder(tmp_path / name / "export")[1] for name in ("straight", "killed"))
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


def test_rollbacks_before_a_kill_count(tmp_path: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch) -> None:
    run = course_run(cache, max_rollbacks=1)
    killed_after(monkeypatch, Course, "go_back")
    with pytest.raises(KilledError):
        pretrain(run, cache, tmp_path / "run", on_sample=Poison(5))
    with pytest.raises(TrainingError, match="after 1 rollbacks"):
        pretrain(run, cache, tmp_path / "run", on_sample=Poison(5))


def test_killed_while_later_checkpoints_are_deleted_it_goes_back_once_more(
    tmp_path: Path, cache: TokenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back from line 6 to step 3; steps 4 and 5 were saved with spoilt weights, and 5 is still there."""
    run = dataclasses.replace(
        course_run(cache, num_steps=12),
        log=LogConfig(every=3, tensorboard=False),
        checkpoint=CheckpointConfig(every=1, keep_last=9),
    )
    killed_after(monkeypatch, manager, "remove")
    with pytest.raises(KilledError):
        pretrain(run, cache, tmp_path / "run", on_sample=Poison(4))
    assert Checkpointer(tmp_path / "run" / "checkpoints", run.checkpoint).steps() == [1, 2, 3, 5]
    assert pretrain(run, cache, tmp_path / "run")
    counters = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000012").counters
    assert (counters["batches_skipped"], counters["rollbacks"]) == (3, 1)


def test_a_checkpoint_that_cannot_be_given_its_counters_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    engine, course = Weights(9), Course(OPTIONS)
    checkpointer.save(4, engine.state_dict(), Manifest(kind="test", step=4))
    course.last_good = 6

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manager, "write_manifest", full)
    message = "step-00000004: cannot note that the run went back to it .*No space left on device"
    with pytest.raises(CheckpointError, match=message):
        course.go_back(engine, checkpointer, Manifest(kind="test"))  # type: ignore[arg-type]


def test_run_that_keeps_diverging_stops(tmp_path: Path, cache: TokenCache) -> None:
    run = course_run(cache, max_rollbacks=1)
    with pytest.raises(TrainingError, match=r"train.rollback_factor=1.5: .* after step \d, after 1 rollbacks. Lower"):
        pretrain(run, cache, tmp_path / "a", on_sample=Poison(5, times=9))
    with pytest.raises(TrainingError, match="there is no checkpoint from before"):
        pretrain(run, cache, tmp_path / "b", on_sample=Poison(1))


class Weights:
    """An engine of three numbers."""

    def __init__(self, step: int) -> None:
        self.weights, self.step = torch.zeros(3), step

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"model": {"w": self.weights}}

    def resume(self, step: int) -> None:
        self.step = step


def gone_back_late(folder: Path, saved: list[int]) -> tuple[int, float, int]:
    """Step, weight and skipped batches of this rank after going back, where rank 1 does not see the newest folder."""
    mesh = build_mesh(ParallelConfig(shard=2), "cpu")
    checkpointer = Checkpointer(folder, CheckpointConfig(keep_last=9), mesh)
    engine, course = Weights(9), Course(OPTIONS)
    for step in saved:
        engine.weights.fill_(step)
        checkpointer.save(step, engine.state_dict(), Manifest(kind="test", step=step))
    if not mesh.is_main:
        seen = checkpointer.steps
        checkpointer.steps = lambda: seen()[:-1]  # type: ignore[method-assign]
    course.last_good = 6
    course.go_back(engine, checkpointer, Manifest(kind="test"))  # type: ignore[arg-type]
    return engine.step, float(engine.weights[0]), course.skipped


@pytest.mark.parametrize("saved", [[2, 4], [4]])
def test_ranks_that_see_a_shared_folder_late_go_back_to_the_same_step(tmp_path: Path, saved: list[int]) -> None:
    assert run_distributed(gone_back_late, 2, tmp_path / "checkpoints", saved, timeout=60) == [(4, 4.0, 5)] * 2


def test_a_damaged_checkpoint_is_no_place_to_go_back_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep_last=9))
    engine, course = Weights(9), Course(OPTIONS)
    for step in (2, 4, 8):
        engine.weights.fill_(step)
        checkpointer.save(step, engine.state_dict(), Manifest(kind="test", step=step))
    (checkpointer.path(4) / ".metadata").unlink()
    course.last_good = 6
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        course.go_back(engine, checkpointer, Manifest(kind="test"))  # type: ignore[arg-type]
    assert (engine.step, float(engine.weights[0]), course.skipped) == (2, 2.0, 7)
    assert "step-00000004: damaged: .metadata is missing" in caplog.text
    assert checkpointer.steps() == [2, 4], "what is later is gone, what is damaged is left to people"
