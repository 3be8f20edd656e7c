"""A toy world small enough to check every figure of a report by hand.

Pictures are 4 x 4 blocks of palette colours; a concept fills the upper half with its colours, a style the lower rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.evaluate.pairs import EvalPair, EvalSet, Kind
from megatron_vilg.evaluate.retrieval import Label
from megatron_vilg.evaluate.subject import Subject
from megatron_vilg.sequence import Direction

CONCEPTS = {"bear": "熊", "cat": "猫", "ship": "船", "tree": "树"}
STYLES = {"flat": "扁平风格", "round": "立体风格", "line": "描边风格"}
SIDE, BLOCK, CODES = 4, 3, 16
UNSEEN = {("bear", "flat"), ("cat", "round"), ("ship", "line")}
NEW_CONCEPT = "tree"
CHARACTERS = sorted({c for text in [*CONCEPTS.values(), *STYLES.values(), "的"] for c in text})


class BlockTokenizer:
    """One token per block: the nearest of 16 colours; exact on toy pictures."""

    config = ImageTokenizerConfig(
        image_size=SIDE * BLOCK, patch=BLOCK, channel_multipliers=(1,), codebook_size=CODES, codebook_dim=3
    )
    codebook = torch.rand(CODES, 3, generator=torch.Generator().manual_seed(3)).mul(255).round().div(127.5).sub(1)

    def encode(self, pixels: Tensor) -> Tensor:
        blocks = F.avg_pool2d(pixels, BLOCK).flatten(2).transpose(1, 2)
        return torch.cdist(blocks, self.codebook.expand(len(blocks), -1, -1)).argmin(dim=-1)

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codebook[ids]

    def decode(self, z_emb: Tensor) -> Tensor:
        small = z_emb.transpose(1, 2).reshape(len(z_emb), 3, SIDE, SIDE)
        return small.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)


class Characters:
    """Every character is a token."""

    vocab_size = len(CHARACTERS) + 6

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[CHARACTERS.index(c) + 6 for c in text] for text in texts]


class Memory:
    """Draws and captions from memory: everything right but what ``forgets`` says it never saw."""

    def __init__(self, codes: dict[str, Tensor], forgets: frozenset[str]) -> None:
        self.codes, self.forgets = codes, forgets

    def draw_ids(self, prompts: Sequence[str], *, num_images: int, settings: object, seed: int) -> Tensor:
        chosen = [min(self.codes) if prompt in self.forgets else prompt for prompt in prompts]
        return torch.stack([self.codes[prompt].expand(num_images, -1) for prompt in chosen])

    def draw_candidates(
        self, prompts: Sequence[str], *, num_images: int, settings: object, seed: int, first_prompt: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        return self.draw_ids(prompts, num_images=num_images, settings=settings, seed=seed), None

    def decode(self, ids: Tensor) -> Tensor:
        return BlockTokenizer().decode(BlockTokenizer().lookup(ids))

    def caption(self, images: Tensor) -> list[str]:
        names = list(self.codes)
        known = torch.stack(list(self.codes.values()))
        said = [names[int((known == ids).sum(dim=1).argmax())] for ids in images]
        return ["" if name in self.forgets else name for name in said]

    def caption_of_candidates(self, images: Tensor, candidates: int, *, seed: int, first_picture: int = 0) -> list[str]:
        return self.caption(images)


class Flat:
    """Stands in for the feature network."""

    def activations(self, pixels: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        return [pixels for _ in blocks]


def toy_codes(concept: str, style: str) -> Tensor:
    """The 16 codes of a picture."""
    what, how = list(CONCEPTS).index(concept), list(STYLES).index(style)
    ids = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    ids[:3] = torch.arange(12).reshape(3, 4).roll(3 * what) % 8 + what
    ids[3] = 12 + how
    return ids.flatten()


def toy_pairs(*, with_labels: bool = True, with_new_concept: bool = False) -> EvalSet:
    """Every concept in every style, three of the pairs held out, or a whole concept too."""
    tokenizer, pairs, pictures = BlockTokenizer(), [], []
    for concept, name in CONCEPTS.items():
        for style, style_name in STYLES.items():
            label = Label(concept, style) if with_labels else None
            kind = Kind.UNSEEN if (concept, style) in UNSEEN else Kind.TRAINED
            if with_new_concept and concept == NEW_CONCEPT:
                kind = Kind.NEW_CONCEPT
            caption = f"{style_name}的{name}"
            pairs.append(EvalPair(f"{concept}-{style}", caption, kind, label, name, style_name, f"{concept} · {style}"))
            pixels = tokenizer.decode(tokenizer.lookup(toy_codes(concept, style)[None]))[0]
            pictures.append(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())
    return EvalSet(pairs, np.stack(pictures))


def toy_subject(pairs: EvalSet) -> Subject:
    """A model that knows the trained pairs by heart and nothing else."""
    tokenizer = BlockTokenizer()
    run = RunConfig(
        model=ModelConfig(num_text_slots=8, text_vocab_size=Characters.vocab_size), image_tokenizer=tokenizer.config
    ).resolve()
    codes = tokenizer.encode(pairs.pixels(list(range(len(pairs)))))
    memory = {pair.caption: codes[number] for number, pair in enumerate(pairs.pairs)}
    forgets = frozenset(pairs.captions(pairs.of_kind(Kind.UNSEEN)))

    def forward(batch: PairBatch) -> tuple[Tensor, Tensor]:
        rows = Characters().encode_batch(list(memory))
        known = {tuple(row): codes[number] for number, row in enumerate(rows)}
        image, text = [], []
        for number in range(len(batch)):
            length = int(batch.text_len[number, Direction.TEXT_TO_IMAGE])
            ids = known[tuple(batch.text_ids[number, Direction.TEXT_TO_IMAGE, :length].tolist())]
            image.append(3.0 * F.one_hot(ids, CODES).float())
            picture = batch.image_ids[number, Direction.IMAGE_TO_TEXT]
            row = rows[int((codes == picture).sum(dim=1).argmax())]
            labels = torch.tensor([*row, 3, *[0] * (8 - len(row))])
            text.append(3.0 * F.one_hot(labels, Characters.vocab_size).float())
        return torch.stack(image), torch.stack(text)

    return Subject(Memory(memory, forgets), tokenizer, Characters(), forward, run)
