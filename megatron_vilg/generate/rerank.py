"""Order pictures by how likely the model itself finds their prompt as a caption (as in CogView, section 4.1).

The paper reranks with an in-house contrastive model that is not public; the image-to-text direction of the generator
is a stand-in that needs no second model.
"""

from __future__ import annotations

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
    scores = []
    size = max_batch or max(1, len(image_ids))
    with inference(model):
        for first in range(0, len(image_ids), size):
            part = slice(first, first + size)
            scores.append(_score(model, image_ids[part], text_ids[part], text_len[part]))
    return torch.cat(scores) if scores else torch.empty(0, device=image_ids.device)


def _score(model: ViLG, image_ids: Tensor, text_ids: Tensor, text_len: Tensor) -> Tensor:
    logits = model.logits(text_ids, image_ids, text_len, Direction.IMAGE_TO_TEXT)
    position = torch.arange(logits.shape[1], device=logits.device)
    targets = torch.nn.functional.pad(text_ids, (0, 1)).masked_fill(position == text_len[:, None], TextToken.EOS)
    each = logits.float().log_softmax(dim=-1).gather(2, targets[:, :, None]).squeeze(2)
    return each.masked_fill(position > text_len[:, None], 0.0).sum(dim=1)


def best_of(scores: Tensor, keep: int) -> Tensor:
    """Numbers of the ``keep`` best of each row, best first: scores [B, n] to int64 [B, keep]; ties keep their order."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]
