"""Draw image codes from text: sampling, guidance, completion of a partial picture.

All pictures have the same number of tokens, so the slots of a batch become free at the same time, and a list of
prompts is kept going by filling every batch to the brim: with whole prompts, whose samples share the keys and values
of the text, or across prompts where whole ones would leave slots empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.cache import CacheKind
from megatron_vilg.generate.decode import Decoder, Prefix, inference, prefill
from megatron_vilg.generate.static import Recording, StaticDecoder
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.sampling import guidance_weights, mixed, part_weights, sample, sample_uniforms
from megatron_vilg.sequence import Direction

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)``, counted in image tokens."""

FULL_ENOUGH = 0.75
"""Whole prompts are drawn together if they fill this share of a batch."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """B prompts as ids, and what each consists of."""

    ids: Tensor
    """int64 [B, L], PAD behind ``length``."""
    length: Tensor
    """int64 [B]; 0 draws without a caption."""
    part_ids: Tensor | None = None
    """int64 [B, 2, L]: manner and thing, which pull on their own where the settings say so; None: not known."""
    part_length: Tensor | None = None
    """int64 [B, 2]; 0: the prompt has no such part."""

    def conditions(self, chosen: Tensor, settings: SampleConfig) -> tuple[Tensor, Tensor]:
        """Text of the chosen prompts int64 [b] under each of G conditions, in the order of ``ops.sampling.mixed``: the
        prompts, their parts one after the other, nothing. Without guidance the prompts alone.

        Returns:
            int64 [G * b, L] and [G * b].
        """
        ids, length = [self.ids[chosen]], [self.length[chosen]]
        if any(self.weights(settings, 1)):
            for part, weight in enumerate(part_weights(settings)):
                if weight and self.part_ids is not None and self.part_length is not None:
                    ids.append(self.part_ids[chosen, part])
                    length.append(self.part_length[chosen, part])
            ids.append(torch.zeros_like(ids[0]))
            length.append(torch.zeros_like(length[0]))
        return torch.cat(ids), torch.cat(length)

    def weights(self, settings: SampleConfig, count: int) -> list[list[float]]:
        """``ops.sampling.guidance_weights`` of these conditions but the last."""
        return guidance_weights(settings, count, has_parts=self.part_ids is not None)


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures drawn side by side, as (prompt, sample), samples of a prompt next to each other."""

    pictures: tuple[tuple[int, int], ...]

    @property
    def shared_by(self) -> int:
        """n: every n neighbours have the same prompt and share its keys and values."""
        counts: dict[int, int] = {}
        for prompt, _ in self.pictures:
            counts[prompt] = counts.get(prompt, 0) + 1
        return math.gcd(*counts.values())

    @property
    def sources(self) -> list[int]:
        """The prompt of each group of n neighbours."""
        return [prompt for prompt, _ in self.pictures[:: self.shared_by]]


def batches(num_prompts: int, num_images: int, max_batch: int) -> Iterator[Batch]:
    """All pictures in order, never more than ``max_batch`` at a time, all batches but the last about full."""
    pictures = [(prompt, image) for prompt in range(num_prompts) for image in range(num_images)]
    whole = max_batch // num_images * num_images
    size = whole if whole >= FULL_ENOUGH * max_batch else max_batch
    for first in range(0, len(pictures), size):
        yield Batch(tuple(pictures[first : first + size]))


