"""Order pictures of a prompt, or captions of a picture, by what both directions of the model think of the pair.

The paper reranks with an in-house contrastive model that is not public. CogView (section 4.1) orders pictures by how
likely the model finds their prompt as a caption. One model of both directions can do that, and the reverse: the
direction that draws knows details which the direction that captions overlooks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vilg.generate.decode import inference
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.sequence import Direction, TextToken


def caption_log_likelihood(
    model: ViLG, image_ids: Tensor, text_ids: Tensor, text_len: Tensor, *, max_batch: int | None = None
) -> Tensor:
    """``log P(text, EOS | picture)`` in nats.

    Args:
        image_ids: int64 [B, N].
        text_ids: int64 [B, L], PAD behind ``text_len``.
        text_len: int64 [B].
        max_batch: rows scored at a time; None: all.

    Returns:
        float32 [B].
    """
    return _in_parts(_caption_score, model, image_ids, text_ids, text_len, max_batch)


def drawing_log_likelihood(
    model: ViLG, image_ids: Tensor, text_ids: Tensor, text_len: Tensor, *, max_batch: int | None = None
) -> Tensor:
    """``log P(picture | text)`` in nats, over all N codes; arguments and result as ``caption_log_likelihood``."""
    return _in_parts(_drawing_score, model, image_ids, text_ids, text_len, max_batch)


def pair_score(
    model: ViLG,
    image_ids: Tensor,
    text_ids: Tensor,
    text_len: Tensor,
    *,
    drawing_weight: float,
    max_batch: int | None = None,
) -> Tensor:
    """``log P(text | picture) + drawing_weight * log P(picture | text)`` of B pairs: float32 [B]."""
    score = caption_log_likelihood(model, image_ids, text_ids, text_len, max_batch=max_batch)
    if drawing_weight:
        score = score + drawing_weight * drawing_log_likelihood(
            model, image_ids, text_ids, text_len, max_batch=max_batch
        )
    return score


def _in_parts(
    score: Callable[[ViLG, Tensor, Tensor, Tensor], Tensor],
    model: ViLG,
    image_ids: Tensor,
    text_ids: Tensor,
    text_len: Tensor,
    max_batch: int | None,
) -> Tensor:
    rows = torch.arange(len(image_ids), device=image_ids.device)
    with inference(model):
        parts = [
            score(model, image_ids[part], text_ids[part], text_len[part])
            for part in rows.split(max_batch or max(1, len(rows)))
        ]
    return torch.cat(parts)


def _drawing_score(model: ViLG, image_ids: Tensor, text_ids: Tensor, text_len: Tensor) -> Tensor:
    logits = model.logits(text_ids, image_ids, text_len, Direction.TEXT_TO_IMAGE)
    return logits.float().log_softmax(dim=-1).gather(2, image_ids[:, :, None]).squeeze(2).sum(dim=1)


def _caption_score(model: ViLG, image_ids: Tensor, text_ids: Tensor, text_len: Tensor) -> Tensor:
    logits = model.logits(text_ids, image_ids, text_len, Direction.IMAGE_TO_TEXT)
    position = torch.arange(logits.shape[1], device=logits.device)
    targets = torch.nn.functional.pad(text_ids, (0, 1)).masked_fill(position == text_len[:, None], TextToken.EOS)
    each = logits.float().log_softmax(dim=-1).gather(2, targets[:, :, None]).squeeze(2)
    return each.masked_fill(position > text_len[:, None], 0.0).sum(dim=1)
