"""A tokenizer run of a few seconds, shared by the tests of its parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.config.schema import ImageTokenizerConfig, ImageTokenizerTrainConfig, LogConfig, RunConfig

SIZE = 24


def tiny_run(**options: Any) -> RunConfig:
    """Ten steps of four pictures: one continuous, two frozen; no perceptual network, no critic."""
    training = ImageTokenizerTrainConfig(
        num_steps=10,
        batch_size=4,
        lr=2e-3,
        warmup_steps=2,
        continuous_fraction=0.2,
        frozen_codebook_fraction=0.2,
        perceptual_weight=0.0,
        critic_channels=4,
        critic_start_step=4,
        critic_gate=10.0,
        log_every=3,
        picture_every=5,
        checkpoint_every=4,
    )
    return RunConfig(
        image_tokenizer=ImageTokenizerConfig(
            image_size=SIZE,
            patch=3,
            channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            bottom_attention=False,
            norm_groups=2,
            codebook_size=16,
            codebook_dim=4,
        ),
        image_tokenizer_train=dataclasses.replace(training, **options),
        log=LogConfig(tensorboard=False),
    )


def discs(count: int = 12, seed: int = 0) -> Tensor:
    """uint8 [count, 3, SIZE, SIZE]: coloured discs on white."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE)
    pictures = torch.full((count, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    for picture in pictures:
        row, column, radius = (torch.rand(3, generator=generator) * SIZE / 2 + SIZE / 6).tolist()
        inside = (axis[:, None] - row) ** 2 + (axis[None] - column) ** 2 < (radius / 2) ** 2
        colour = torch.randint(256, (3, 1), generator=generator, dtype=torch.uint8)
        picture[:, inside] = colour.expand(3, int(inside.sum()))
    return pictures