def draw_ids(
    model: ViLG,
    prompts: Prompts,
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
        prompts: B of them, on the model's device.
        settings: how to sample. With guidance each picture is also continued without text, and after each part.
        seed: of all random streams.
        max_batch: pictures drawn at a time; None: all.
        image_prefix: codes [B, m] that every picture of a prompt begins with, in raster order.
        first_prompt: number of the first prompt, when a longer list is drawn in parts.

    Returns:
        int64 [B, num_images, N].
    """
    total, size = len(prompts.ids), model.spec.num_image_tokens
    num_given = 0 if image_prefix is None else image_prefix.shape[1]
    ids = torch.empty(total, num_images, size, dtype=torch.int64, device=prompts.ids.device)
    if image_prefix is not None:
        ids[:, :, :num_given] = image_prefix[:, None]
    if num_given == size or not ids.numel():
        return ids
    done, steps = 0, total * num_images * (size - num_given)
    for batch in batches(total, num_images, max_batch or total * num_images):

        def count(pictures: int = len(batch.pictures)) -> None:
            nonlocal done
            done += pictures
            if progress is not None:
                progress(done, steps)

        drawn = draw_batch(
            model, prompts, batch, settings,
            seed=seed, image_prefix=image_prefix, first_prompt=first_prompt, cache=cache, after_step=count,
        )  # fmt: skip
        prompt, image = torch.tensor(batch.pictures, device=ids.device).unbind(1)
        ids[prompt, image] = drawn
    return ids


def draw_batch(
    model: ViLG,
    prompts: Prompts,
    batch: Batch,
    settings: SampleConfig,
    *,
    seed: int,
    image_prefix: Tensor | None = None,
    first_prompt: int = 0,
    cache: CacheKind = "pattern",
    after_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Codes int64 [pictures, N] of one batch; the other arguments are those of ``draw_ids``."""
    device, size = prompts.ids.device, model.spec.num_image_tokens
    sources = torch.tensor(batch.sources, device=device)
    given = None if image_prefix is None else image_prefix[sources]
    streams = [(first_prompt + prompt, image) for prompt, image in batch.pictures]
    uniforms = sample_uniforms(seed, streams, size).to(device)
    with inference(model):
        prefix = _read(model, *prompts.conditions(sources, settings), given)
        count = 0 if given is None else given.shape[1]
        draw = _draw_recorded if device.type == "cuda" else _draw_stepwise
        weights = prompts.weights(settings, size)
        ids = draw(model, prefix, batch.shared_by, settings, weights, uniforms, cache, after_step)
    if given is None:
        return ids
    return torch.cat([given.repeat_interleave(batch.shared_by, dim=0), ids[:, count:]], dim=1)


def _read(model: ViLG, text_ids: Tensor, text_len: Tensor, given: Tensor | None) -> Prefix:
    """The sources of a batch under all conditions, each different one read once."""
    if given is not None:
        given = given.repeat(len(text_ids) // len(given), 1)
    parts = [text_len[:, None], text_ids] + ([] if given is None else [given])
    distinct, index = torch.cat(parts, dim=1).unique(dim=0, return_inverse=True)
    slots = text_ids.shape[1]
    ids, length, start = distinct[:, 1 : slots + 1], distinct[:, 0], distinct[:, slots + 1 :]
    return prefill(model, Direction.TEXT_TO_IMAGE, ids, length, start).select(index)


def _draw_stepwise(
    model: ViLG,
    prefix: Prefix,
    num_targets: int,
    settings: SampleConfig,
    weights: list[list[float]],
    uniforms: Tensor,
    cache: CacheKind,
    after_step: Callable[[], None],
) -> Tensor:
    """Codes [pictures, N]; those that were given stay empty."""
    decoder = Decoder(model, prefix, num_targets, cache)
    size = model.spec.num_image_tokens
    ids = torch.zeros(len(uniforms), size, dtype=torch.int64, device=uniforms.device)
    logits = prefix.logits.repeat_interleave(num_targets, dim=0)
    for token in range(prefix.num_given, size):
        drawn = sample(mixed(logits, weights[token]), settings, uniforms[:, token])
        ids[:, token] = drawn
        after_step()
        if token + 1 < size:
            logits = decoder.step(drawn.repeat(len(weights[token]) + 1) if weights[token] else drawn)
    return ids


class RecordedDrawing:
    """Sampling and the decoder's step as one function without arguments, over buffers that stay where they are."""

    def __init__(
        self,
        decoder: StaticDecoder,
        prefix: Prefix,
        settings: SampleConfig,
        weights: list[list[float]],
        uniforms: Tensor,
        *,
        compiled: bool = False,
    ) -> None:
        self.decoder, self.settings, self.uniforms = decoder, settings, uniforms
        device, size = uniforms.device, uniforms.shape[1]
        self.forward = torch.compile(decoder.step) if compiled else decoder.step
        self.weights = torch.tensor(weights, device=device)
        self.logits = prefix.logits.repeat_interleave(decoder.num_targets, dim=0).float()
        self.ids = torch.zeros(size, len(uniforms), dtype=torch.int64, device=device)

    def state(self) -> list[Tensor]:
        """Everything that a step changes."""
        return [self.logits, self.ids, *self.decoder.state()]

    def sample(self) -> Tensor:
        """Draw the token at the decoder's position, and note it."""
        position = self.decoder.position[None]
        logits = mixed(self.logits, self.weights.index_select(0, position)[0])
        drawn = sample(logits, self.settings, self.uniforms.index_select(1, position)[:, 0])
        self.ids.index_copy_(0, position, drawn[None])
        return drawn

    def step(self) -> None:
        """Draw a token and predict the next."""
        drawn = self.sample()
        conditions = self.weights.shape[1] + 1
        self.logits.copy_(self.forward(drawn.repeat(conditions) if conditions > 1 else drawn))


def _draw_recorded(
    model: ViLG,
    prefix: Prefix,
    num_targets: int,
    settings: SampleConfig,
    weights: list[list[float]],
    uniforms: Tensor,
    cache: CacheKind,
    after_step: Callable[[], None],
) -> Tensor:
    """``_draw_stepwise`` on a GPU: one step is recorded, then replayed."""
    drawing = RecordedDrawing(StaticDecoder(model, prefix, num_targets, cache), prefix, settings, weights, uniforms)
    recording = Recording(drawing.step, drawing.state())
    for _ in range(prefix.num_given, model.spec.num_image_tokens - 1):
        recording.replay()
        after_step()
    drawing.sample()
    after_step()
    return drawing.ids.T.contiguous()
