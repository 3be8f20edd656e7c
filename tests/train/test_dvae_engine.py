from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_vilg.config.schema import RunConfig
from megatron_vilg.train.dvae_engine import DVAEEngine, kl_weight_at, temperature_at
from megatron_vilg.train.pixel_source import PixelsInMemory
from tests.train.vqgan_case import discs, tiny_run


def dvae_run(**options: object) -> RunConfig:
    """The tiny tokenizer run with a dVAE."""
    run = tiny_run(**({"precision": "fp32", "edge_weight": 0.0} | options))
    tokenizer = dataclasses.replace(run.image_tokenizer, kind="dvae", codebook_dim=8)
    return dataclasses.replace(run, image_tokenizer=tokenizer)


def test_schedules() -> None:
    options = dvae_run(num_steps=100, temperature_fraction=0.5, kl_warmup_fraction=0.1).image_tokenizer_train
    assert temperature_at(0, options) == 1.0
    assert temperature_at(25, options) == pytest.approx((1 + 1 / 16) / 2)
    assert temperature_at(50, options) == temperature_at(99, options) == 0.0625
    assert [kl_weight_at(step, options) for step in (0, 5, 10, 99)] == [0.0, 3.3, 6.6, 6.6]


def test_training_lowers_likelihood_and_error() -> None:
    run = dvae_run(num_steps=60, kl_weight=0.5, lr=2e-2)
    source, engine = PixelsInMemory(discs(), run), DVAEEngine(run)
    found = [engine.train_step(step, source.batch(step)).losses for step in range(60)]

    def mean(name: str, part: slice) -> float:
        return float(torch.stack([losses[name] for losses in found[part]]).mean())

    start, end = slice(0, 5), slice(-5, None)
    assert mean("loss/logit_laplace(nats)", end) < mean("loss/logit_laplace(nats)", start) - 0.3
    assert mean("loss/pixel(l1)", end) < 0.8 * mean("loss/pixel(l1)", start)
    assert 0 <= mean("loss/kl(nats/token)", end) <= math.log(16)
    assert engine.code_counts.sum() == 60 * 4 * 16


def test_total_is_divided_by_pixel_values_as_the_paper_has_it() -> None:
    run = dvae_run(kl_warmup_fraction=0.0)
    engine = DVAEEngine(run)
    losses = engine.train_step(1, PixelsInMemory(discs(), run).batch(1)).losses
    divergence = 6.6 * 16 / (3 * 24 * 24) * losses["loss/kl(nats/token)"]
    assert losses["loss/total"] == pytest.approx(float(losses["loss/logit_laplace(nats)"] + divergence), rel=1e-5)


def test_step_that_is_not_finite_changes_nothing_but_the_counter() -> None:
    run = dvae_run(weights_ema_decay=0.9)
    engine, source = DVAEEngine(run), PixelsInMemory(discs(), run)
    engine.train_step(0, source.batch(0))
    before = {name: value.clone() for name, value in engine.finished().state_dict().items()}
    batch = source.batch(1)
    batch[0, 0, 0, 0] = float("nan")
    assert not engine.train_step(1, batch).finite and engine.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in engine.finished().state_dict().items())


def test_averaged_weights_lag_behind_and_are_what_is_kept() -> None:
    run = dvae_run(weights_ema_decay=0.9)
    engine, source = DVAEEngine(run), PixelsInMemory(discs(), run)
    weights = []
    for step in range(3):
        engine.train_step(step, source.batch(step))
        weights.append(engine.model.decoder.last_weight.detach().clone())
    average = engine.finished().decoder.last_weight
    assert engine.average is not None and int(engine.average.steps) == 3
    assert 0 < (average - weights[-1]).norm() < (weights[0] - weights[-1]).norm()
    assert torch.equal(engine.finished().use, engine.model.use)
