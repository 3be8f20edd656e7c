"""What a model costs, from its sizes alone: parameters, floating-point operations, bytes kept for the backward pass.

No torch in here, so that ``vilg plan`` answers at once. Each formula has a test that counts the real thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.sequence import Direction, ImageBoundary

NUM_SEGMENTS = 4
"""Rows of the segment table: source and target of either direction."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of ``ViLG(config)``, in the order of its ``named_parameters``."""
    shapes = dict(_embedding_shapes(config))
    for layer in range(config.num_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block_shapes(config)}
    width = config.width
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {
        "heads.text.weight": (config.text_vocab_size, width),
        "heads.image.weight": (config.image_vocab_size, width),
    }
    return shapes


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix inside a block, or a kernel inside an image tokenizer.

    Neither a vector, nor an embedding or a head, nor the first or last convolution of an encoder or decoder. The first
    convolution of a dVAE's decoder is its codebook (``DVAEDecoder``), so its first block is hidden.
    """
    path = name.split(".")
    if path[0] in ("encoder", "decoder"):
        return ndim == 4 and len(path) > 3
    return ndim == 2 and path[0] == "blocks"


def num_parameters(config: ModelConfig) -> int:
    """Values in the whole model."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def num_stack_parameters(config: ModelConfig) -> int:
    """Values in the blocks alone, which is what papers count."""
    return config.num_layers * sum(prod(shape) for _, shape in _block_shapes(config))


def _embedding_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = config.width
    yield "embed.text.weight", (config.text_vocab_size, width)
    yield "embed.image.weight", (config.image_vocab_size, width)
    yield "embed.boundary.weight", (len(ImageBoundary), width)
    yield "embed.position.weight", (config.num_text_slots + 2, width)
    yield "embed.row.weight", (config.image_side, width)
    yield "embed.column.weight", (config.image_side, width)
    if config.segment_embedding:
        yield "embed.segment.weight", (NUM_SEGMENTS, width)
    if config.codebook_dim:
        yield "embed.code_projection.weight", (width, config.codebook_dim)


def _block_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, hidden = config.width, config.mlp_ratio * config.width

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs)
        yield f"{name}.bias", (outputs,)

    yield from norm("norm1")
    yield from linear("attention.q", width, width)
    yield "attention.k.weight", (width, width)
    yield from linear("attention.v", width, width)
    yield from linear("attention.out", width, width)
    if config.qk_norm:
        yield "attention.q_norm.weight", (config.head_dim,)
        yield "attention.k_norm.weight", (config.head_dim,)
    yield from norm("norm2")
    yield from linear("mlp.up", width, hidden)
    yield from linear("mlp.down", hidden, width)
    if config.sandwich_norm:
        yield from norm("post_norm1")
        yield from norm("post_norm2")


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of the forward pass of one pair (both directions, padding not counted)."""

    linear: int
    """Matrix products of all blocks; behind the last attention only positions that predict a token are needed."""
    attention_kept: int
    """Scores and weighted sums of the pairs of positions that the rules allow."""
    attention_dense: int
    """The same if every position looked at every position."""
    heads: int
    """Predictions: image tokens over the image vocabulary, text tokens over the text vocabulary."""
    unread: int
    """Matrix products behind the last attention at all other positions, where those are computed too."""

    @property
    def kept(self) -> int:
        """What the model needs; the numerator of model FLOPs utilisation."""
        return self.linear + self.attention_kept + self.heads

    @property
    def dense(self) -> int:
        """What a model without attention patterns would need."""
        return self.linear + self.attention_dense + self.heads


@lru_cache(maxsize=64)
def forward_flops(config: ModelConfig) -> Flops:
    """FLOPs of one pair's forward pass; the backward pass takes twice as many."""
    spec, width = config.spec, config.width
    matrices = {name: prod(shape) for name, shape in _block_shapes(config) if len(shape) == 2}
    behind = sum(size for name, size in matrices.items() if name.startswith(("attention.out", "mlp")))
    positions = len(Direction) * spec.num_used
    unread = 2 * (positions - spec.num_predicted) * behind
    per_score = 4 * width  # a multiply and an add, for the score and for the weighted sum
    kept = sum(
        kept_scores(config, pattern, direction)
        for pattern in layer_kinds(config.num_layers, config.pattern)
        for direction in Direction
    )
    return Flops(
        linear=2 * positions * config.num_layers * sum(matrices.values()) - unread,
        attention_kept=kept * per_score,
        attention_dense=len(Direction) * spec.num_used**2 * config.num_layers * per_score,
        heads=2
        * width
        * (spec.num_image_tokens * config.image_vocab_size + (spec.num_text_slots + 1) * config.text_vocab_size),
        unread=unread,
    )


