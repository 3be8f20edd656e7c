"""The best of several captions of a picture, by both directions of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron_vilg.config.schema import SampleConfig

if TYPE_CHECKING:
    from megatron_vilg.generate.pipeline import Pipeline


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
