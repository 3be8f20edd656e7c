from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.batch import PairBatch, build_targets
from megatron_vilg.data.loader import PairLoader, permute
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import DataError
from megatron_vilg.sequence import Direction, StreamSpec, TextToken

SPEC = StreamSpec(num_text_slots=8, image_side=3)
A, B = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
PLAIN = DataConfig(caption_dropout=0.0, source_view_probability=0.0)
BUSY = DataConfig(
    caption_dropout=0.3,
    alternate_caption_probability=0.5,
    image_input_noise=0.2,
    image_source_noise=0.1,
    source_view_probability=0.7,
    target_view_probability=0.4,
)


@pytest.fixture
def cache(tmp_path: Path, make_shards: Callable[..., Path], make_cache: Any) -> TokenCache:
    source = make_shards(tmp_path / "d", {"train": 23, "val": 4}, per_shard=6)
    make_cache.write(source, tmp_path / "c")
    return TokenCache.open(tmp_path / "c")


def loader(cache: TokenCache, data: DataConfig = PLAIN, batch_size: int = 5, seed: int = 1) -> PairLoader:
    return PairLoader(cache, "train", data, SPEC, batch_size, seed)


def same(left: PairBatch, right: PairBatch) -> bool:
    names = [name for name in PairBatch.__slots__ if name != "pixels"]
    assert left.pixels is right.pixels is None
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**31))
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    got = permute(np.arange(size), size, np.random.SeedSequence(seed))
    assert sorted(got.tolist()) == list(range(size))


def test_permute_mixes_and_handles_many_pairs() -> None:
    got = permute(np.arange(2000), 2000, np.random.SeedSequence(0))
    assert abs(np.corrcoef(got, np.arange(2000))[0, 1]) < 0.1
    steps = np.diff(got)
    assert (np.abs(steps) < 20).mean() < 0.05
    large = permute(np.arange(10**9, 10**9 + 50), 2 * 10**9, np.random.SeedSequence(0))
    assert len(set(large.tolist())) == 50 and large.max() < 2 * 10**9


def test_batch_depends_on_seed_and_step_alone(cache: TokenCache) -> None:
    first, second = loader(cache, BUSY), loader(cache, BUSY)
    forward = [first.batch(step) for step in range(12)]
    backward = [second.batch(step) for step in reversed(range(12))]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not same(forward[0], loader(cache, BUSY, seed=2).batch(0))
    assert not torch.equal(forward[0].sample_ids, forward[1].sample_ids)