def layer_kinds(num_layers: int, pattern: str) -> tuple[str, ...]:
    """The attention pattern of each layer, as ``ops.rules.layer_patterns`` gives it."""
    if pattern == "full":
        return ("full",) * num_layers
    return (*("column" if i % 4 == 2 else "row" for i in range(1, num_layers)), "conv")


@lru_cache(maxsize=64)
def kept_scores(config: ModelConfig, pattern: str, direction: Direction) -> int:
    """Pairs (query, key) that the rule of a layer allows in a row whose text slots are all used, padding left out."""
    spec = config.spec
    num_image, num_text, source = spec.num_image_tokens, spec.num_text_slots, spec.source_length(direction)
    near = sum(_near(config, pattern, direction, query) for query in range(num_image))
    if direction == Direction.TEXT_TO_IMAGE:
        return source**2 + (source + 1) + num_image * (source + 1) + near
    boundaries, text = 2 * source, sum(source + 1 + j for j in range(num_text + 1))
    return boundaries + num_image * 2 + near + text


def _near(config: ModelConfig, pattern: str, direction: Direction, query: int) -> int:
    """Image tokens that image token ``query`` (raster index) sees, itself included."""
    side, count = config.image_side, config.image_side**2
    causal = direction == Direction.TEXT_TO_IMAGE
    if pattern == "full":
        return query + 1 if causal else count
    if pattern == "column":
        return query // side + 1 if causal else side
    if pattern == "row":
        if causal:
            return min(query, side) + 1
        if config.image_to_text_row == "same_row":
            return side
        return min(query, side) + min(count - 1 - query, side) + 1
    half = config.conv_kernel // 2
    if not config.conv_wrap:
        row, column = divmod(query, side)
        first, last = max(0, column - half), min(side - 1, column + half)
        above, below = min(row, half), 0 if causal else min(side - 1 - row, half)
        own = column - first + 1 if causal else last - first + 1
        return (above + below) * (last - first + 1) + own
    reach = half * side + half
    first, last = max(0, query - reach), query if causal else min(count - 1, query + reach)
    # A window that wraps holds 2 half + 1 columns of every row, counted from its own corner on.
    return _in_window(last - query + reach, side, half) - _in_window(first - query + reach - 1, side, half)


def _in_window(offset: int, side: int, half: int) -> int:
    """How many of the offsets 0 to ``offset`` from a window's corner lie in one of its columns."""
    width = min(2 * half + 1, side)
    rows, rest = divmod(offset + 1, side)
    return rows * width + min(rest, width)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes per value, and the share of a model that one holder has."""

    compute: int
    """Of matrix products: 2 for bf16, 4 for fp32."""
    residual: int
    """Of hidden states between blocks."""
    split: int = 1
    """Holders that share heads, hidden features and, between blocks, positions."""
    autocast: bool = False
    """Whether products cast their inputs: queries, keys and values then keep one copy of theirs each."""


STATISTIC_BYTES = 4
"""Means, deviations and log-sums are float32."""


def input_bytes_per_row(config: ModelConfig, sizes: Sizes) -> float:
    """A block's input for one row: what recomputing a whole block keeps."""
    return config.spec.length * config.width * sizes.residual / sizes.split


def block_bytes_per_row(config: ModelConfig, sizes: Sizes, *, scores: bool, attention_inside: bool = True) -> float:
    """What one block keeps of one row for its backward pass, its input included.

    The same count as in arXiv 2205.05198, section 4.1, with queries and keys normalised and without dropout by default.

    Args:
        config: sizes of the model.
        sizes: bytes per value and number of holders.
        scores: whether softmax results are kept too, as by attention that is not fused.
        attention_inside: False if queries, keys, values and scores are computed again in the backward pass.
    """
    length, width, split = config.spec.length, config.width, sizes.split
    per_position = _norm_bytes(config, sizes) + _behind_bytes(config, sizes)
    per_position += sizes.compute * width / split  # input of the output projection
    per_position += 3 * sizes.compute * width / split  # queries, keys, values
    if config.qk_norm:
        per_position += 2 * sizes.compute * width / split + 4 * STATISTIC_BYTES * config.num_heads / split
    if attention_inside:
        per_position += STATISTIC_BYTES * config.num_heads / split  # log-sums of fused attention
        if scores:
            per_position += sizes.compute * config.num_heads * length / split
    return length * per_position


