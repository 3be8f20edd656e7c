"""Caption pictures: greedy, sampling, beam search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.sampling import sample, sample_uniforms
from megatron_vilg.sequence import Direction, TextToken

GREEDY = SampleConfig(temperature=0.0)
"""The likeliest token at each step."""
_NEVER = [int(token) for token in TextToken if token != TextToken.EOS]


def caption_ids(
    model: ViLG,
    image_ids: Tensor,
    settings: SampleConfig = GREEDY,
    *,
    beam: int = 1,
    length_penalty: float = 1.0,
    seed: int = 0,
    max_batch: int | None = None,
    first_picture: int = 0,
) -> list[list[int]]:
    """One caption for each picture, of text ids without any special token.

    Args:
        image_ids: int64 [B, N] on the model's device.
        settings: how to sample when ``beam`` is 1; the default is greedy. Guidance has no meaning here.
        beam: from 2 on: beam search, which looks at log-likelihoods only (``settings`` is not used).
        length_penalty: beam search picks the largest ``log P(tokens, EOS) / (number of tokens + 1) ** length_penalty``.
        seed: of the random streams; picture ``i`` depends on the seed and on its number alone.
        max_batch: pictures captioned at a time; None: all.
        first_picture: number of the first picture, when a longer list is captioned in parts.

    Returns:
        Per picture at most L ids; fewer where the model ended the caption.
    """
    captions: list[list[int]] = []
    slots = model.spec.num_text_slots
    with inference(model):
        for first in range(0, len(image_ids), max_batch or max(1, len(image_ids))):
            part = image_ids[first : first + max_batch] if max_batch else image_ids
            if beam > 1:
                captions += beam_search(model, part, beam, length_penalty)
            else:
                streams = [(first_picture + first + i, 0) for i in range(len(part))]
                uniforms = sample_uniforms(seed, streams, slots).to(part.device)
                captions += _draw(model, part, settings, uniforms)
    return captions


def _start(model: ViLG, image_ids: Tensor, beam: int) -> tuple[Decoder, Tensor]:
    """A decoder for ``beam`` captions of each picture, and the first predictions [B * beam, V]."""
    text_len = torch.zeros(len(image_ids), dtype=torch.int64, device=image_ids.device)
    distinct, index = image_ids.unique(dim=0, return_inverse=True)
    prefix = prefill(model, Direction.IMAGE_TO_TEXT, distinct, text_len[: len(distinct)]).select(index)
    return Decoder(model, prefix, beam), prefix.logits.repeat_interleave(beam, dim=0)


def _draw(model: ViLG, image_ids: Tensor, settings: SampleConfig, uniforms: Tensor) -> list[list[int]]:
    decoder, logits = _start(model, image_ids, 1)
    drawn: list[Tensor] = []
    ended = torch.zeros(len(image_ids), dtype=torch.bool, device=image_ids.device)
    for token in range(model.spec.num_text_slots):
        logits[:, _NEVER] = float("-inf")
        ids = sample(logits, settings, uniforms[:, token])
        ended |= ids == TextToken.EOS
        drawn.append(ids.masked_fill(ended, TextToken.EOS))
        if ended.all() or token + 1 == model.spec.num_text_slots:
            break
        logits = decoder.step(ids)
    return [_until_end(row) for row in torch.stack(drawn, dim=1).tolist()]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(TextToken.EOS)] if TextToken.EOS in ids else ids


@dataclass(slots=True)
class _Best:
    """The best finished caption of a picture so far."""

    score: float = float("-inf")
    ids: tuple[int, ...] = ()


def beam_search(model: ViLG, image_ids: Tensor, beam: int, length_penalty: float) -> list[list[int]]:
    """Keep the ``beam`` likeliest beginnings of each picture; one that ends leaves the beam, which shrinks by it."""
    count, slots = len(image_ids), model.spec.num_text_slots
    decoder, logits = _start(model, image_ids, beam)
    total = torch.full((count, beam), float("-inf"), dtype=torch.float64, device=image_ids.device)
    total[:, 0] = 0.0  # all rows of a picture are still equal
    room = torch.full((count,), beam, device=image_ids.device)
    rows = torch.empty(count, beam, 0, dtype=torch.int64, device=image_ids.device)
    best = [_Best() for _ in range(count)]
    for length in range(slots + 1):
        logits[:, _NEVER] = float("-inf")
        candidates = total[:, :, None] + logits.double().log_softmax(dim=-1).view(count, beam, -1)
        if length == slots:  # no slot is left: only the end may follow
            candidates[:, :, : TextToken.EOS] = float("-inf")
            candidates[:, :, TextToken.EOS + 1 :] = float("-inf")
        vocabulary = candidates.shape[2]
        total, place = candidates.flatten(1).topk(beam, dim=1)
        total = total.masked_fill(torch.arange(beam, device=total.device) >= room[:, None], float("-inf"))
        parent, ids = place // vocabulary, place % vocabulary
        ended = (ids == TextToken.EOS) & (total > float("-inf"))
        for picture, row in ended.nonzero().tolist():
            score = float(total[picture, row]) / (length + 1) ** length_penalty
            if score > best[picture].score:
                best[picture] = _Best(score, tuple(rows[picture, parent[picture, row]].tolist()))
        room = room - ended.sum(dim=1)
        total = total.masked_fill(ended, float("-inf"))
        if not (total > float("-inf")).any():
            break
        rows = torch.cat([rows.gather(1, parent[:, :, None].expand_as(rows)), ids[:, :, None]], dim=2)
        decoder.select(parent)
        logits = decoder.step(ids.flatten())
    return [list(b.ids) for b in best]
