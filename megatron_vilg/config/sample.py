"""How pictures and captions are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from megatron_vilg.config.fields import STRICT, Count, Fraction, Guidance, NonNegative


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampleConfig:
    """Default sampling settings of ``vilg generate``, ``vilg caption`` and of sample pictures."""

    temperature: NonNegative = 1.0
    """Softmax temperature; 0 takes the most likely token."""
    top_k: Count = 0
    """Keep only this many likeliest tokens. 0: all."""
    top_p: Fraction = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: Fraction = 0.0
    """Keep only tokens at least this share as likely as the likeliest one. 0: all."""
    guidance: Guidance = 1.0
    """Classifier-free guidance scale; 1: off."""
    manner_guidance: Guidance = 0.0
    """How much ``MANNER`` of a prompt ``MANNER的THING`` pulls on its own, for combinations never seen. 0: off."""
    thing_guidance: Guidance = 0.0
    """How much ``THING`` of such a prompt pulls on its own. 0: off."""
    rerank: Count = 0
    """Pictures drawn of each prompt, of which those that both directions find likeliest are kept. 0: no choice."""
    rerank_drawing_weight: NonNegative = 0.1
    """Weight of ``log P(picture | caption)`` beside ``log P(caption | picture)`` in that choice."""
    rerank_contrastive_weight: NonNegative = 6.0
    """Weight of what a reranker (``vilg train-reranker``) says of caption and picture, where the run has one."""
    restyle: Count = 2
    """Orders of the references behind each drawing of a thing in a manner that training never showed it in, whose
    predictions are averaged, where the run has a restyler (``vilg train-restyler``). 0: the generator draws it."""
    restyle_manner_guidance: Guidance = 1.5
    """How much more the manner pulls there than it would by itself. 0: off."""
    restyle_reference_guidance: Guidance = 1.5
    """How much more the references pull there than they would by themselves. 0: off."""
    caption_candidates: Count = 0
    """Captions sampled of each picture; the one that both directions find likeliest is said. 0: greedy decoding."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the scale comes about from the first token to the last: at once, or growing from 1 in a straight line or
    along half a cosine (weak guidance keeps pictures diverse, Muse section 2.7)."""