def left_out_bytes_per_row(config: ModelConfig, sizes: Sizes) -> float:
    """What the last block keeps less than others, because behind attention it computes predicted positions alone."""
    unread = config.spec.length - config.spec.num_predicted / len(Direction)
    return unread * _behind_bytes(config, sizes)


def _norm_bytes(config: ModelConfig, sizes: Sizes) -> float:
    """Kept for one position of the norm of a residual branch: its input, its result (whole rows), statistics."""
    copies = 2 if sizes.autocast else 1
    split = sizes.split
    return config.width * (sizes.residual / split + copies * sizes.compute) + 2 * STATISTIC_BYTES / split


def _behind_bytes(config: ModelConfig, sizes: Sizes) -> float:
    """Kept for one position behind the output projection of attention: feed-forward, dropout, norms of the sandwich."""
    width, split = config.width, sizes.split
    kept = _norm_bytes(config, sizes)
    kept += 2 * config.mlp_ratio * sizes.compute * width / split  # around the GELU
    if config.sandwich_norm:
        kept += 2 * (sizes.compute * width + 2 * STATISTIC_BYTES) / split
    if config.dropout:
        kept += 2 * width / split  # masks, one byte each
    return kept


@dataclass(frozen=True, slots=True)
class FoldShape:
    """How ``ops.fold_plan`` cuts the image queries of one direction: so many blocks, and the keys that each sees."""

    blocks: int
    keys: int


def fold_shape(config: ModelConfig, pattern: str, direction: Direction) -> FoldShape:
    """Blocks of a layer that is folded (``ops.attention_choice.executed_by``)."""
    side, count = config.image_side, config.image_side**2
    causal = direction == Direction.TEXT_TO_IMAGE
    block = side
    if pattern == "conv":
        half = config.conv_kernel // 2
        before = after = half * side + (half if config.conv_wrap else 0)
    elif pattern == "row" and (causal or config.image_to_text_row == "window"):
        before = after = side
        block = side // 2 if side % 2 == 0 and side >= 16 else side
    else:
        before = after = 0
    around = min(before, count - block) + (0 if causal else min(after, count - block))
    shared = config.spec.source_length(direction) + 1 if causal else 2
    return FoldShape(count // block, shared + around + block)


def fold_bytes_per_row(config: ModelConfig, sizes: Sizes, pattern: str) -> float:
    """What folding one layer on a GPU keeps of one row besides: keys and values of every block, the image's queries,
    and the results of both kernels; the mean of both directions."""
    copied = 0
    for direction in Direction:
        shape = fold_shape(config, pattern, direction)
        copied += 2 * shape.blocks * shape.keys + config.spec.num_image_tokens + config.spec.num_used
        if direction == Direction.IMAGE_TO_TEXT:  # the others are on both sides of the image, and are gathered
            copied += config.spec.num_used - config.spec.num_image_tokens
    return copied / len(Direction) * sizes.compute * config.width / sizes.split


def backward_bytes_per_row(config: ModelConfig, sizes: Sizes, *, scores: bool, folded: float = 0.0) -> float:
    """What passes through the backward pass of a block for one row: the hidden state's gradient and the widest others.

    Those are of the feed-forward's inside or of attention, when the feed-forward's own tensors are gone already: with
    ``scores`` written out two of their size, with keys and values ``folded`` (bytes of a row) as much again.
    """
    widest = config.mlp_ratio * sizes.compute * config.width / sizes.split
    inside = 2 * sizes.compute * config.num_heads * config.spec.length / sizes.split if scores else 0.0
    widest = max(widest, max(inside, folded / config.spec.length) - _behind_bytes(config, sizes))
    return config.spec.length * (sizes.residual * config.width / sizes.split + widest)


def mask_bytes_per_row(config: ModelConfig, sizes: Sizes, num_masks: int) -> float:
    """Written-out masks of one row, one for each kind of layer that reads one; kept for the whole pass both ways."""
    return num_masks * config.spec.length**2 * sizes.compute
