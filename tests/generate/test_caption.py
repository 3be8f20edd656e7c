"""Captions: no special tokens, beam 1 is greedy, a wide beam finds what exhaustive search finds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.caption import beam_search, caption_ids
from megatron_vilg.generate.decode import inference
from megatron_vilg.generate.rerank import caption_log_likelihood, drawing_log_likelihood, pair_score
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.sequence import Direction, TextToken
from tests.tiny import tiny_batch, tiny_config, tiny_model

I2T = Direction.IMAGE_TO_TEXT


def pictures(model: ViLG, count: int) -> Tensor:
    return tiny_batch(model.config, count).image_ids[:, 0]


def log_probabilities(model: ViLG, codes: Tensor, ids: list[int]) -> Tensor:
    """Over all allowed tokens at positions 0 .. len(ids), from whole rows: float64 [len(ids) + 1, V]."""
    text = torch.zeros(1, model.spec.num_text_slots, dtype=torch.int64)
    text[0, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    with inference(model):
        logits = model.logits(text, codes[None], torch.tensor([len(ids)]), I2T)[0, : len(ids) + 1].double()
    logits[:, [token for token in TextToken if token != TextToken.EOS]] = float("-inf")
    return logits.log_softmax(dim=-1)


def greedy_without_cache(model: ViLG, codes: Tensor) -> list[int]:
    ids: list[int] = []
    while len(ids) < model.spec.num_text_slots:
        token = int(log_probabilities(model, codes, ids)[-1].argmax())
        if token == TextToken.EOS:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("pattern", ["paper", "full"])
def test_greedy_equals_search_without_cache(pattern: str) -> None:
    model = tiny_model(tiny_config(pattern=pattern, text_vocab_size=9), std=1.0)
    codes = pictures(model, 20)
    expected = [greedy_without_cache(model, row) for row in codes]
    assert len({len(ids) for ids in expected}) > 1  # some end early, some do not
    assert caption_ids(model, codes) == expected
    assert caption_ids(model, codes, max_batch=3) == expected
    # The search with a beam of one takes the same path.
    with inference(model):
        assert beam_search(model, codes, 1, 1.0) == expected


def test_samples_are_plain_text_and_belong_to_seed_and_picture() -> None:
    model = tiny_model()
    codes = pictures(model, 30)
    config = SampleConfig(temperature=1.5)
    drawn = caption_ids(model, codes, config, seed=3)
    assert caption_ids(model, codes, config, seed=3, max_batch=7) == drawn
    assert caption_ids(model, codes, config, seed=4) != drawn
    assert all(len(ids) <= 5 and all(i >= len(TextToken) for i in ids) for ids in drawn)
    assert len({len(ids) for ids in drawn}) > 2


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_wide_beam_equals_exhaustive_search(length_penalty: float) -> None:
    model = tiny_model(tiny_config(text_vocab_size=9, num_text_slots=3))
    codes = pictures(model, 3)
    words = range(len(TextToken), 9)
    found = caption_ids(model, codes, beam=27, length_penalty=length_penalty)
    for row, ids in zip(codes, found, strict=True):
        scores = {}
        for length in range(4):
            for caption in itertools.product(words, repeat=length):
                logp = log_probabilities(model, row, list(caption))
                total = sum(float(logp[k, token]) for k, token in enumerate((*caption, TextToken.EOS)))
                # Behind the last slot nothing but the end can follow; it counts as the model rates it.
                scores[caption] = total / (length + 1) ** length_penalty
        assert tuple(ids) == max(scores, key=lambda caption: scores[caption])


def beam_without_cache(model: ViLG, codes: Tensor, beam: int, length_penalty: float) -> list[int]:
    """The same search over whole rows: an ended caption takes its place in the beam with it."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    best, room = (float("-inf"), [int(TextToken.EOS)]), beam
    while live:
        found = []
        for total, ids in live:
            after = log_probabilities(model, codes, ids)[-1]
            tokens = range(len(after)) if len(ids) < model.spec.num_text_slots else [int(TextToken.EOS)]
            found += [(total + float(after[token]), [*ids, token]) for token in tokens]
        live, kept = [], sorted(found, reverse=True)[:room]
        for total, ids in kept:
            if ids[-1] != TextToken.EOS:
                live.append((total, ids))
                continue
            room -= 1
            best = max(best, (total / len(ids) ** length_penalty, ids))
    return best[1][:-1]


@pytest.mark.parametrize(("beam", "length_penalty"), [(2, 1.0), (2, 3.0), (3, 2.0)])
def test_narrow_beam_equals_a_search_over_whole_rows(beam: int, length_penalty: float) -> None:
    model = tiny_model(tiny_config(text_vocab_size=9), std=0.5)
    codes = pictures(model, 6)
    expected = [beam_without_cache(model, row, beam, length_penalty) for row in codes]
    assert len({len(ids) for ids in expected}) > 1, "some end early"
    assert caption_ids(model, codes, beam=beam, length_penalty=length_penalty) == expected


def test_beams_of_several_pictures_do_not_mix() -> None:
    model = tiny_model()
    codes = pictures(model, 5)
    together = caption_ids(model, codes, beam=3)
    assert together == [caption_ids(model, row[None], beam=3)[0] for row in codes]
    assert all(i >= len(TextToken) for ids in together for i in ids)


def test_no_pictures_no_captions() -> None:
    model = tiny_model()
    assert caption_ids(model, torch.empty(0, 16, dtype=torch.int64)) == []


def test_log_likelihood_is_the_sum_over_tokens_and_end() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, 6)
    text, codes, lengths = batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, 0]
    scores = caption_log_likelihood(model, codes, text, lengths)
    with inference(model):
        logp = model.logits(text, codes, lengths, I2T).log_softmax(dim=-1)
    for row in range(6):
        tokens = [*text[row, : lengths[row]].tolist(), int(TextToken.EOS)]
        assert scores[row].item() == pytest.approx(sum(logp[row, k, i].item() for k, i in enumerate(tokens)), abs=1e-4)
    torch.testing.assert_close(
        scores, caption_log_likelihood(model, codes, text, lengths, max_batch=4), atol=1e-4, rtol=0
    )


def test_pair_score_adds_the_direction_that_draws() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, 5)
    text, codes, lengths = batch.text_ids[:, 0], batch.image_ids[:, 0], batch.text_len[:, 0]
    drawing = drawing_log_likelihood(model, codes, text, lengths, max_batch=2)
    with inference(model):
        logp = model.logits(text, codes, lengths, Direction.TEXT_TO_IMAGE).log_softmax(dim=-1)
    for row in range(5):
        assert drawing[row].item() == pytest.approx(
            sum(logp[row, k, i].item() for k, i in enumerate(codes[row])), abs=1e-3
        )
    captions = caption_log_likelihood(model, codes, text, lengths)
    both = pair_score(model, codes, text, lengths, drawing_weight=0.1)
    torch.testing.assert_close(both, captions + 0.1 * drawing, atol=1e-3, rtol=0)
    torch.testing.assert_close(pair_score(model, codes, text, lengths, drawing_weight=0.0), captions)
