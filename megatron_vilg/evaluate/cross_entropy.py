"""Does the model use its condition? Cross-entropy with the right condition, a wrong one, and none at all.

Three figures per direction, in nats per token, on the same clean targets:

- right: each target under its own condition;
- shuffled: each target under the condition of another pair (nobody keeps its own);
- unigram: each target under the token frequencies of the training pairs. No condition, no context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.data.batch import IGNORE, PairBatch, build_targets
from megatron_vilg.evaluate.statistics import derangement
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.sequence import Direction, StreamSpec

Forward = Callable[[PairBatch], tuple[Tensor, Tensor]]
"""A model as this module sees it: P pairs to image logits [P, N, K] and text logits [P, L + 1, V]."""
_ALONE = Replicas()
LOGIT_BYTES = 2**31
"""Logits that are there at a time."""
BatchReader = Callable[[Sequence[int]], PairBatch]
"""Clean pairs (no dropout, no noise, no shifted copies) by their numbers in the data set."""


@dataclass(frozen=True, slots=True)
class ConditionTest:
    """Nats per token of one direction."""

    right: float
    shuffled: float
    unigram: float


@dataclass(frozen=True, slots=True)
class TokenFrequencies:
    """Log-probabilities of single tokens, add-one smoothed."""

    image: Tensor
    """float32 [K]."""
    text: Tensor
    """float32 [V], the end of a caption counted as a token."""


def split_targets(batch: PairBatch, spec: StreamSpec) -> tuple[Tensor, Tensor]:
    """Labels of a batch: image [P, N], and text [P, L + 1] with ``IGNORE`` behind the end of the caption."""
    targets = build_targets(batch, spec)
    return targets[:, : spec.num_image_tokens], targets[:, spec.num_image_tokens :]


def count_tokens(
    read: BatchReader,
    indices: Sequence[int],
    spec: StreamSpec,
    *,
    image_vocab_size: int,
    text_vocab_size: int,
    batch_size: int = 512,
) -> TokenFrequencies:
    """Frequencies of all target tokens of the pairs ``indices``."""
    image = torch.ones(image_vocab_size, dtype=torch.float64)
    text = torch.ones(text_vocab_size, dtype=torch.float64)
    for start in range(0, len(indices), batch_size):
        image_labels, text_labels = split_targets(read(indices[start : start + batch_size]), spec)
        image += torch.bincount(image_labels.flatten(), minlength=image_vocab_size)
        text += torch.bincount(text_labels[text_labels != IGNORE], minlength=text_vocab_size)
    return TokenFrequencies(image=(image / image.sum()).log().float(), text=(text / text.sum()).log().float())


def shuffle_conditions(batch: PairBatch, partner: Tensor) -> PairBatch:
    """Give pair ``i`` the conditions of pair ``partner[i]``; targets and everything the target side is fed stay.

    Text-to-image rows get another caption, image-to-text rows another picture.
    """
    text_ids, text_len, image_ids = batch.text_ids.clone(), batch.text_len.clone(), batch.image_ids.clone()
    text_ids[:, Direction.TEXT_TO_IMAGE] = batch.text_ids[partner, Direction.TEXT_TO_IMAGE]
    text_len[:, Direction.TEXT_TO_IMAGE] = batch.text_len[partner, Direction.TEXT_TO_IMAGE]
    image_ids[:, Direction.IMAGE_TO_TEXT] = batch.image_ids[partner, Direction.IMAGE_TO_TEXT]
    return replace(batch, text_ids=text_ids, text_len=text_len, image_ids=image_ids)


def pairs_within(spec: StreamSpec, frequencies: TokenFrequencies, num_bytes: int) -> int:
    """How many pairs have logits and log-probabilities, in fp32, of ``num_bytes``: at least 1."""
    image, text = len(frequencies.image), len(frequencies.text)
    each = spec.num_image_tokens * image + (spec.num_text_slots + 1) * text
    return max(1, num_bytes // (2 * 4 * each))


@torch.no_grad()
def condition_test(
    forward: Forward,
    batch: PairBatch,
    spec: StreamSpec,
    frequencies: TokenFrequencies,
    *,
    seed: int,
    batch_size: int = 64,
    replicas: Replicas = _ALONE,
) -> dict[Direction, ConditionTest]:
    """Measure both directions on the pairs of ``batch`` (at least two), whatever its size.

    Args:
        forward: the model, in evaluation mode.
        seed: who trades conditions with whom.
        batch_size: pairs per forward pass at most; fewer where their logits would be larger than ``LOGIT_BYTES``.
        replicas: processes that call this alike and divide the forward passes; the result is that of one, to the bit.
    """
    batch_size = min(batch_size, pairs_within(spec, frequencies, LOGIT_BYTES))
    image_labels, text_labels = split_targets(batch, spec)
    labels = {Direction.TEXT_TO_IMAGE: image_labels, Direction.IMAGE_TO_TEXT: text_labels}
    tables = {Direction.TEXT_TO_IMAGE: frequencies.image, Direction.IMAGE_TO_TEXT: frequencies.text}
    partner = torch.from_numpy(derangement(len(batch), seed))
    variants = (batch, shuffle_conditions(batch, partner))
    right, shuffled = _mean_cross_entropies(forward, variants, labels, batch_size, replicas)
    return {
        direction: ConditionTest(
            right=right[direction],
            shuffled=shuffled[direction],
            unigram=-tables[direction][labels[direction][labels[direction] != IGNORE]].double().mean().item(),
        )
        for direction in Direction
    }


def _mean_cross_entropies(
    forward: Forward,
    variants: Sequence[PairBatch],
    labels: dict[Direction, Tensor],
    batch_size: int,
    replicas: Replicas,
) -> list[dict[Direction, float]]:
    """Means over all tokens that count, so that a last, smaller block weighs no more than its tokens; by variant of the
    batch."""
    blocks = [
        (number, slice(start, min(start + batch_size, len(batch))))
        for number, batch in enumerate(variants)
        for start in range(0, len(batch), batch_size)
    ]
    own = range(replicas.rank, len(blocks), replicas.size)
    sums = {place: _sums(forward, variants[blocks[place][0]], labels, blocks[place][1]) for place in own}
    sums = {place: nats for part in replicas.gather(sums) for place, nats in part.items()}
    totals = [dict.fromkeys(Direction, 0.0) for _ in variants]
    for place, (number, _) in enumerate(blocks):
        for direction, nats in sums[place].items():
            totals[number][direction] += nats
    return [{d: total[d] / int((labels[d] != IGNORE).sum()) for d in Direction} for total in totals]


def _sums(forward: Forward, batch: PairBatch, labels: dict[Direction, Tensor], rows: slice) -> dict[Direction, float]:
    """Nats of some rows; their logits are gone before those of the next ones are computed."""
    return {
        direction: F.cross_entropy(
            logits.float().flatten(0, 1), labels[direction][rows].flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
        for direction, logits in zip(Direction, forward(batch.slice(rows.start, rows.stop)), strict=True)
    }
