"""Drawing and captioning divided among processes: that is where most of an evaluation's time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.evaluate.subject import Pipeline
from megatron_vilg.parallel.replicas import Replicas


@dataclass(frozen=True, slots=True)
class DividedPipeline:
    """A pipeline that every process has whole, and which all of them call alike: each does a stretch of the work.

    Every process gets everything, so whatever is measured is the same on all of them. What is drawn and said depends on
    the numbers of prompts and pictures, not on who does it; sums of a batch of another size may differ in their last
    bits, as they do between batch sizes of one process.
    """

    pipeline: Pipeline
    replicas: Replicas

    def draw_candidates(
        self, prompts: Sequence[str], *, num_images: int, settings: SampleConfig, seed: int, first_prompt: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """As the pipeline's; on the CPU."""
        own = self._stretch(len(prompts))
        ids, scores = self.pipeline.draw_candidates(
            prompts[own], num_images=num_images, settings=settings, seed=seed, first_prompt=first_prompt + own.start
        )
        parts = self.replicas.gather((ids.cpu(), None if scores is None else scores.cpu()))
        known = [part for _, part in parts if part is not None]
        return torch.cat([part for part, _ in parts]), torch.cat(known) if known else None

    def decode(self, ids: Tensor) -> Tensor:
        """As the pipeline's; by every process."""
        return self.pipeline.decode(ids)

    def caption(self, images: Tensor) -> list[str]:
        """As the pipeline's."""
        return self._together(self.pipeline.caption(images[self._stretch(len(images))]))

    def caption_of_candidates(self, images: Tensor, candidates: int, *, seed: int, first_picture: int = 0) -> list[str]:
        """As the pipeline's."""
        own = self._stretch(len(images))
        said = self.pipeline.caption_of_candidates(
            images[own], candidates, seed=seed, first_picture=first_picture + own.start
        )
        return self._together(said)

    def _stretch(self, count: int) -> slice:
        """Neighbours, for which batches need not be told single numbers; lengths differ by one at most."""
        rank, size = self.replicas.rank, self.replicas.size
        return slice(rank * count // size, (rank + 1) * count // size)

    def _together(self, said: list[str]) -> list[str]:
        return [text for part in self.replicas.gather(said) for text in part]
