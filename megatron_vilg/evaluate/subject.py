"""A trained model as evaluation sees it: what it must be able to do, and the settings of one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import RunConfig, SampleConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.evaluate.cross_entropy import Forward
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.parallel.replicas import Replicas
from megatron_vilg.sequence import StreamSpec


class Captions(Protocol):
    """The part of a text tokenizer that is needed here."""

    @property
    def vocab_size(self) -> int:
        """Token ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of captions, nothing added around them."""
        ...


class Pipeline(Protocol):
    """Draws and captions (``generate.pipeline.Pipeline``)."""

    def draw_candidates(
        self, prompts: Sequence[str], *, num_images: int, settings: SampleConfig, seed: int, first_prompt: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Prompts to codes int64 [len(prompts), n, N], n the larger of ``settings.rerank`` and ``num_images``, and
        their scores [.., n] if there is a choice. What is drawn depends on seed and number of the prompt."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., N] to pixels float32 [..., 3, S, S] in [-1, 1]."""
        ...

    def caption(self, images: Tensor) -> list[str]:
        """Codes [B, N] to B captions, greedily."""
        ...

    def caption_of_candidates(self, images: Tensor, candidates: int, *, seed: int, first_picture: int = 0) -> list[str]:
        """Codes [B, N] to B captions, the best of several sampled ones, by seed and number of the picture."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated."""

    pipeline: Pipeline
    image_tokenizer: ImageTokenizer
    text_tokenizer: Captions
    forward: Forward
    """The model in evaluation mode."""
    config: RunConfig
    """With every size resolved."""
    max_batch: int | None = None
    """Pairs that go through ``forward`` at a time at most; None: as many as an evaluation likes."""
    reranker: RerankerConfig | None = None
    """What choices among drawings listen to beside the model."""
    restyler: RestylerConfig | None = None
    """What draws, in place of the model, things in manners that training never showed them in."""
    replicas: Replicas = field(default_factory=Replicas)
    """Processes that evaluate together, each with all of this."""

    @property
    def spec(self) -> StreamSpec:
        """The row layout of the model."""
        return self.config.model.spec

    def clean_batch(self, captions: Sequence[str], image_ids: Tensor) -> PairBatch:
        """Both directions of pairs with the canonical caption and the picture itself: no dropout, noise or views.

        Captions longer than the model's text slots are cut, as in training.
        """
        slots = self.spec.num_text_slots
        encoded = [ids[:slots] for ids in self.text_tokenizer.encode_batch(captions)]
        text = torch.zeros(len(captions), slots, dtype=torch.int64)
        for row, ids in zip(text, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        length = torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)
        return PairBatch(
            text_ids=text[:, None].expand(-1, 2, -1),
            text_len=length[:, None].expand(-1, 2),
            image_ids=image_ids[:, None].expand(-1, 2, -1),
            target_image_ids=image_ids,
            sample_ids=torch.arange(len(captions)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """How much is drawn and measured."""

    seed: int = 0
    """Which pairs are looked at, who trades conditions, and what is drawn."""
    samples_per_prompt: int = 1
    """Pictures drawn and judged for each prompt."""
    max_prompts: int = 160
    """Prompts drawn, and pictures captioned, at most of each kind of pair."""
    cross_entropy_pairs: int = 256
    """Pairs on which cross-entropy is measured, at most of each kind."""
    shown_prompts: int = 8
    """Rows of the picture."""
    shown_samples: int = 4
    """Drawn pictures per row."""
    shown_captions: int = 12
    """Captioned pictures shown per kind."""
