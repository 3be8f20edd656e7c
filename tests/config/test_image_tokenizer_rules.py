from __future__ import annotations

import dataclasses

from megatron_vilg.config.check import check
from megatron_vilg.config.presets import demo


def test_norm_groups_must_divide_every_level() -> None:
    run = demo()
    broken = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, norm_groups=5))
    (problem,) = check(broken)
    assert "image_tokenizer.norm_groups=5: must divide the channels of every level, [64, 128]" in problem
    assert "64" in problem.split("Works")[1]
    assert check(run) == []
