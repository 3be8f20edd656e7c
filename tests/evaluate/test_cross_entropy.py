from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.data.batch import PairBatch
from megatron_vilg.evaluate.cross_entropy import (
    ConditionTest,
    condition_test,
    count_tokens,
    pairs_within,
    shuffle_conditions,
    split_targets,
)
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.sequence import Direction, StreamSpec, TextToken
from tests.helpers import run_distributed

SPEC = StreamSpec(num_text_slots=3, image_side=2)
IMAGE_VOCAB, TEXT_VOCAB, SHARPNESS = 8, 14, 4.0


def read(indices: Sequence[int]) -> PairBatch:
    """Pair ``i``: the caption is token ``6 + i`` once or twice, the picture four codes ``i``."""
    number = torch.tensor(indices)
    text_len = 1 + number % 2
    text = torch.where(torch.arange(3) < text_len[:, None], 6 + number[:, None], TextToken.PAD.value)
    image = number[:, None].expand(-1, 4)
    return PairBatch(
        text_ids=text[:, None].expand(-1, 2, -1).clone(),
        text_len=text_len[:, None].expand(-1, 2).clone(),
        image_ids=image[:, None].expand(-1, 2, -1).clone(),
        target_image_ids=image.clone(),
        sample_ids=number,
    )


def translator(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Reads the condition only, and answers as if every caption had one token."""
    code = batch.text_ids[:, Direction.TEXT_TO_IMAGE, :1] - 6
    image_logits = SHARPNESS * F.one_hot(code.expand(-1, 4), IMAGE_VOCAB).float()
    token = batch.image_ids[:, Direction.IMAGE_TO_TEXT, 0] + 6
    end = torch.full_like(token, TextToken.EOS.value)
    text_logits = SHARPNESS * F.one_hot(torch.stack([token, end, end, end], dim=1), TEXT_VOCAB).float()
    return image_logits, text_logits


def test_a_model_that_reads_its_condition_pays_for_a_wrong_one() -> None:
    batch = read([0, 2, 4, 6])
    frequencies = count_tokens(
        read, [0, 2, 4, 6], SPEC, image_vocab_size=IMAGE_VOCAB, text_vocab_size=TEXT_VOCAB, batch_size=3
    )
    result = condition_test(translator, batch, SPEC, frequencies, seed=0, batch_size=3)
    for direction, vocab in ((Direction.TEXT_TO_IMAGE, IMAGE_VOCAB), (Direction.IMAGE_TO_TEXT, TEXT_VOCAB)):
        right = math.log(math.exp(SHARPNESS) + vocab - 1) - SHARPNESS
        wrong_share = 1.0 if direction == Direction.TEXT_TO_IMAGE else 0.5
        assert result[direction].right == pytest.approx(right, abs=1e-5)
        assert result[direction].shuffled == pytest.approx(right + SHARPNESS * wrong_share, abs=1e-5)
    # 16 codes, 4 of each kind, add one: every seen code has probability 5 / 24.
    assert result[Direction.TEXT_TO_IMAGE].unigram == pytest.approx(-math.log(5 / 24), abs=1e-5)
    # Four captions of one token and four ends; 14 entries in the table.
    assert result[Direction.IMAGE_TO_TEXT].unigram == pytest.approx(-math.log(2 / 22) / 2 - math.log(5 / 22) / 2)


def test_logits_are_there_for_as_many_pairs_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [0, 2, 4, 6]
    frequencies = count_tokens(read, numbers, SPEC, image_vocab_size=IMAGE_VOCAB, text_vocab_size=TEXT_VOCAB)
    each = 2 * 4 * (4 * IMAGE_VOCAB + 4 * TEXT_VOCAB)
    assert [pairs_within(SPEC, frequencies, size) for size in (1, each, 3 * each - 1, 3 * each)] == [1, 1, 2, 3]
    whole = condition_test(translator, read(numbers), SPEC, frequencies, seed=0)
    sizes, alive = [], []

    def watched(batch: PairBatch) -> tuple[Tensor, Tensor]:
        assert not any(reference() is not None for reference in alive), "logits of the block before"
        sizes.append(len(batch))
        logits = translator(batch)
        alive.extend(map(weakref.ref, logits))
        return logits

    monkeypatch.setattr("megatron_vilg.evaluate.cross_entropy.LOGIT_BYTES", 3 * each)
    for direction, test in condition_test(watched, read(numbers), SPEC, frequencies, seed=0).items():
        assert dataclasses.astuple(test) == pytest.approx(dataclasses.astuple(whole[direction]))
    assert sizes == [3, 1, 3, 1]
    sizes.clear()
    condition_test(watched, read(numbers), SPEC, frequencies, seed=0, batch_size=2)
    assert sizes == [2, 2, 2, 2]


def _measured_together(batch_size: int) -> tuple[dict[Direction, ConditionTest], int]:
    numbers, calls = [0, 1, 2, 4, 6], []
    frequencies = count_tokens(read, numbers, SPEC, image_vocab_size=IMAGE_VOCAB, text_vocab_size=TEXT_VOCAB)

    def counted(batch: PairBatch) -> tuple[Tensor, Tensor]:
        calls.append(len(batch))
        return translator(batch)

    everyone = Replicas.of_group()
    found = condition_test(counted, read(numbers), SPEC, frequencies, seed=0, batch_size=batch_size, replicas=everyone)
    return found, len(calls)


@pytest.mark.parametrize(
    ("batch_size", "calls"), [(2, [3, 3]), (3, [2, 1, 1]), (5, [1, 1, 0])], ids=["even", "uneven", "one without work"]
)
def test_processes_divide_the_passes_and_find_what_one_does(batch_size: int, calls: list[int]) -> None:
    alone, total = _measured_together(batch_size)
    assert total == sum(calls)
    found = run_distributed(_measured_together, len(calls), batch_size)
    assert [own for _, own in found] == calls
    assert all(figures == alone for figures, _ in found), "to the bit"


def test_padding_behind_a_caption_does_not_count() -> None:
    _, labels = split_targets(read([0, 1]), SPEC)
    assert labels.tolist() == [[6, TextToken.EOS, -100, -100], [7, 7, TextToken.EOS, -100]]


def test_shuffling_changes_conditions_and_nothing_else() -> None:
    batch = read([0, 1, 2])
    shuffled = shuffle_conditions(batch, torch.tensor([1, 2, 0]))
    t2i, i2t = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
    assert shuffled.text_ids[:, t2i, 0].tolist() == [7, 8, 6]
    assert shuffled.text_len[:, t2i].tolist() == [2, 1, 1]
    assert shuffled.image_ids[:, i2t, 0].tolist() == [1, 2, 0]
    assert torch.equal(shuffled.text_ids[:, i2t], batch.text_ids[:, i2t])
    assert torch.equal(shuffled.text_len[:, i2t], batch.text_len[:, i2t])
    assert torch.equal(shuffled.image_ids[:, t2i], batch.image_ids[:, t2i])
    assert torch.equal(shuffled.target_image_ids, batch.target_image_ids)