def test_copies_as_targets_fall_to_none(cache: TokenCache) -> None:
    data = DataConfig(num_views=2, target_view_probability=0.8, target_view_fall=0.5)
    feed = PairLoader(cache, "train", data, SPEC, 5, 1, num_steps=40)
    assert [feed.target_view_probability(step) for step in (0, 10, 20, 39)] == pytest.approx([0.8, 0.4, 0.0, 0.0])
    steady = PairLoader(cache, "train", BUSY, SPEC, 5, 1, num_steps=40)
    assert steady.target_view_probability(39) == 0.4


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_every_epoch_holds_every_pair_once(cache: TokenCache, batch_size: int) -> None:
    feed = loader(cache, batch_size=batch_size)
    steps = -(-23 * 4 // batch_size)
    drawn = np.concatenate([feed.sample_ids(step) for step in range(steps)])[: 23 * 4].reshape(4, 23)
    assert all(sorted(epoch.tolist()) == list(range(23)) for epoch in drawn)
    assert not np.array_equal(drawn[0], drawn[1])
    assert feed.samples_consumed(7) == 7 * batch_size and feed.epoch(23) == batch_size


def test_the_order_does_not_depend_on_the_batch_size(cache: TokenCache) -> None:
    small = np.concatenate([loader(cache, batch_size=4).sample_ids(step) for step in range(5)])
    assert np.array_equal(small, loader(cache, batch_size=20).sample_ids(0))


def test_a_loader_of_another_batch_size_goes_on_behind_what_was_drawn(cache: TokenCache) -> None:
    before, after, straight = loader(cache, BUSY, batch_size=5), loader(cache, BUSY, 3), loader(cache, BUSY, 3)
    after.resume(4, before.samples_consumed(4))
    drawn = np.concatenate([before.sample_ids(step) for step in range(4)] + [after.sample_ids(4)])
    assert sorted(drawn.tolist()) == list(range(23)) and after.samples_consumed(5) == 23
    straight.resume(4, straight.samples_consumed(4))
    assert same(straight.batch(4), loader(cache, BUSY, 3).batch(4))


def test_without_changes_both_rows_equal_the_clean_batch(cache: TokenCache) -> None:
    feed = loader(cache)
    batch = feed.batch(3)
    assert same(batch, feed.clean_batch(batch.sample_ids))
    assert batch.text_ids.shape == (5, 2, 8) and batch.image_ids.shape == (5, 2, 9)
    assert batch.text_ids.dtype == batch.text_len.dtype == batch.image_ids.dtype == torch.int64
    assert torch.equal(batch.text_ids[:, A], batch.text_ids[:, B])
    assert torch.equal(batch.image_ids[:, A], batch.target_image_ids)
    labels = build_targets(batch, SPEC)
    assert labels.shape == (5, 9 + 9) and (labels[:, 9:] == TextToken.EOS).sum() == 5


def test_each_change_touches_its_row_alone_as_often_as_asked(cache: TokenCache) -> None:
    size = 400
    feed = loader(cache, BUSY, batch_size=size)
    batch, tokens = feed.batch(0), cache.split("train")
    clean = feed.clean_batch(batch.sample_ids)
    dropped = batch.text_len[:, A] == 0
    assert 0.2 < dropped.float().mean() < 0.4
    assert (batch.text_ids[dropped, A] == TextToken.PAD).all()
    kept = ~dropped
    other = (batch.text_ids[kept, A] != clean.text_ids[kept, A]).any(1)
    assert 0.4 < other.float().mean() < 0.6
    for row, length, pair in zip(batch.text_ids[:, A], batch.text_len[:, A], batch.sample_ids, strict=True):
        wordings = [tokens.captions(np.asarray([pair]), np.asarray([w]))[0][0].tolist() for w in range(3)]
        assert length == 0 or row.tolist() in wordings
    assert torch.equal(batch.text_ids[:, B], clean.text_ids[:, B])
    assert torch.equal(batch.text_len[:, B], clean.text_len[:, B])
    noise = (batch.image_ids[:, A] != batch.target_image_ids).float().mean()
    assert 0.15 < noise < 0.22  # a replaced code may draw itself
    of_pair = [tokens.images(batch.sample_ids.numpy(), np.full(size, v)) for v in range(3)]
    target = batch.target_image_ids.numpy()
    plain = (target == of_pair[0]).all(1)
    assert np.all(plain | (target == of_pair[1]).all(1) | (target == of_pair[2]).all(1))
    assert 0.5 < plain.mean() < 0.75


def test_one_option_does_not_move_the_draws_of_another(cache: TokenCache) -> None:
    base = loader(cache, BUSY, batch_size=50).batch(2)
    without = DataConfig(
        caption_dropout=0.3, alternate_caption_probability=0.5, image_source_noise=0.1, source_view_probability=0.7
    )
    changed = loader(cache, without, batch_size=50).batch(2)
    assert torch.equal(base.text_ids, changed.text_ids)
    assert torch.equal(base.image_ids[:, B], changed.image_ids[:, B])
    assert not torch.equal(base.image_ids[:, A], changed.image_ids[:, A])


def test_certain_views_and_splits_without_views(cache: TokenCache) -> None:
    always = DataConfig(caption_dropout=0, source_view_probability=1.0)
    feed = loader(cache, always, batch_size=23)
    batch = feed.batch(0)
    assert not torch.equal(batch.image_ids[:, B], batch.image_ids[:, A])
    val = PairLoader(cache, "val", BUSY, SPEC, 4, 0)
    assert val.batch(0).image_ids.shape == (4, 2, 9)


def test_clean_batch_checks_its_numbers(cache: TokenCache) -> None:
    feed = loader(cache)
    assert len(feed.clean_batch([])) == 0
    assert len(feed.clean_batch([0, 22, 22])) == 3
    with pytest.raises(DataError, match=r"pair numbers 0 to 23: the split has 0 to 22"):
        feed.clean_batch([0, 23])


def test_a_cache_of_other_sizes_is_refused(cache: TokenCache) -> None:
    with pytest.raises(DataError, match=r"8 text slots and 3 x 3 codes.*num_text_slots = 9 and 3 x 3"):
        PairLoader(cache, "train", PLAIN, StreamSpec(num_text_slots=9, image_side=3), 4, 0)


def test_a_batch_takes_about_a_millisecond(cache: TokenCache) -> None:
    feed = loader(cache, BUSY, batch_size=16)
    times = []
    for step in range(60):
        start = time.process_time()
        feed.batch(step)
        times.append(time.process_time() - start)
    assert np.median(times) < 5e-3  # the goal is 1 ms on an idle machine
