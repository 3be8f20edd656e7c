"""The best of several captions of a picture, or of several drawings of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig

if TYPE_CHECKING:
    from megatron_vilg.generate.pipeline import Pipeline

_RENDERED = 64
"""Drawings that a reranker looks at at a time."""


@torch.no_grad()
def drawing_scores(
    pipeline: Pipeline, ids: Tensor, prompts: Sequence[str], settings: SampleConfig, *, max_batch: int | None
) -> Tensor:
    """How well each drawing fits its prompt: ``Pipeline.score``, and what a reranker says, if there is one.

    Args:
        ids: int64 [B, n, N], n drawings of each of B prompts.
        settings: ``rerank_drawing_weight`` and ``rerank_contrastive_weight``.
        max_batch: drawings scored at a time.

    Returns:
        float32 [B, n].
    """
    scores = pipeline.score(ids, prompts, drawing_weight=settings.rerank_drawing_weight, max_batch=max_batch)
    if pipeline.reranker is None or not settings.rerank_contrastive_weight:
        return scores
    text_ids, text_len = pipeline.encode_prompts(prompts, warn=False)
    flat = ids.flatten(0, 1)
    prompt_of = torch.arange(len(prompts), device=text_ids.device).repeat_interleave(ids.shape[1])
    fits = [
        pipeline.reranker.score(pipeline.decode(flat[rows]), text_ids[prompt_of[rows]], text_len[prompt_of[rows]])
        for rows in torch.arange(len(flat), device=flat.device).split(_RENDERED)
    ]
    # Ranks that share the generator must choose alike.
    all_fits = pipeline.mesh.same(torch.cat(fits), "tp").view(ids.shape[:2])
    return scores + settings.rerank_contrastive_weight * all_fits


def caption_of_candidates(
    pipeline: Pipeline,
    ids: Tensor,
    candidates: int,
    *,
    seed: int,
    max_batch: int | None,
    score_batch: int,
    first_picture: int,
) -> list[str]:
    """One caption for each row of codes [B, N]: of some sampled ones and the greedy one, the best.

    Best is the largest ``log P(caption | picture) + log P(picture | caption)``: the direction that draws checks what
    the direction that captions says.

    Args:
        candidates: captions sampled of each picture, at temperature 1.
        seed: of the samples; picture ``i`` depends on the seed and on its number alone.
        max_batch: pictures captioned greedily at a time; None: all.
        score_batch: samples drawn at a time.
        first_picture: number of the first picture, when a longer list is captioned in parts.
    """
    if not len(ids):
        return []
    said = [[text] for text in pipeline.caption(ids, max_batch=max_batch)]
    drawn = pipeline.caption(
        ids.repeat_interleave(candidates, dim=0),
        settings=SampleConfig(),
        seed=seed,
        max_batch=score_batch,
        first_picture=first_picture * candidates,
    )
    for number, texts in enumerate(said):
        texts += drawn[number * candidates : (number + 1) * candidates]
    options = [list(dict.fromkeys(text for text in texts if text)) or [""] for texts in said]
    rows = [number for number, texts in enumerate(options) for _ in texts]
    flat = [text for texts in options for text in texts]
    scores = pipeline.score(ids[rows][:, None], flat, drawing_weight=1.0, max_batch=max_batch)[:, 0]
    best = [scores_of.argmax().item() for scores_of in scores.cpu().split([len(texts) for texts in options])]
    return [texts[int(place)] for texts, place in zip(options, best, strict=True)]
