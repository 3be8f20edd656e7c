from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from megatron_vilg.checkpoint.image_tokenizer import WORK_NAME, load_image_tokenizer
from megatron_vilg.checkpoint.manifest import read_manifest
from megatron_vilg.checkpoint.reshape import merge
from megatron_vilg.checkpoint.sources import open_source
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.errors import CheckpointError, ConfigError, TrainingError
from megatron_vilg.train.metrics import MetricWriter
from megatron_vilg.train.pixel_source import PixelsInMemory, PixelSource
from megatron_vilg.train.precision import settle_precision
from megatron_vilg.train.vqgan import measure_reconstruction, sample_sheet, train_image_tokenizer
from megatron_vilg.train.vqgan_engine import VQGANEngine
from tests.train.vqgan_case import discs, tiny_run

HELD_OUT = discs(5, seed=9)
TIMES = ("throughput", "time/", "memory/")


class KilledError(Exception):
    """Stands for a process that dies between two steps."""


class DyingSource(PixelsInMemory):
    """Dies when the batch of one step is asked for."""

    def __init__(self, pixels: Tensor, run: RunConfig, *, last: int) -> None:
        super().__init__(pixels, run)
        self._last = last

    def batch(self, step: int) -> Tensor:
        if step == self._last:
            raise KilledError
        return super().batch(step)


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / WORK_NAME / "metrics.jsonl").read_text()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(TIMES)}
        for line in text.splitlines()
    ]


