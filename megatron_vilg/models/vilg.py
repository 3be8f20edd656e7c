"""ERNIE-ViLG's generator: one stack of blocks for text-to-image and image-to-text (paper section 3.1.2).

Shape letters: P pairs, B = 2P rows, T row length, D width, L text slots, N image tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import LossConfig, ModelConfig
from megatron_vilg.models.layers import Block, Linear, Rows
from megatron_vilg.models.reconstructor import Reconstructor
from megatron_vilg.ops.attention import Implementation, Prepared, prepare
from megatron_vilg.ops.cross_entropy import IGNORE, linear_cross_entropy
from megatron_vilg.ops.rules import AttentionRule, Pattern, layer_patterns
from megatron_vilg.sequence import Direction, ImageBoundary, TextToken

_DIRECTIONS = (Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT)


class StreamEmbed(nn.Module):
    """Token, position and segment vectors of either direction.

    Text has learned positions, images learned rows and columns (as in DALL-E, appendix B.1), the same in both
    directions. With ``codebook_dim`` an image token is also fed a projection of its codebook vector, so that codes
    that look alike start alike.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.spec = config.spec
        self.gradient_share = config.embedding_gradient_shrink
        width, side = config.width, config.image_side
        self.text = nn.Embedding(config.text_vocab_size, width)
        self.image = nn.Embedding(config.image_vocab_size, width)
        self.boundary = nn.Embedding(len(ImageBoundary), width)
        self.position = nn.Embedding(config.num_text_slots + 2, width)
        self.row = nn.Embedding(side, width)
        self.column = nn.Embedding(side, width)
        self.segment = nn.Embedding(4, width) if config.segment_embedding else None
        self.code_projection = nn.Linear(config.codebook_dim, width, bias=False) if config.codebook_dim else None
        if config.codebook_dim:
            self.register_buffer("codebook", torch.zeros(config.image_vocab_size, config.codebook_dim))

    def image_tokens(self, ids: Tensor, first: int | Tensor = 0) -> Tensor:
        """Codes [B, n] that stand at raster positions ``first .. first + n`` to [B, n, D], without segment."""
        x = self.image(ids)
        if self.code_projection is not None:
            vectors = cast(Tensor, self.codebook)[ids].to(self.code_projection.weight.dtype)
            x = x + self.code_projection(vectors)
        raster = torch.arange(ids.shape[1], device=ids.device) + first
        return x + self.row(raster // self.spec.image_side) + self.column(raster % self.spec.image_side)

    def text_tokens(self, ids: Tensor, first: int | Tensor) -> Tensor:
        """Text ids [B, n] at text positions ``first .. first + n`` (0 is CLS or BOS) to [B, n, D]."""
        position = torch.arange(ids.shape[1], device=ids.device) + first
        return self.text(ids) + self.position(position)

    def source(self, direction: Direction, ids: Tensor) -> Tensor:
        """The whole source block with its special tokens: text [B, L] or codes [B, N] to [B, source length, D]."""
        if direction == Direction.TEXT_TO_IMAGE:
            framed = nn.functional.pad(ids, (1, 0), value=TextToken.CLS)
            x = self.text_tokens(nn.functional.pad(framed, (0, 1), value=TextToken.SEP), 0)
        else:
            x = torch.cat(
                [
                    self._boundary(ids, ImageBoundary.BOI),
                    self.image_tokens(ids),
                    self._boundary(ids, ImageBoundary.EOI),
                ],
                dim=1,
            )
        return self._finish(x, direction, is_target=False)

    def target_start(self, direction: Direction, like: Tensor) -> Tensor:
        """The token that opens the target, BOI or BOS, for as many rows as ``like`` has: [B, 1, D]."""
        if direction == Direction.TEXT_TO_IMAGE:
            x = self._boundary(like, ImageBoundary.BOI)
        else:
            x = self.text_tokens(torch.full_like(like[:, :1], TextToken.BOS), 0)
        return self._finish(x, direction, is_target=True)

    def target(self, direction: Direction, ids: Tensor, first: int | Tensor = 0) -> Tensor:
        """Target tokens number ``first ..`` of the target (0: the first code or the first text token).

        ``first`` may be a 0-dim tensor, so that a recorded step can be replayed at the next position.
        """
        image = direction == Direction.TEXT_TO_IMAGE
        x = self.image_tokens(ids, first) if image else self.text_tokens(ids, first + 1)
        return self._finish(x, direction, is_target=True)

    def forward(self, text_ids: Tensor, image_ids: Tensor, direction: Direction) -> Tensor:
        """Whole rows of one direction: text [B, L], codes [B, N] to [B, T, D]."""
        image = direction == Direction.TEXT_TO_IMAGE
        source, target = (text_ids, image_ids) if image else (image_ids, text_ids)
        parts = [
            self.source(direction, source),
            self.target_start(direction, target),
            self.target(direction, target),
        ]
        x = torch.cat(parts, dim=1)
        return nn.functional.pad(x, (0, 0, 0, self.spec.length - x.shape[1]))

    def _boundary(self, like: Tensor, which: ImageBoundary) -> Tensor:
        return self.boundary(torch.full_like(like[:, :1], which))

    def _finish(self, x: Tensor, direction: Direction, *, is_target: bool) -> Tensor:
        if self.segment is not None:
            x = x + self.segment(torch.full((), 2 * direction + is_target, device=x.device))
        if self.gradient_share < 1.0:  # CogView: e <- a * e + (1 - a) * stop_gradient(e)
            x = self.gradient_share * x + (1.0 - self.gradient_share) * x.detach()
        return x


class OutputHead(Linear):
    """Hidden states to logits, or straight to the loss."""

    def forward(self, x: Tensor, labels: Tensor | None = None, loss: LossConfig | None = None) -> Any:
        """Hidden [..., D] to logits [..., V]; with labels int64 [...] to sums as ``linear_cross_entropy`` has them."""
        if labels is None:
            return super().forward(x)
        loss = loss or LossConfig()
        return linear_cross_entropy(x, self.weight, labels, z_loss=loss.z_loss, label_smoothing=loss.label_smoothing)


class ViLG(nn.Module):
    """The generator. Children may be ``None`` on a pipeline stage; parameter names never change.

    Args:
        config: sizes, with every 0 resolved (``RunConfig.resolve``).
        implementation: how attention is executed; results differ by rounding only.
    """

    def __init__(self, config: ModelConfig, implementation: Implementation = "dense") -> None:
        super().__init__()
        if not (config.image_side and config.text_vocab_size and config.image_vocab_size):
            raise ValueError("ModelConfig has unresolved sizes; call RunConfig.resolve(text_vocab_size=...) first")
        self.config = config
        self.spec = config.spec
        self.implementation = implementation
        self.reconstructor: Reconstructor | None = None
        """Attached by end-to-end runs (``models.reconstructor``); lives on the last pipeline stage."""
        self.computes_all = False
        """Whether the last block computes positions that nothing reads too: where ranks share the positions."""
        self.embed: StreamEmbed | None = StreamEmbed(config)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.num_layers)})
        self.norm: nn.LayerNorm | None = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.heads: nn.ModuleDict | None = nn.ModuleDict(
            {
                "text": OutputHead(config.width, config.text_vocab_size, bias=False),
                "image": OutputHead(config.width, config.image_vocab_size, bias=False),
            }
        )

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The attention pattern of every layer of the whole model."""
        return layer_patterns(self.config.num_layers, self.config.pattern)

    def rule(self, pattern: Pattern) -> AttentionRule:
        """The attention rule of layers with this pattern."""
        c = self.config
        return AttentionRule(pattern, self.spec, c.conv_kernel, c.conv_wrap, c.image_to_text_row)

    def compile_blocks(self) -> None:
        """``Block.compile_around_attention`` for every block; happens at its first forward pass."""
        for block in self.blocks.values():
            cast(Block, block).compile_around_attention()

    def run_blocks(
        self, x: Tensor, text_len: Tensor, direction: Direction | None = None, rows: Rows | None = None
    ) -> Tensor:
        """This stage's blocks on hidden [B, T, D]; ``direction`` None: rows alternate. ``rows`` is for the last one."""
        ready: dict[Pattern, Prepared] = {}
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        for name, block in self.blocks.items():
            pattern = self.patterns[int(name)]
            if pattern not in ready:
                ready[pattern] = prepare(self.rule(pattern), text_len, self.implementation, direction, dtype)
            is_last = int(name) == self.config.num_layers - 1
            x = block(x, ready[pattern], rows if is_last else None)
        return x

    def hidden(self, text_ids: Tensor, image_ids: Tensor, text_len: Tensor, direction: Direction) -> Tensor:
        """Last hidden states, normed, of rows of one direction: [B, T, D]. Needs the whole model."""
        assert self.embed is not None and self.norm is not None
        x = self.embed(text_ids, image_ids, direction)
        return self.norm(self.run_blocks(x, text_len, direction))

    def logits(self, text_ids: Tensor, image_ids: Tensor, text_len: Tensor, direction: Direction) -> Tensor:
        """Predictions of rows of one direction: [B, N, V_image] or [B, L + 1, V_text]. Needs the whole model."""
        assert self.heads is not None
        x = self.hidden(text_ids, image_ids, text_len, direction)[:, self.spec.target_slice(direction)]
        return self.heads["image" if direction == Direction.TEXT_TO_IMAGE else "text"](x)

    def forward(
        self,
        text_or_hidden: Tensor,
        image_ids: Tensor | None = None,
        *,
        text_len: Tensor,
        targets: Tensor | None = None,
        loss: LossConfig | None = None,
        pixels: Tensor | None = None,
    ) -> Any:
        """Both directions of P pairs; row ``r`` of 2P has direction ``r % 2``.

        Args:
            text_or_hidden: text ids int64 [2P, L] on the first stage, else hidden [2P, T, D].
            image_ids: codes int64 [2P, N]; first stage only.
            text_len: int64 [2P].
            targets: int64 [P, N + L + 1] from ``build_targets``; the last stage then returns sums, not logits.
            loss: z-loss and smoothing of those sums.
            pixels: uint8 [P, 3, S, S], with targets: the reconstructor's figures [P, 3] follow as a third result.

        Returns:
            Hidden [2P, T, D], but on the last stage: (image logits [P, N, V_image], text logits [P, L + 1, V_text]),
            or with targets the sums of image and text, each as ``linear_cross_entropy`` returns them.
        """
        x = text_or_hidden
        if self.embed is not None:
            assert image_ids is not None, "the first stage embeds codes"
            rows = [self.embed(x[d::2], image_ids[d::2], d) for d in _DIRECTIONS]
            x = torch.stack(rows, dim=1).flatten(0, 1)
        only_predicted = pixels is None and not self.computes_all  # a reconstructor reads other states too
        x = self.run_blocks(x, text_len, rows=self.predicted if only_predicted else None)
        if self.norm is None or self.heads is None:
            return x
        image, text = self._by_direction(x if only_predicted else self.predicted(x), len(text_len) // 2)
        if targets is None:
            return self.heads["image"](image), self.heads["text"](text)
        split = self.spec.num_image_tokens
        image_sums = self.heads["image"](image, targets[:, :split], loss)
        text_sums = self.heads["text"](text, targets[:, split:], loss)
        if pixels is None:
            return image_sums, text_sums
        assert self.reconstructor is not None, "pixels are for a model with a reconstructor"
        ids = targets[:, :split]
        figures = self.reconstructor(self.image_states(x[0::2]), pixels, ids.clamp(min=0))
        return image_sums, text_sums, figures * (ids[:, :1] != IGNORE)  # pairs without labels only fill a batch

    def predicted(self, x: Tensor) -> Tensor:
        """The positions of rows [2P, T, E] that predict a token, text-to-image first: [P * N + P * (L + 1), E]."""
        return torch.cat([x[d::2, self.spec.target_slice(d)].flatten(0, 1) for d in _DIRECTIONS])

    def _by_direction(self, x: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
        """``predicted`` states, normed: [P, N, D] and [P, L + 1, D]."""
        assert self.norm is not None
        image, text = self.norm(x).tensor_split([num_pairs * self.spec.num_image_tokens])
        return image.unflatten(0, (num_pairs, -1)), text.unflatten(0, (num_pairs, -1))

    def image_states(self, x: Tensor) -> Tensor:
        """The last block's outputs of text-to-image rows [P, T, D] that belong to the image tokens: [P, N, D].

        By default those whose *input* is token k. They have seen it, and every reading of the paper in which true
        codes are decoded better end to end needs that (its Table 7); ``reconstructor.state`` has the other reading.
        """
        assert self.reconstructor is not None
        if self.reconstructor.config.state == "prediction":
            return x[:, self.spec.target_slice(Direction.TEXT_TO_IMAGE)]
        return x[:, self.spec.image_slice(Direction.TEXT_TO_IMAGE)]

    def gold_states(self, text_ids: Tensor, image_ids: Tensor, text_len: Tensor) -> Tensor:
        """``image_states`` when the codes [P, N] are given, captions [P, L] before them. Needs the whole model."""
        assert self.embed is not None
        x = self.embed(text_ids, image_ids, Direction.TEXT_TO_IMAGE)
        return self.image_states(self.run_blocks(x, text_len, Direction.TEXT_TO_IMAGE))
