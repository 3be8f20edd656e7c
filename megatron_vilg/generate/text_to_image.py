"""Draw image codes from text: sampling, guidance, completion of a partial picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.cache import CacheKind
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.sampling import guided, sample, sample_uniforms
from megatron_vilg.sequence import Direction

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)``, counted in image tokens."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Pictures drawn side by side: samples ``first .. stop`` of prompts ``prompts``."""

    prompts: range
    samples: range

    @property
    def size(self) -> int:
        return len(self.prompts) * len(self.samples)


def draw_ids(
    model: ViLG,
    text_ids: Tensor,
    text_len: Tensor,
    settings: SampleConfig,
    *,
    num_images: int,
    seed: int,
    max_batch: int | None = None,
    image_prefix: Tensor | None = None,
    first_prompt: int = 0,
    cache: CacheKind = "pattern",
    progress: Progress | None = None,
) -> Tensor:
    """Draw ``num_images`` pictures for each prompt.

    Picture (prompt, sample) depends on the seed and on these two numbers alone: not on ``max_batch``, not on the other
    prompts (but for the last bits of matrix products, which can tip a draw that falls on a border).

    Args:
        text_ids: int64 [B, L] on the model's device, PAD behind ``text_len``.
        text_len: int64 [B]; 0 draws without a caption.
        settings: how to sample. Guidance other than 1 doubles the rows: each picture is also continued without text.
        seed: of all random streams.
        max_batch: pictures drawn at a time; None: all.
        image_prefix: codes [B, m] that every picture of a prompt begins with, in raster order.
        first_prompt: number of the first prompt, when a longer list is drawn in parts.

    Returns:
        int64 [B, num_images, N].
    """
    total, size = len(text_ids), model.spec.num_image_tokens
    num_given = 0 if image_prefix is None else image_prefix.shape[1]
    ids = torch.empty(total, num_images, size, dtype=torch.int64, device=text_ids.device)
    if image_prefix is not None:
        ids[:, :, :num_given] = image_prefix[:, None]
    if num_given == size or not ids.numel():
        return ids
    done = 0
    with inference(model):
        for chunk in _chunks(total, num_images, max_batch or total * num_images):
            part = slice(chunk.prompts.start, chunk.prompts.stop)
            given = None if image_prefix is None else image_prefix[part]
            streams = [(first_prompt + p, s) for p in chunk.prompts for s in chunk.samples]
            uniforms = sample_uniforms(seed, streams, size).to(text_ids.device)
            rows = _draw(model, text_ids[part], text_len[part], given, settings, len(chunk.samples), uniforms, cache)
            for token, drawn in enumerate(rows, start=num_given):
                ids[part, chunk.samples.start : chunk.samples.stop, token] = drawn.view(len(chunk.prompts), -1)
                done += chunk.size
                if progress is not None:
                    progress(done, total * num_images * (size - num_given))
    return ids


def _chunks(num_prompts: int, num_images: int, max_batch: int) -> Iterator[_Chunk]:
    """Cut the pictures into batches: whole prompts if at least one fits, else parts of one prompt."""
    prompts_each, samples_each = max(1, max_batch // num_images), min(num_images, max_batch)
    for p in range(0, num_prompts, prompts_each):
        for s in range(0, num_images, samples_each):
            yield _Chunk(range(p, min(p + prompts_each, num_prompts)), range(s, min(s + samples_each, num_images)))


def _draw(
    model: ViLG,
    text_ids: Tensor,
    text_len: Tensor,
    given: Tensor | None,
    settings: SampleConfig,
    num_images: int,
    uniforms: Tensor,
    cache: CacheKind,
) -> Iterator[Tensor]:
    """Yield the codes [P * num_images] of one raster position after the other."""
    direction = Direction.TEXT_TO_IMAGE
    with_guidance = settings.guidance != 1.0
    if with_guidance:
        text_ids = torch.cat([text_ids, torch.zeros_like(text_ids)])
        text_len = torch.cat([text_len, torch.zeros_like(text_len)])
        given = None if given is None else torch.cat([given, given])
    sources = [text_len[:, None], text_ids] + ([] if given is None else [given])
    distinct, index = torch.cat(sources, dim=1).unique(dim=0, return_inverse=True)
    slots = text_ids.shape[1]
    prefix = prefill(model, direction, distinct[:, 1 : slots + 1], distinct[:, 0], distinct[:, slots + 1 :])
    prefix = prefix.select(index)
    decoder = Decoder(model, prefix, num_images, cache)
    logits = prefix.logits.repeat_interleave(num_images, dim=0)
    last = model.spec.num_image_tokens - 1
    for token in range(prefix.num_given, last + 1):
        if with_guidance:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, settings.guidance)
        ids = sample(logits, settings, uniforms[:, token])
        yield ids
        if token < last:
            logits = decoder.step(torch.cat([ids, ids]) if with_guidance else ids)
