"""Sample pictures and captions while training: what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vilg.data.images import to_image
from megatron_vilg.data.loader import PairLoader
from megatron_vilg.generate.caption import caption_ids
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.sequence import Direction
from megatron_vilg.train.metrics import MetricWriter
from megatron_vilg.train.stages import Prepared

NUM_PAIRS = 6
"""Pairs shown per split."""


class SamplePictures:
    """Draws and captions the same few pairs of every split each time, to ``samples/`` and tensorboard.

    A picture per split: above the tokenizer's reconstruction of the real pictures, below what the model draws from
    their captions. The captions stand in tensorboard as a table.
    """

    def __init__(self, ready: Prepared, out: Path) -> None:
        self._ready = ready
        self._folder = out / "samples"
        run = ready.run
        self._batches = {}
        for split, count in ready.cache.splits.items():
            if count:
                loader = PairLoader(ready.cache, split, run.data, run.model.spec, run.train.batch_size, run.train.seed)
                # Spread over the split: neighbours are often the same thing drawn twice.
                indices = torch.linspace(0, count - 1, min(NUM_PAIRS, count)).long()
                self._batches[split] = loader.clean_batch(indices)

    @torch.no_grad()
    def __call__(self, model: ViLG, step: int, writer: MetricWriter) -> None:
        """Draw, caption, write."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        self._folder.mkdir(parents=True, exist_ok=True)
        for split, batch in self._batches.items():
            text_ids, text_len = batch.text_ids[:, Direction.IMAGE_TO_TEXT], batch.text_len[:, Direction.IMAGE_TO_TEXT]
            real = batch.target_image_ids.to(device)
            drawn = draw_ids(
                model,
                Prompts(text_ids.to(device), text_len.to(device)),
                self._ready.run.sample,
                num_images=1,
                seed=self._ready.run.train.seed,
            )[:, 0]
            captions = caption_ids(model, real)
            pixels = self._pixels(torch.cat([real, drawn]))
            grid = pixels.unflatten(0, (2, -1)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
            to_image(grid).save(self._folder / f"{split}-step-{step:08d}.png")
            writer.images(f"{split}/reconstructed_above_drawn", ((grid + 1) / 2).clamp(0, 1)[None], step)
            writer.text(f"{split}/captions", self._table(text_ids, text_len, captions), step)
        model.train(was_training)

    def _pixels(self, ids: Tensor) -> Tensor:
        tokenizer = self._ready.image_tokenizer
        return tokenizer.decode(tokenizer.lookup(ids)).float().cpu()

    def _table(self, text_ids: Tensor, text_len: Tensor, captions: Sequence[list[int]]) -> str:
        text = self._ready.text_tokenizer
        rows = ["| true | generated |", "|---|---|"]
        for ids, length, generated in zip(text_ids.tolist(), text_len.tolist(), captions, strict=True):
            rows.append(f"| {text.decode(ids[:length])} | {text.decode(generated)} |")
        return "\n".join(rows)
