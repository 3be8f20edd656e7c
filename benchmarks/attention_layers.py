"""C3: one attention layer of each pattern, folded, beside torch's fused kernel with the same mask or is_causal."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import OURS, Bench, Goal, Row, time_rows
from megatron_vilg.config.schema import ModelConfig
from megatron_vilg.models.cost import kept_scores
from megatron_vilg.ops.attention import Implementation, attend, prepare
from megatron_vilg.ops.rules import AttentionRule, Pattern, layer_patterns
from megatron_vilg.sequence import Direction

MASKED, CAUSAL = "SDPA, same mask", "SDPA, is_causal"
HEADS, HEAD_DIM = 8, 64
MODEL = ModelConfig(num_text_slots=64, image_side=32)
SPEC = MODEL.spec
LAYERS = Counter(layer_patterns(48, "paper"))
"""How often each pattern occurs in the paper's model."""
PATTERNS: tuple[Pattern, ...] = ("row", "column", "conv")


def attention_layers(bench: Bench) -> Iterator[Row]:
    """Milliseconds per layer and row of 1104 positions, 8 heads of 64, 32 x 32 codes, 64 text tokens.

    The limit is the time of the products of kept scores alone, at the rate of a large product.
    """
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    rate = _product_rate(bench, dtype)
    mix = {OURS: 0.0, MASKED: 0.0}
    for direction in Direction:
        for pattern in PATTERNS:
            for backward in (False, True):
                causal = direction == Direction.TEXT_TO_IMAGE
                contenders = _contenders(pattern, direction, backward, bench.device, dtype, causal)
                seconds = bench.interleave(contenders, 2 * bench.rounds)
                label = "forward + backward" if backward else "forward"
                name = f"{pattern} layer, {direction.name.lower().replace('_', '-')}, {label}"
                products = 4 * HEADS * HEAD_DIM * kept_scores(MODEL, pattern, direction) * (3.5 if backward else 1.0)
                goals = _goals(pattern, direction, backward)
                yield from time_rows("C3", name, seconds, goals, 1e3 * products / rate)
                if backward:
                    for contender in mix:
                        mix[contender] += LAYERS[pattern] * 1e3 * statistics.median(seconds[contender])
    yield Row(
        "C3", "48 layers of the paper, both directions, forward + backward", mix[OURS], "ms", MASKED, mix[MASKED],
        Goal("ratio", ">=", 3.0), less_is_better=True,
    )  # fmt: skip


def _product_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Operations per second of a product of 1024 x 1024 matrices."""
    a, b = (torch.randn(1024, 1024, device=bench.device, dtype=dtype) for _ in range(2))
    return 2 * 1024**3 / min(bench.interleave({"product": lambda: a @ b}, 10)["product"])


def _goals(pattern: Pattern, direction: Direction, backward: bool) -> dict[str, Goal]:
    """Image-to-text has no causal twin; a convolution sees two to four times as many keys as a line."""
    if pattern == "conv":
        return {MASKED: Goal("ratio", ">=", 1.5)}
    if backward:
        return {MASKED: Goal("ratio", ">=", 4.5)}
    wide_row = pattern == "row" and direction == Direction.TEXT_TO_IMAGE
    goals = {MASKED: Goal("ratio", ">=", 3.0 if wide_row else 5.0)}
    return goals if wide_row else goals | {CAUSAL: Goal("ratio", ">=", 3.0)}


def _contenders(
    pattern: Pattern, direction: Direction, backward: bool, device: torch.device, dtype: torch.dtype, causal: bool
) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, SPEC.length, HEADS, HEAD_DIM)
    q, k, v, gradient = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    inputs = [x.requires_grad_(backward) for x in (q, k, v)]
    text_len = torch.tensor([SPEC.num_text_slots], device=device)

    def run(function: Callable[[], Tensor]) -> Callable[[], object]:
        if not backward:
            return torch.inference_mode()(function)
        return lambda: torch.autograd.grad(function(), inputs, gradient)

    def ours(implementation: Implementation) -> Callable[[], Tensor]:
        ready = prepare(AttentionRule(pattern, SPEC), text_len, implementation, direction, dtype)
        return lambda: attend(q, k, v, ready)

    def causal_kernel() -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    contenders = {OURS: run(ours("fold")), MASKED: run(ours("sdpa"))}
    return contenders | {CAUSAL: run(causal_kernel)} if causal else contenders
