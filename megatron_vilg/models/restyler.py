"""A transformer that draws a picture behind the codes of pictures of the same thing in other manners.

The generator learns a thing by its name, and draws it in manners that it was shown in. This model has no names: what it
draws must come from the references, so what it learns about two manners holds for things that it was never shown in
one of them. In-context translation, as visual prompting does it (arXiv 2212.02499), over an image tokenizer's codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.models.layers import Block

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Seen:
    """What every block keeps of a batch of rows: their references, and room for the codes drawn."""

    keys: tuple[Tensor, ...]
    """Per block [B, A, R * N + N, H]."""
    values: tuple[Tensor, ...]

    def of(self, rows: Tensor) -> Seen:
        """Copies of the rows with these numbers, int64 [b]."""
        return Seen(tuple(key[rows] for key in self.keys), tuple(value[rows] for value in self.values))


class Restyler(nn.Module):
    """Shapes: B rows, R references of each, N codes of a picture, M manners, D ``config.width``.

    Code number K (``hidden_code``) says that nothing is to be seen, manner number M that it is not told. A row with
    fewer references begins with hidden ones.

    Args:
        config: sizes.
        codebook: vectors of the image tokenizer's codes, float32 [K, C]; kept, and not trained.
        side: codes along one side of a picture.
        num_manners: M.
    """

    codebook: Tensor

    def __init__(self, config: RestylerConfig, codebook: Tensor, side: int, num_manners: int) -> None:
        super().__init__()
        self.config, self.side, self.num_manners = config, side, num_manners
        width = config.width
        self.register_buffer("codebook", F.pad(F.normalize(codebook.float(), dim=1), (0, 0, 0, 1)))
        self.code = nn.Embedding(len(codebook) + 1, width)
        self.vector = nn.Linear(codebook.shape[1], width)
        self.drawn = nn.Linear(width, width)
        self.row = nn.Embedding(side, width)
        self.column = nn.Embedding(side, width)
        self.shown_in = nn.Embedding(num_manners + 1, width)
        self.wanted_in = nn.Embedding(num_manners + 1, width)
        sizes = ModelConfig(num_layers=config.num_layers, width=width, num_heads=config.num_heads)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(codebook))
        self._initialise()

    @property
    def hidden_code(self) -> int:
        """K, the number of a code that is not to be seen."""
        return len(self.codebook) - 1

    @property
    def num_codes(self) -> int:
        """N, codes of a picture."""
        return self.side**2

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.out, block.mlp.down):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, pictures: Tensor, shown_in: Tensor, read: Tensor, wanted_in: Tensor) -> Tensor:
        """Predict every code of every picture from the pictures before it in its row, and its own codes before.

        Args:
            pictures: codes int64 [B, R + 1, N] of one thing in each row.
            shown_in: their manners as references, int64 [B, R + 1].
            read: their codes as they are read when they are drawn, int64 [B, R + 1, N]; the last of each is not.
            wanted_in: their manners when they are drawn, int64 [B, R + 1].

        Returns:
            Logits float32 [B, R + 1, N, K].
        """
        rows, count = wanted_in.shape
        first = torch.full_like(read[:, :, :1], self.hidden_code)
        read = torch.cat([first, read[:, :, :-1]], dim=2)
        x = self._targets(read.flatten(0, 1), wanted_in.flatten(), 0).view(rows, count * self.num_codes, -1)
        x = torch.cat([self._references(pictures[:, :-1], shown_in[:, :-1]), x], dim=1)
        mask = self._mask(count - 1, x.device)
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = (part.transpose(1, 2) for part in block.attention.project_alike(block.norm1(x)))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = block.add_mlp(block.add_attention(x, block.attention.out(out.transpose(1, 2).flatten(-2))))
        x = x[:, -count * self.num_codes :]
        logits: Tensor = self.head(self.norm(x)).float()
        return logits.view(rows, count, self.num_codes, -1)

    def look(self, references: Tensor, shown_in: Tensor) -> Seen:
        """Read the references of B rows, codes int64 [B, R, N] in manners [B, R], once for all steps of drawing."""
        x = self._references(references, shown_in)
        mask = self._mask(references.shape[1], x.device)[: x.shape[1], : x.shape[1]]
        keys, values = [], []
        for block in self.blocks:
            assert isinstance(block, Block)
            q, k, v = (part.transpose(1, 2) for part in block.attention.project_alike(block.norm1(x)))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = block.add_mlp(block.add_attention(x, block.attention.out(out.transpose(1, 2).flatten(-2))))
            keys.append(F.pad(k, (0, 0, 0, self.num_codes)))
            values.append(F.pad(v, (0, 0, 0, self.num_codes)))
        return Seen(tuple(keys), tuple(values))

    def step(self, seen: Seen, place: int, before: Tensor, wanted_in: Tensor) -> Tensor:
        """Predict the code at ``place``; ``seen`` is filled up to there.

        Args:
            seen: of B rows, with all places before this one.
            place: number of the code, from 0.
            before: the code drawn before it, int64 [B]; at place 0 ``hidden_code``.
            wanted_in: manners, int64 [B].

        Returns:
            Logits float32 [B, K].
        """
        x = self._targets(before[:, None], wanted_in, place)
        at = seen.keys[0].shape[2] - self.num_codes + place
        for block, keys, values in zip(self.blocks, seen.keys, seen.values, strict=True):
            assert isinstance(block, Block)
            q, k, v = (part.transpose(1, 2) for part in block.attention.project_alike(block.norm1(x)))
            keys[:, :, at], values[:, :, at] = k[:, :, 0], v[:, :, 0]
            out = F.scaled_dot_product_attention(q, keys[:, :, : at + 1], values[:, :, : at + 1])
            x = block.add_mlp(block.add_attention(x, block.attention.out(out.transpose(1, 2).flatten(-2))))
        logits: Tensor = self.head(self.norm(x[:, 0])).float()
        return logits

    def _codes(self, codes: Tensor) -> Tensor:
        return self.code(codes) + self.vector(self.codebook)[codes]

    def _places(self) -> Tensor:
        place = torch.arange(self.num_codes, device=self.codebook.device)
        return self.row(place // self.side) + self.column(place % self.side)

    def _references(self, codes: Tensor, shown_in: Tensor) -> Tensor:
        return (self._codes(codes) + self._places() + self.shown_in(shown_in)[:, :, None]).flatten(1, 2)

    def _targets(self, read: Tensor, wanted_in: Tensor, place: int) -> Tensor:
        """Hidden [B, n, D] of the codes ``read`` [B, n] to predict those from ``place`` on."""
        places = self._places()[place : place + read.shape[1]]
        return self.drawn(self._codes(read)) + places + self.wanted_in(wanted_in)[:, None]

    def _mask(self, num_references: int, device: torch.device) -> Tensor:
        """Who sees whom, bool [T, T]: a reference itself and those before it, a drawing the references before it and
        its own codes so far."""
        size, seen = self.num_codes, num_references * self.num_codes
        place = torch.arange(seen + seen + size, device=device)
        picture = torch.where(place < seen, place, place - seen) // size
        is_reference = place < seen
        before = is_reference[None] & (picture[None] < picture[:, None])
        own = (picture[None] == picture[:, None]) & (is_reference[None] == is_reference[:, None])
        return before | (own & (is_reference[:, None] | (place[None] <= place[:, None])))
