"""Draw pictures and decode them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.behind import WorkBehind
from megatron_vilg.generate.text_to_image import Progress, batches, draw_batch

if TYPE_CHECKING:
    from megatron_vilg.generate.pipeline import Pipeline


def draw_pixels(
    pipeline: Pipeline,
    prompts: Sequence[str],
    settings: SampleConfig,
    *,
    num_images: int,
    seed: int,
    max_batch: int | None,
    first_prompt: int,
    progress: Progress | None,
) -> tuple[Tensor, Tensor]:
    """Codes [B, n, N] of B prompts and, on the CPU, pixels [B, n, 3, S, S]; arguments as of ``Pipeline.draw_pixels``.

    A finished batch passes the image tokenizer while the next one is drawn (on a GPU, in a stream of its own), and
    its pixels leave the device. So a device never holds more than ``max_batch`` pictures. Not so where a restyler draws
    some of them: then all are decoded behind all drawing.
    """
    codes = pipeline.model.spec.num_image_tokens
    if any(pipeline.restyled(prompts, settings)):
        ids = pipeline.draw_ids(
            prompts, num_images=num_images, settings=settings, seed=seed,
            max_batch=max_batch, first_prompt=first_prompt, progress=progress,
        )  # fmt: skip
        return ids.cpu(), pipeline.decode(ids).cpu()
    encoded = pipeline.encode_with_parts(prompts, settings)
    size = pipeline.image_tokenizer.config.image_size
    ids = torch.empty(len(prompts), num_images, codes, dtype=torch.int64)
    pixels = torch.empty(len(prompts), num_images, 3, size, size)
    done, total = 0, len(prompts) * num_images * codes
    decoding = WorkBehind(pipeline.device)
    for batch in batches(len(prompts), num_images, max_batch or max(1, len(prompts) * num_images)):

        def count(pictures: int = len(batch.pictures)) -> None:
            nonlocal done
            done += pictures
            if progress is not None:
                progress(done, total)

        with pipeline.arithmetic():
            drawn = draw_batch(
                pipeline.model, encoded, batch, settings,
                seed=seed, first_prompt=first_prompt, after_step=count,
            )  # fmt: skip
        prompt, image = torch.tensor(batch.pictures).unbind(1)
        decoding.start(lambda drawn=drawn: pipeline.decode(drawn), (pixels, (prompt, image)))  # type: ignore[misc]
        ids[prompt, image] = drawn.cpu()
    decoding.finish()
    return ids, pixels