@pytest.mark.parametrize(
    ("kind", "critic", "optimizer"), [("vqgan", 0.0, "muon"), ("vqgan", 0.2, "adamw"), ("dvae", 0.0, "adamw")]
)
def test_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path, kind: str, critic: float, optimizer: str) -> None:
    run = tiny_run(critic_weight=critic, critic_start_step=3, weights_ema_decay=0.9, optimizer=optimizer)
    run = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, kind=kind))
    straight = train_image_tokenizer(run, discs(), HELD_OUT, tmp_path / "a" / "image_tokenizer")
    for death in (2, 7, 9):
        with pytest.raises(KilledError):
            train_image_tokenizer(
                run, DyingSource(discs(), run, last=death), HELD_OUT, tmp_path / "b" / "image_tokenizer"
            )
    resumed = train_image_tokenizer(run, discs(), HELD_OUT, tmp_path / "b" / "image_tokenizer")
    assert straight == resumed and straight is not None
    first, second = (load_image_tokenizer(tmp_path / n / "image_tokenizer").state_dict() for n in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with open_source(tmp_path / "a" / WORK_NAME) as source:
        merge(source, tmp_path / "merged")
    merged = load_image_tokenizer(tmp_path / "merged").state_dict()
    assert all(torch.equal(first[name], merged[name]) for name in first), "the averages, as they were saved"
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert [line["step"] for line in lines(tmp_path / "a")] == [3, 5, 6, 9, 10]


def test_a_run_leaves_what_it_promises(tmp_path: Path) -> None:
    run = tiny_run()
    quality = train_image_tokenizer(run, discs(), HELD_OUT, tmp_path / "image_tokenizer")
    assert quality is not None
    tokenizer = load_image_tokenizer(tmp_path / "image_tokenizer")
    assert measure_reconstruction(tokenizer, HELD_OUT) == quality
    facts = read_manifest(tmp_path / "image_tokenizer")
    assert facts.step == 10 and facts.counters["psnr(dB)"] == quality.psnr
    last = lines(tmp_path)[-1]
    assert {
        "loss/pixel(l1)",
        "codebook/used(share)",
        "codebook/perplexity",
        "codebook/revived",
        "critic/open(0-1)",
        "reconstruction/psnr(dB)",
        "grad_norm",
        "lr",
        "step/skipped",
    } <= last.keys()
    assert last["reconstruction/psnr(dB)"] == pytest.approx(quality.psnr)
    sheets = sorted((tmp_path / WORK_NAME / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-00000005.png", "step-00000010.png"]
    assert Image.open(sheets[0]).size == (5 * 24, 2 * 24)


def test_without_held_out_pictures_training_ones_are_measured_and_called_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = []
    monkeypatch.setattr(MetricWriter, "images", lambda self, tag, images, step: tags.append(tag))
    caplog.set_level(logging.INFO, logger="megatron_vilg")
    quality = train_image_tokenizer(tiny_run(), discs(), None, tmp_path / "image_tokenizer")
    assert quality == measure_reconstruction(load_image_tokenizer(tmp_path / "image_tokenizer"), discs())
    assert "no pair is held out" in caplog.text and "training pictures: l1" in caplog.text
    assert set(tags) == {"reconstruction/training"}
    with pytest.raises(ValueError, match="as a tensor"):
        train_image_tokenizer(tiny_run(), PixelsInMemory(discs(), tiny_run()), None, tmp_path / "other")


def test_a_finished_run_is_not_trained_again_but_a_changed_one_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megatron_vilg")
    out = tmp_path / "image_tokenizer"
    quality = train_image_tokenizer(tiny_run(), discs(), HELD_OUT, out)
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert train_image_tokenizer(tiny_run(), discs(), HELD_OUT, out) == quality
    assert "already trained" in caplog.text and (out / "model.safetensors").stat().st_mtime_ns == before
    longer = tiny_run(num_steps=12)
    train_image_tokenizer(longer, discs(), HELD_OUT, out)
    assert "going on with num_steps=12; the run so far used 10" in caplog.text
    assert read_manifest(out).step == 12


def test_fewer_steps_than_there_are_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "image_tokenizer"
    train_image_tokenizer(tiny_run(), discs(), HELD_OUT, out)
    with pytest.raises(ConfigError) as caught:
        train_image_tokenizer(tiny_run(num_steps=6), discs(), HELD_OUT, out)
    path = tmp_path / WORK_NAME / "checkpoints" / "step-00000010"
    rule = f"{path} has more steps behind it, so that nothing would be trained"
    said = f"image_tokenizer_train.num_steps=6: {rule}. Works: 10, to keep it as it is, or more to go on."
    assert said in str(caught.value)
    assert read_manifest(out).step == 10


def test_a_longer_run_keeps_a_codebook_that_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, out = [], tmp_path / "image_tokenizer"
    start = VQGANEngine.start_codebook

    def spy(engine: VQGANEngine, source: PixelSource) -> None:
        started.append(engine.options.num_steps)
        start(engine, source)

    monkeypatch.setattr(VQGANEngine, "start_codebook", spy)
    run = tiny_run(num_steps=40, continuous_fraction=0.1)
    with pytest.raises(KilledError):  # the checkpoint of step 4: k-means would be next
        train_image_tokenizer(run, DyingSource(discs(), run, last=4), HELD_OUT, out)
    started.clear()
    for steps, last in ((20, 13), (100, 18), (100, 22)):  # ended at 12, 16, 20; 100 steps alone would start at 10 or 50
        run = tiny_run(num_steps=steps, continuous_fraction=0.5 if steps == 100 else 0.1)
        with pytest.raises(KilledError):
            train_image_tokenizer(run, DyingSource(discs(), run, last=last), HELD_OUT, out)
        assert started == [20]
    rows = [json.loads(line) for line in (tmp_path / WORK_NAME / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/commitment" in row for row in rows if row["step"] > 5)


def test_a_longer_dvae_run_goes_on_with_the_temperature_it_has(tmp_path: Path) -> None:
    out = tmp_path / "image_tokenizer"
    for steps, last in ((10, 10), (100, 17), (100, 22), (200, 26)):
        run = tiny_run(num_steps=steps, temperature_fraction=0.5)
        run = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, kind="dvae"))
        if steps == last:
            train_image_tokenizer(run, discs(), HELD_OUT, out)
            continue
        with pytest.raises(KilledError):
            train_image_tokenizer(run, DyingSource(discs(), run, last=last), HELD_OUT, out)
    rows = [json.loads(line) for line in (tmp_path / WORK_NAME / "metrics.jsonl").read_text().splitlines()]
    late = {row["step"]: (row["gumbel/temperature"], row["gumbel/kl_weight"]) for row in rows if row["step"] > 5}
    assert set(late.values()) == {(0.0625, 6.6)} and max(late) >= 24


def test_other_pictures_or_another_model_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "image_tokenizer"
    run = tiny_run()
    with pytest.raises(KilledError):
        train_image_tokenizer(run, DyingSource(discs(), run, last=6), HELD_OUT, out)
    with pytest.raises(CheckpointError, match="was trained on other pictures"):
        train_image_tokenizer(run, discs(seed=5), HELD_OUT, out)
    other = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, codebook_size=17))
    with pytest.raises(CheckpointError, match="codebook_size: checkpoint has 16, this run has 17"):
        train_image_tokenizer(other, discs(), HELD_OUT, out)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"optimizer": "muon"}, {}, "optimizer=adamw: {} was trained with muon, {}. Works: muon"),
        ({}, {"critic_weight": 0.2}, "critic_weight=0.2: {} was trained with 0.0, {}. Works: 0.0"),
        (
            {"critic_weight": 0.2},
            {"critic_weight": 0.3, "critic_channels": 8},
            "critic_channels=8: {} was trained with 4, {}. Works: 4",
        ),
        (
            {"weights_ema_decay": 0.9},
            {},
            "weights_ema_decay=0.0: {} was trained with 0.9, {}. Works: 0.9 or any other above 0",
        ),
    ],
)
def test_options_that_need_other_tensors_are_refused_in_a_line(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], said: str
) -> None:
    out = tmp_path / "image_tokenizer"
    run = tiny_run(**before)
    with pytest.raises(KilledError):
        train_image_tokenizer(run, DyingSource(discs(), run, last=6), HELD_OUT, out)
    with pytest.raises(ConfigError) as caught:
        train_image_tokenizer(tiny_run(**now), discs(), HELD_OUT, out)
    path = tmp_path / WORK_NAME / "checkpoints" / "step-00000004"
    said = said.format(path, "and its tensors do not fit")
    assert str(caught.value).splitlines()[1:] == [f"  image_tokenizer_train.{said}, or another --out."]


