from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vilg.errors import DataError
from megatron_vilg.train.pixel_source import PixelsInMemory
from tests.train.vqgan_case import discs, tiny_run


def test_batches_are_a_function_of_seed_and_step() -> None:
    run = tiny_run()
    first, again = PixelsInMemory(discs(), run), PixelsInMemory(discs(), run)
    for step in (7, 0, 3):
        batch = first.batch(step)
        assert batch.shape == (4, 3, 24, 24) and batch.dtype == torch.float32
        assert batch.min() >= -1 and batch.max() <= 1
        assert torch.equal(batch, again.batch(step))
    other = PixelsInMemory(discs(), tiny_run(seed=1))
    assert not torch.equal(first.batch(0), other.batch(0))


def test_each_pass_shows_every_picture_once() -> None:
    pixels = discs()
    source = PixelsInMemory(pixels, tiny_run(augment_share=0.0))
    for turn in range(2):
        seen = torch.cat([source.batch(3 * turn + step) for step in range(3)])
        shown = {bytes(p.add(1).mul(127.5).round().to(torch.uint8).numpy().tobytes()) for p in seen}
        assert shown == {bytes(p.numpy().tobytes()) for p in pixels}


def test_only_the_asked_share_is_changed() -> None:
    plain = PixelsInMemory(discs(), tiny_run(augment_share=0.0)).batch(0)
    changed = PixelsInMemory(discs(), tiny_run(augment_share=0.5)).batch(0)
    assert torch.equal(plain[:2], changed[:2])
    assert not torch.equal(plain[2], changed[2]) and not torch.equal(plain[3], changed[3])


def test_fingerprint_follows_the_pictures() -> None:
    run = tiny_run()
    assert PixelsInMemory(discs(), run).fingerprint == PixelsInMemory(discs(), run).fingerprint
    assert PixelsInMemory(discs(), run).fingerprint != PixelsInMemory(discs(seed=1), run).fingerprint


def test_wrong_pictures_are_refused() -> None:
    run = tiny_run()
    with pytest.raises(DataError, match=r"float32 \[12, 3, 24, 24\].*image_size=24 needs uint8 \[n, 3, 24, 24\]"):
        PixelsInMemory(discs().float(), run)
    larger = dataclasses.replace(run, image_tokenizer=dataclasses.replace(run.image_tokenizer, image_size=48))
    with pytest.raises(DataError, match=r"image_size=48 needs uint8 \[n, 3, 48, 48\]"):
        PixelsInMemory(discs(), larger)
    with pytest.raises(DataError, match="no training pictures"):
        PixelsInMemory(discs()[:0], run)
