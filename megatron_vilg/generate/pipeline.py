"""Text to pictures and pictures to text with everything a run left behind: one object, a few calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from megatron_vilg.config.schema import RunConfig, SampleConfig
from megatron_vilg.data.images import to_image
from megatron_vilg.data.prompt_parts import prompt_parts
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.errors import ConfigError
from megatron_vilg.generate import rerank
from megatron_vilg.generate.candidates import caption_of_candidates, drawing_scores
from megatron_vilg.generate.caption import GREEDY, caption_ids
from megatron_vilg.generate.decode import inference
from megatron_vilg.generate.load import load_parts
from megatron_vilg.generate.picture_input import Picture, read_picture
from megatron_vilg.generate.pictures import draw_pixels
from megatron_vilg.generate.restyle import Restyling, draw_with_restyled
from megatron_vilg.generate.text_to_image import Progress, Prompts, draw_ids
from megatron_vilg.generate.weights import use_int8
from megatron_vilg.log import get_logger
from megatron_vilg.models.dual_encoder import DualEncoder
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.sampling import keep_best, part_weights
from megatron_vilg.parallel.mesh import Mesh

log = get_logger(__name__)

Precision = Literal["fp32", "bf16", "int8"]

NO_RECONSTRUCTOR = (
    "--decoder=end-to-end: this generator was trained without a reconstructor. Works: codebook, or a run that was "
    "trained with reconstructor.enabled=true"
)
_DECODE_BATCH = 64
"""Pictures that pass the image tokenizer at a time."""
_SCORE_BATCH = 128
"""Most pairs scored at a time: logits of all codes are kept for that many."""


class Pipeline:
    """A generator with its two tokenizers. Shapes: B prompts, n pictures of each, L text slots, N codes, S pixels.

    Args:
        model: the generator, on the device where everything is computed.
        text_tokenizer: captions to ids and back.
        image_tokenizer: pixels to codes and back, on the same device.
        config: resolved configuration; ``config.sample`` are the default settings.
        step: optimizer steps behind the weights.
        precision: arithmetic of the generator's matrix products; ``load`` makes weights ready for it.
        mesh: the ranks that share the generator along ``tp``, which make the same calls; None: this process has it all.
        max_batch: pictures drawn or captioned at a time where a call names no number; None: all. It changes nothing but
            memory.
        reranker: on that device, what choices among drawings listen to beside the generator; None: to that alone.
        restyling: what draws things in manners that training never showed them in; None: the generator.
    """

    def __init__(
        self,
        model: ViLG,
        text_tokenizer: TextTokenizer,
        image_tokenizer: ImageTokenizer,
        config: RunConfig,
        *,
        step: int = 0,
        precision: Precision = "fp32",
        mesh: Mesh | None = None,
        max_batch: int | None = None,
        reranker: DualEncoder | None = None,
        restyling: Restyling | None = None,
    ) -> None:
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.image_tokenizer = image_tokenizer
        self.config = config
        self.step = step
        self.precision = precision
        self.device = next(model.parameters()).device
        self.mesh = mesh or Mesh(self.device)
        self.max_batch = max_batch
        self.reranker = reranker
        self.restyling = restyling

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        mesh: Mesh | None = None,
        for_drawing: bool = True,
    ) -> Pipeline:
        """Read a run folder or an exported one: see ``load.load_parts``. Precision int8 is for one process."""
        in_bf16 = precision == "bf16" and torch.device(device).type != "cpu"  # a CPU packs a copy anyway
        parts = load_parts(Path(path), torch.device(device), mesh=mesh, in_bf16=in_bf16, for_drawing=for_drawing)
        log.info("loaded %s (step %d)", parts.source, parts.step)
        if precision == "int8":
            use_int8(parts.model)
        return cls(
            parts.model, parts.text_tokenizer, parts.image_tokenizer, parts.config,
            step=parts.step, precision=precision, mesh=mesh, reranker=parts.reranker, restyling=parts.restyling,
        )  # fmt: skip

    def encode_prompts(self, prompts: Sequence[str], *, warn: bool = True) -> tuple[Tensor, Tensor]:
        """Prompts to ids int64 [B, L] and lengths [B]; what does not fit is cut, with a warning that says how much."""
        slots = self.model.spec.num_text_slots
        ids = torch.zeros(len(prompts), slots, dtype=torch.int64)
        lengths = torch.zeros(len(prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens = self.text_tokenizer.encode(prompt)
            if warn and len(tokens) > slots:
                cut = self.text_tokenizer.decode(tokens[slots:])
                log.warning(
                    "prompt %r has %d tokens, the model has %d text slots: the last %d are cut (%r)",
                    *(prompt, len(tokens), slots, len(tokens) - slots, cut),
                )
            kept = tokens[:slots]
            ids[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            lengths[row] = len(kept)
        return ids.to(self.device), lengths.to(self.device)

    def encode_with_parts(self, prompts: Sequence[str], settings: SampleConfig) -> Prompts:
        """Prompts as ids, with those of their parts where ``settings`` lets them pull on their own."""
        ids, length = self.encode_prompts(prompts)
        parts = [prompt_parts(prompt) for prompt in prompts]
        if not any(part_weights(settings)) or not any(map(any, parts)):
            return Prompts(ids, length)
        part_ids, part_length = self.encode_prompts([text for both in parts for text in both], warn=False)
        return Prompts(ids, length, part_ids.unflatten(0, (-1, 2)), part_length.unflatten(0, (-1, 2)))

    def draw_ids(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        settings: SampleConfig | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        image_prefix: Tensor | None = None,
        first_prompt: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Codes of ``num_images`` pictures for each prompt: int64 [B, n, N]. See ``text_to_image.draw_ids``."""
        settings = settings or self.config.sample

        def draw(part: slice) -> Tensor:
            return draw_ids(
                self.model, self.encode_with_parts(prompts[part], settings), settings,
                num_images=num_images, seed=seed, max_batch=max_batch or self.max_batch,
                image_prefix=None if image_prefix is None else image_prefix[part],
                first_prompt=first_prompt + part.start, progress=progress,
            )  # fmt: skip

        with self.arithmetic():
            return draw_with_restyled(
                self.restyling if image_prefix is None else None, prompts, settings, draw,
                num_images=num_images, seed=seed, first_prompt=first_prompt, same=self._same,
            )  # fmt: skip

    def draw_pixels(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        settings: SampleConfig | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        first_prompt: int = 0,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``draw_ids`` and ``decode`` in one: codes [B, n, N] and, on the CPU, pixels [B, n, 3, S, S].

        See ``pictures.draw_pixels``.
        """
        return draw_pixels(
            self, prompts, settings or self.config.sample,
            num_images=num_images, seed=seed, max_batch=max_batch or self.max_batch,
            first_prompt=first_prompt, progress=progress,
        )  # fmt: skip

    def draw(
        self,
        prompts: Sequence[str],
        *,
        num_images: int = 1,
        settings: SampleConfig | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Pictures: all of the first prompt, then all of the second, and so on."""
        _, pixels = self.draw_pixels(
            prompts, num_images=num_images, settings=settings, seed=seed, max_batch=max_batch, progress=progress
        )
        return [to_image(each) for each in pixels.flatten(0, 1)]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Codes [..., N] to pixels float32 [..., 3, S, S] in [-1, 1]."""
        flat = ids.reshape(-1, ids.shape[-1]).to(self.device)
        parts = [self.image_tokenizer.decode(self.image_tokenizer.lookup(part)) for part in flat.split(_DECODE_BATCH)]
        return self._joined(parts, ids.shape[:-1])

    @torch.no_grad()
    def decode_end_to_end(self, ids: Tensor, prompts: Sequence[str]) -> Tensor:
        """Codes [B, n, N] of B prompts through the hidden states: pixels float32 [B, n, 3, S, S] in [-1, 1].

        The states are those of the last block when prompt and codes are read once more, all codes at once. That is
        what drawing saw, and one state more: drawing never feeds the last code. With guidance it is the rows with
        prompt that are read. True codes (``encode_images``) are decoded in the same way.

        Raises:
            ConfigError: the generator was trained without a reconstructor.
        """
        reconstructor = self.model.reconstructor
        if reconstructor is None:
            raise ConfigError([NO_RECONSTRUCTOR])
        text_ids, text_len = self.encode_prompts(prompts, warn=False)
        each = ids.shape[1]
        text_ids, text_len = (x.repeat_interleave(each, dim=0) for x in (text_ids, text_len))
        flat = ids.flatten(0, 1).to(self.device)
        parts = []
        with inference(self.model), self.arithmetic():
            for rows in torch.arange(len(flat), device=self.device).split(_DECODE_BATCH):
                states = self.model.gold_states(text_ids[rows], flat[rows], text_len[rows])
                parts.append(reconstructor.decode(states.float()))
        return self._joined(parts, ids.shape[:2])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture]) -> Tensor:
        """Pictures (the largest centred square of each) to codes int64 [B, N].

        Raises:
            DataError: a file is missing or no picture.
        """
        size = self.image_tokenizer.config.image_size
        parts = []
        for first in range(0, len(images), _DECODE_BATCH):
            pixels = torch.cat([read_picture(image, size) for image in images[first : first + _DECODE_BATCH]])
            parts.append(self.image_tokenizer.encode(pixels.to(self.device)))
        if not parts:
            return torch.empty(0, self.model.spec.num_image_tokens, dtype=torch.int64, device=self.device)
        return self.mesh.same(torch.cat(parts), "tp")

    def caption_ids(
        self,
        images: Sequence[Picture] | Tensor,
        *,
        settings: SampleConfig = GREEDY,
        beam: int = 1,
        length_penalty: float = 1.0,
        seed: int = 0,
        max_batch: int | None = None,
        first_picture: int = 0,
    ) -> list[list[int]]:
        """One caption for each picture (or row of codes [B, N]), as ids. See ``caption.caption_ids``."""
        ids = images.to(self.device) if isinstance(images, Tensor) else self.encode_images(images)
        with self.arithmetic():
            return caption_ids(
                self.model,
                ids,
                settings,
                beam=beam,
                length_penalty=length_penalty,
                seed=seed,
                max_batch=max_batch or self.max_batch,
                first_picture=first_picture,
            )

    def caption(
        self,
        images: Sequence[Picture] | Tensor,
        *,
        settings: SampleConfig = GREEDY,
        beam: int = 1,
        length_penalty: float = 1.0,
        seed: int = 0,
        max_batch: int | None = None,
        first_picture: int = 0,
    ) -> list[str]:
        """One caption for each picture (or row of codes [B, N])."""
        found = self.caption_ids(
            images, settings=settings, beam=beam, length_penalty=length_penalty,
            seed=seed, max_batch=max_batch, first_picture=first_picture,
        )  # fmt: skip
        # On one line: byte tokens can spell a line break, which no caption that was encoded ever holds.
        return [" ".join(self.text_tokenizer.decode(ids).split()) for ids in found]

    def caption_log_likelihood(self, ids: Tensor, prompts: Sequence[str], *, max_batch: int | None = None) -> Tensor:
        """``log P(prompt | picture)`` in nats for codes [B, N] and their prompts: float32 [B]."""
        text_ids, text_len = self.encode_prompts(prompts, warn=False)
        with self.arithmetic():
            return rerank.caption_log_likelihood(
                self.model, ids.to(self.device), text_ids, text_len, max_batch=max_batch or self.max_batch
            )

    def score(
        self, ids: Tensor, prompts: Sequence[str], *, drawing_weight: float = 0.0, max_batch: int | None = None
    ) -> Tensor:
        """``rerank.pair_score`` of every picture of codes [B, n, N] with its prompt: float32 [B, n]."""
        text_ids, text_len = self.encode_prompts(prompts, warn=False)
        each = ids.shape[1]
        with self.arithmetic():
            return rerank.pair_score(
                self.model,
                ids.flatten(0, 1).to(self.device),
                text_ids.repeat_interleave(each, dim=0),
                text_len.repeat_interleave(each, dim=0),
                drawing_weight=drawing_weight,
                max_batch=self._score_batch(max_batch),
            ).view(ids.shape[:2])

    def caption_of_candidates(
        self,
        images: Sequence[Picture] | Tensor,
        candidates: int,
        *,
        seed: int = 0,
        max_batch: int | None = None,
        first_picture: int = 0,
    ) -> list[str]:
        """One caption for each picture (or row of codes [B, N]). See ``candidates.caption_of_candidates``."""
        ids = images.to(self.device) if isinstance(images, Tensor) else self.encode_images(images)
        return caption_of_candidates(
            self,
            ids,
            candidates,
            seed=seed,
            max_batch=max_batch,
            score_batch=self._score_batch(max_batch),
            first_picture=first_picture,
        )

    def restyled(self, prompts: Sequence[str], settings: SampleConfig) -> list[bool]:
        """Which of the prompts a restyler draws: things in manners that training never showed them in."""
        asked = {} if self.restyling is None or not settings.restyle else self.restyling.asked_by(prompts)
        return [number in asked for number in range(len(prompts))]

    def draw_candidates(
        self,
        prompts: Sequence[str],
        *,
        num_images: int,
        settings: SampleConfig | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        image_prefix: Tensor | None = None,
        first_prompt: int = 0,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw all pictures from which ``num_images`` are to be kept, as ``settings.rerank`` says.

        Returns:
            Codes int64 [B, n, N] in the order drawn, n = max(settings.rerank, num_images), and their ``score`` [B, n]
            or None where all are kept; for ``ops.sampling.keep_best``.
        """
        settings = settings or self.config.sample
        ids = self.draw_ids(
            prompts, num_images=max(settings.rerank, num_images), settings=settings, seed=seed,
            max_batch=max_batch, image_prefix=image_prefix, first_prompt=first_prompt, progress=progress,
        )  # fmt: skip
        if not settings.rerank or not prompts:
            return ids, None
        return ids, drawing_scores(self, ids, prompts, settings, max_batch=max_batch)

    def draw_best_ids(self, prompts: Sequence[str], *, num_images: int, **options: Any) -> tuple[Tensor, Tensor | None]:
        """``draw_candidates`` with its options, of which the best ``num_images`` are kept, best first."""
        return keep_best(*self.draw_candidates(prompts, num_images=num_images, **options), num_images)

    def _same(self, ids: Tensor) -> Tensor:
        """What the first of the ranks that share the generator has: they must go on alike."""
        return self.mesh.same(ids, "tp")

    def _joined(self, parts: list[Tensor], shape: torch.Size) -> Tensor:
        size = self.image_tokenizer.config.image_size
        pixels = torch.cat(parts) if parts else torch.empty(0, 3, size, size, device=self.device)
        return pixels.clamp(-1.0, 1.0).unflatten(0, shape)

    def _score_batch(self, max_batch: int | None) -> int:
        return min(max_batch or self.max_batch or _SCORE_BATCH, _SCORE_BATCH)

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Products in the pipeline's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield
