from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch

from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.models.quantizer import CodebookUse, VectorQuantizer
from megatron_vilg.train import vqgan
from megatron_vilg.train.codebook_watch import CodebookWatch, replaced_though_used
from tests.train.vqgan_case import discs, tiny_run


def test_collapse_is_said_once_with_healthy_ranges_and_recovery_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_vilg")
    watch = CodebookWatch(100)
    good, bad = CodebookUse(used=0.9, perplexity=70.0), CodebookUse(used=0.05, perplexity=3.0)
    assert watch.check(10, good, num_vectors=1000)
    assert not watch.check(20, bad, num_vectors=1000)
    assert not watch.check(30, bad, num_vectors=1000)
    (warning,) = caplog.messages
    assert "codebook/used(share)=0.05 (healthy: 0.60 to 1)" in warning
    assert "codebook/perplexity=3 (healthy: 20 to 100)" in warning
    assert watch.check(40, good, num_vectors=1000)
    assert "healthy again" in caplog.messages[-1] and len(caplog.messages) == 2


def test_few_codes_that_do_most_of_the_work_are_a_collapse_too() -> None:
    assert not CodebookWatch(100).check(1, CodebookUse(used=1.0, perplexity=5.0), num_vectors=1000)


def test_too_few_vectors_say_nothing() -> None:
    assert CodebookWatch(100).check(1, CodebookUse(used=0.05, perplexity=3.0), num_vectors=300)


def with_batch(run: RunConfig, batch_size: int, **tokenizer: float) -> RunConfig:
    return dataclasses.replace(
        run,
        image_tokenizer=dataclasses.replace(run.image_tokenizer, **tokenizer),
        image_tokenizer_train=dataclasses.replace(run.image_tokenizer_train, batch_size=batch_size),
    )


def replaced_of_evenly_used(run: RunConfig, steps: int = 600) -> int:
    """Codes replaced after a start of 200 steps, where each vector chooses any code alike."""
    tokenizer, generator = run.image_tokenizer, torch.Generator().manual_seed(0)
    quantizer, replaced = VectorQuantizer(tokenizer), 0
    count = run.image_tokenizer_train.batch_size * tokenizer.grid_side**2
    vectors = torch.nn.functional.normalize(torch.randn(count, tokenizer.codebook_dim, generator=generator), dim=1)
    for step in range(steps):
        ids = torch.randint(tokenizer.codebook_size, (count,), generator=generator)
        found = int(quantizer.follow(vectors, ids, generator))
        replaced += found if step >= 200 else 0
    return replaced


@pytest.mark.parametrize(("batch_size", "decay"), [(1, 0.97), (2, 0.97), (3, 0.9), (6, 0.9)])
def test_batches_too_small_for_the_threshold_are_told_from_others(batch_size: int, decay: float) -> None:
    run = with_batch(PRESETS["demo"](), batch_size, ema_decay=decay)
    assert (replaced_of_evenly_used(run) > 3) == (replaced_though_used(run) != "")


def test_presets_have_batches_large_enough() -> None:
    assert [replaced_though_used(preset().resolve()) for preset in PRESETS.values()] == [""] * len(PRESETS)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_named_values_work(batch_size: int) -> None:
    run = with_batch(PRESETS["demo"](), batch_size, dead_code_threshold=0.5)
    said = replaced_though_used(run)
    assert said.startswith(f"image_tokenizer.dead_code_threshold=0.5: a step of {batch_size} x 64 tokens ")
    named = re.findall(r"(image_tokenizer\S*)=([\d.]+)", said.partition("Works: ")[2])
    assert [name.rpartition(".")[2] for name, _ in named] == ["batch_size", "codebook_size", "dead_code_threshold"]
    for name, value in named:
        section, _, option = name.partition(".")
        part = getattr(run, section)
        changed = {option: type(getattr(part, option))(value)}
        assert replaced_though_used(dataclasses.replace(run, **{section: dataclasses.replace(part, **changed)})) == ""


def test_it_is_said_where_training_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StartedError(Exception):
        pass

    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(vqgan, "_resume", start)
    for threshold in (0.05, 5.0):
        run = with_batch(tiny_run(), 4, dead_code_threshold=threshold)
        with pytest.raises(StartedError):
            vqgan.train_image_tokenizer(run, discs(4), discs(2), tmp_path / "image_tokenizer")
    (warning,) = caplog.messages
    assert warning.startswith("image_tokenizer.dead_code_threshold=5: ")