def test_critic_and_averages_may_weigh_more_or_less_on_the_way(tmp_path: Path) -> None:
    out = tmp_path / "image_tokenizer"
    run = tiny_run(critic_weight=0.2, weights_ema_decay=0.9)
    with pytest.raises(KilledError):
        train_image_tokenizer(run, DyingSource(discs(), run, last=6), HELD_OUT, out)
    assert train_image_tokenizer(tiny_run(critic_weight=0.1, weights_ema_decay=0.5), discs(), HELD_OUT, out)


def test_a_signal_saves_the_step_and_the_same_call_goes_on(tmp_path: Path) -> None:
    run = tiny_run(precision="fp32")

    class Stopping(PixelsInMemory):
        def batch(self, step: int) -> Tensor:
            if step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    out = tmp_path / "image_tokenizer"
    assert train_image_tokenizer(run, Stopping(discs(), run), HELD_OUT, out) is None
    assert (tmp_path / WORK_NAME / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    assert not out.exists()
    # The run keeps its arithmetic on whatever machine it goes on, without a config.json too.
    auto = dataclasses.replace(run.image_tokenizer_train, precision="auto")
    settled = settle_precision(dataclasses.replace(run, image_tokenizer_train=auto), "cpu", tmp_path)
    assert settled.image_tokenizer_train.precision == "fp32"
    assert train_image_tokenizer(run, discs(), HELD_OUT, out) is not None


def test_a_job_that_another_one_has_replaced_writes_no_checkpoint(tmp_path: Path) -> None:
    def refuse() -> None:
        raise CheckpointError("taken over")

    with pytest.raises(CheckpointError, match="taken over"):
        train_image_tokenizer(tiny_run(), discs(), HELD_OUT, tmp_path / "image_tokenizer", require_ours=refuse)
    assert not list(tmp_path.rglob("step-*")) and not (tmp_path / "image_tokenizer").exists()


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    run = tiny_run(num_steps=30)

    class Broken(PixelsInMemory):
        def batch(self, step: int) -> Tensor:
            return super().batch(step) * float("nan")

    with pytest.raises(TrainingError, match=r"max_skipped_in_row=20.*up to step 20.*image_tokenizer_train\.lr=0\.002"):
        train_image_tokenizer(run, Broken(discs(), run), HELD_OUT, tmp_path / "image_tokenizer")


def test_measured_quality_of_a_tokenizer_that_returns_white(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "image_tokenizer"
    train_image_tokenizer(tiny_run(num_steps=3, warmup_steps=0, continuous_fraction=0.0), discs(), HELD_OUT, out)
    tokenizer = load_image_tokenizer(out)
    monkeypatch.setattr(tokenizer, "decode", lambda z: torch.ones(len(z), 3, 24, 24))
    quality = measure_reconstruction(tokenizer, HELD_OUT)
    error = 1.0 - HELD_OUT.double() / 255.0
    assert quality.l1 == pytest.approx(float(error.mean()), rel=1e-4)
    ratio = -10.0 * error.square().mean((1, 2, 3)).log10()
    assert quality.psnr == pytest.approx(float(ratio.mean()), rel=1e-4)
    sheet = sample_sheet(tokenizer, HELD_OUT[:2])
    assert sheet.shape == (3, 48, 48)
    assert torch.allclose(sheet[:, :24, 24:], HELD_OUT[1].float() / 127.5 - 1.0)
    assert (sheet[:, 24:] == 1.0).all()
