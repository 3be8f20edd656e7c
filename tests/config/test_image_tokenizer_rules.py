from __future__ import annotations

import dataclasses

from megatron_vilg.config.check import check
from megatron_vilg.config.presets import demo


def problems_of(**options: object) -> list[str]:
    run = demo()
    return check(dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, **options)))


def test_the_first_convolution_has_channels_of_its_own_beside_latent_channels() -> None:
    widths = {"channels": 48, "channel_multipliers": (2, 4), "norm_groups": 32}
    assert problems_of(**widths) == []
    (problem,) = problems_of(**widths, latent_channels=16)
    assert "image_tokenizer.norm_groups=32: must divide the channels of every level, [48, 96, 192]" in problem


def test_there_must_be_a_level() -> None:
    assert problems_of(channel_multipliers=()) == [
        "image_tokenizer.channel_multipliers=[]: there must be a level. Works: 1,2, or any whole numbers."
    ]


def test_a_perceptual_distance_needs_pictures() -> None:
    run = demo()
    training = dataclasses.replace(run.image_tokenizer_train, perceptual_share=0.03)
    (problem,) = check(dataclasses.replace(run, image_tokenizer_train=training))
    assert problem == (
        "image_tokenizer_train.perceptual_share=0.03: is not one picture of image_tokenizer_train.batch_size=16. "
        "Works: 0.0625 to 1, or image_tokenizer_train.perceptual_weight=0."
    )


def test_norm_groups_must_divide_every_level() -> None:
    run = demo()
    broken = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, norm_groups=5))
    (problem,) = check(broken)
    assert "image_tokenizer.norm_groups=5: must divide the channels of every level, [64, 128]" in problem
    assert "64" in problem.split("Works")[1]
    assert check(run) == []
