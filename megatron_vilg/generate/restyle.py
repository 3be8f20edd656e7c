"""Draw a thing in a manner that training never showed it in, behind pictures of it in other manners."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.data.library import Library
from megatron_vilg.models.restyler import Restyler, Seen
from megatron_vilg.ops.sampling import sample, sample_uniforms

_AT_ONCE = 32
"""Pictures drawn side by side: each has up to five rows, of 2 MB in the preset's sizes and bfloat16."""


@dataclass(frozen=True, slots=True)
class Restyling:
    """A restyler, on the device where everything is computed, and the pictures that it looks at."""

    model: Restyler
    library: Library

    def asked(self, prompt: str) -> tuple[int, int] | None:
        """Thing and manner of a prompt that names both in words of captions, if the library has the thing, but not in
        this manner; else None: what training has shown, or cannot be told apart, is for the generator to draw."""
        found = self.library.find(prompt)
        if found is None or found[1] in self.library.manner[self.library.pictures(found[0])]:
            return None
        return found

    def asked_by(self, prompts: Sequence[str]) -> dict[int, tuple[int, int]]:
        """``asked`` of those of the prompts that ask for such a thing, by their numbers from 0."""
        found = {number: self.asked(prompt) for number, prompt in enumerate(prompts)}
        return {number: asked for number, asked in found.items() if asked is not None}

    @torch.no_grad()
    def draw_ids(
        self,
        asked: Sequence[tuple[int, int]],
        streams: Sequence[int],
        settings: SampleConfig,
        *,
        num_images: int,
        seed: int,
    ) -> Tensor:
        """Draw ``num_images`` pictures of each of P things.

        Picture (prompt, image) depends on the seed and these two numbers alone.

        Args:
            asked: thing and manner of each.
            streams: numbers of their prompts.
            settings: ``restyle`` and what begins with it, temperature, and what cuts off unlikely codes.
            num_images: n.
            seed: of all random streams.

        Returns:
            int64 [P, n, N].
        """
        per = max(1, _AT_ONCE // num_images)
        return torch.cat(
            [
                self._draw_few(asked[first : first + per], streams[first : first + per], settings, num_images, seed)
                for first in range(0, len(asked), per)
            ]
        )

    def _draw_few(
        self,
        asked: Sequence[tuple[int, int]],
        streams: Sequence[int],
        settings: SampleConfig,
        num_images: int,
        seed: int,
    ) -> Tensor:
        model, device = self.model, self.model.codebook.device
        choices = [
            self._references(*wanted, settings.restyle, (seed, stream))
            for wanted, stream in zip(asked, streams, strict=True)
        ]
        blind = torch.full((1, model.config.num_references, model.num_codes), model.hidden_code)
        references = torch.cat([*(codes for codes, _ in choices), blind])
        shown_in = torch.cat([*(shown for _, shown in choices), torch.full_like(blind[:, :, 0], model.num_manners)])
        seen = model.look(references.to(device), shown_in.to(device))
        wanted_in = torch.tensor([manner for _, manner in asked], device=device)
        pictures = [(prompt, image) for prompt in range(len(asked)) for image in range(num_images)]
        uniforms = sample_uniforms(seed, [(streams[prompt], image) for prompt, image in pictures], model.num_codes)
        prompt_of = torch.tensor([prompt for prompt, _ in pictures], device=device)
        parts = zip(prompt_of.split(_AT_ONCE), uniforms.to(device).split(_AT_ONCE), strict=True)
        drawn = [self._draw(seen, wanted_in, prompts, draws, settings) for prompts, draws in parts]
        return torch.cat(drawn).view(len(asked), num_images, -1)

    def _references(self, thing: int, manner: int, count: int, stream: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """``count`` orders of the references: codes int64 [count, R, N] and manners [count, R]."""
        model, size = self.model, self.model.config.num_references
        found = self.library.pictures(thing, but=manner)
        codes = torch.full((count, size, model.num_codes), model.hidden_code)
        shown = torch.full((count, size), model.num_manners)
        rng = np.random.default_rng([number % 2**64 for number in stream])
        for order in range(count):
            chosen = rng.permutation(found)[:size]
            codes[order, size - len(chosen) :] = torch.from_numpy(self.library.codes[chosen].astype(np.int64))
            shown[order, size - len(chosen) :] = torch.from_numpy(self.library.manner[chosen])
        return codes, shown

    def _draw(self, seen: Seen, wanted: Tensor, prompt: Tensor, uniforms: Tensor, settings: SampleConfig) -> Tensor:
        """Codes [b, N] of pictures whose prompts have the numbers ``prompt`` [b]; the last row of ``seen`` is blind."""
        model, sets, count = self.model, settings.restyle, len(prompt)
        told = (prompt[:, None] * sets + torch.arange(sets, device=prompt.device)).flatten()
        rows, manners, of = [told], [wanted[prompt].repeat_interleave(sets)], [sets]
        if settings.restyle_manner_guidance:
            rows.append(told)
            manners.append(torch.full_like(told, model.num_manners))
            of.append(sets)
        if settings.restyle_reference_guidance:
            rows.append(torch.full_like(prompt, len(seen.keys[0]) - 1))
            manners.append(wanted[prompt])
            of.append(1)
        mine, manner = seen.of(torch.cat(rows)), torch.cat(manners)
        ids = torch.empty(count, model.num_codes, dtype=torch.int64, device=prompt.device)
        before = torch.full_like(prompt, model.hidden_code)
        for place in range(model.num_codes):
            read = torch.cat([before.repeat_interleave(each) for each in of])
            likely = model.step(mine, place, read, manner).log_softmax(dim=-1)
            groups = [
                part.view(count, each, -1).mean(dim=1)
                for part, each in zip(likely.split([count * n for n in of]), of, strict=True)
            ]
            before = sample(_guided(groups, settings), settings, uniforms[:, place])
            ids[:, place] = before
        return ids


def draw_with_restyled(
    restyling: Restyling | None,
    prompts: Sequence[str],
    settings: SampleConfig,
    draw: Callable[[slice], Tensor],
    *,
    num_images: int,
    seed: int,
    first_prompt: int,
    same: Callable[[Tensor], Tensor] = lambda ids: ids,
) -> Tensor:
    """All pictures of some prompts: of what a restyler is for by it, of the others by ``draw``.

    Args:
        restyling: None: there is none.
        prompts: B of them, the first with the number ``first_prompt``.
        settings: ``restyle=0`` leaves all to ``draw``.
        draw: codes int64 [b, n, N] of b neighbours.
        num_images: n.
        seed: of all random streams.
        first_prompt: see ``prompts``.
        same: gives all ranks that draw together the codes of one of them.

    Returns:
        int64 [B, n, N].
    """
    asked = {} if restyling is None or not settings.restyle else restyling.asked_by(prompts)
    if restyling is None or not asked:
        return draw(slice(0, len(prompts)))
    streams = [first_prompt + number for number in asked]
    drawn = same(restyling.draw_ids(list(asked.values()), streams, settings, num_images=num_images, seed=seed))
    ids = drawn.new_empty(len(prompts), *drawn.shape[1:])
    ids[list(asked)] = drawn
    for is_asked, numbers in itertools.groupby(range(len(prompts)), asked.__contains__):
        if not is_asked:
            part = list(numbers)
            ids[part] = draw(slice(part[0], part[-1] + 1))
    return ids


def _guided(groups: Sequence[Tensor], settings: SampleConfig) -> Tensor:
    """Log probabilities [b, K] from those with everything told, then those without what each guidance is about."""
    told, *without = groups
    weights = [settings.restyle_manner_guidance, settings.restyle_reference_guidance]
    mixed = told
    for weight, group in zip((w for w in weights if w), without, strict=True):
        mixed = mixed + weight * (told - group)
    return mixed
