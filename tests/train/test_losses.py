"""The two-direction loss against a computation token by token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_vilg.config.schema import LossConfig
from megatron_vilg.data.batch import IGNORE, build_targets
from megatron_vilg.ops.cross_entropy import linear_cross_entropy
from megatron_vilg.sequence import TextToken
from megatron_vilg.train.losses import PairLoss, TokenCounts, weighted_loss
from tests.tiny import tiny_batch, tiny_config


def logits_and_targets():  # type: ignore[no-untyped-def]
    config = tiny_config()
    targets = build_targets(tiny_batch(config), config.spec)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(4, 16, config.image_vocab_size, generator=generator)
    text = torch.randn(4, 6, config.text_vocab_size, generator=generator)
    return image, text, targets


def pair_loss(
    image: torch.Tensor, text: torch.Tensor, targets: torch.Tensor, counts: TokenCounts, config: LossConfig
) -> PairLoss:
    """The loss as training computes it, with an output layer that gives these logits."""
    switches = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}
    sums = [
        linear_cross_entropy(logits, torch.eye(logits.shape[-1]), labels, **switches)
        for logits, labels in ((image, targets[:, :16]), (text, targets[:, 16:]))
    ]
    return weighted_loss(*sums, counts, config)


def test_targets_end_with_eos_and_ignore_padding() -> None:
    config = tiny_config()
    batch = tiny_batch(config)
    targets = build_targets(batch, config.spec)
    assert torch.equal(targets[:, :16], batch.target_image_ids)
    for row, ids, length in zip(
        targets[:, 16:].tolist(), batch.text_ids[:, 1].tolist(), batch.text_len[:, 1].tolist(), strict=True
    ):
        assert row == ids[:length] + [TextToken.EOS] + [IGNORE] * (5 - length)


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    total, count = 0.0, 0
    for row, label in zip(logits.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        if label != IGNORE:
            total += math.log(sum(math.exp(x) for x in row)) - row[label]
            count += 1
    return total, count


@pytest.mark.parametrize("normalisation", ["direction_mean", "token_sum"])
def test_loss_is_the_weighted_sum_of_both_directions(normalisation: str) -> None:
    image, text, targets = logits_and_targets()
    config = LossConfig(text_to_image_weight=0.7, image_to_text_weight=0.3, normalisation=normalisation)  # type: ignore[arg-type]
    image_sum, image_count = by_hand(image, targets[:, :16])
    text_sum, text_count = by_hand(text, targets[:, 16:])
    counts = TokenCounts.of(targets, 16)
    assert (counts.image, counts.text) == (image_count, text_count)
    result = pair_loss(image, text, targets, counts, config)
    assert result.image_ce.item() == pytest.approx(image_sum / image_count, abs=1e-5)
    assert result.text_ce.item() == pytest.approx(text_sum / text_count, abs=1e-5)
    if normalisation == "token_sum":
        image_count = text_count = image_count + text_count
    assert result.loss.item() == pytest.approx(0.7 * image_sum / image_count + 0.3 * text_sum / text_count, abs=1e-5)


def test_z_loss_and_label_smoothing() -> None:
    image, text, targets = logits_and_targets()
    counts = TokenCounts.of(targets, 16)
    plain = pair_loss(image, text, targets, counts, LossConfig())
    z = pair_loss(image, text, targets, counts, LossConfig(z_loss=0.1))
    valid = targets[:, 16:] != IGNORE
    expected = 0.1 * (image.logsumexp(-1).square().mean() + text.logsumexp(-1).square()[valid].mean())
    torch.testing.assert_close(z.loss - plain.loss, expected)
    smooth = pair_loss(image, text, targets, counts, LossConfig(label_smoothing=0.2))
    uniform = -image.log_softmax(-1).mean(-1).mean() - text.log_softmax(-1).mean(-1)[valid].mean()
    torch.testing.assert_close(smooth.loss, 0.8 * plain.loss + 0.2 * uniform)
    assert smooth.image_ce == plain.image_ce


def test_micro_batches_add_up() -> None:
    image, text, targets = logits_and_targets()
    counts = TokenCounts.of(targets, 16)
    whole = pair_loss(image, text, targets, counts, LossConfig())
    parts = [pair_loss(image[s], text[s], targets[s], counts, LossConfig()) for s in (slice(0, 1), slice(1, 4))]
    for field in dataclasses.fields(whole):
        torch.testing.assert_close(sum(getattr(p, field.name) for p in parts), getattr(whole, field.name))
