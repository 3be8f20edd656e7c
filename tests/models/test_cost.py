from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.models.cost import (
    FoldShape,
    fold_shape,
    forward_flops,
    is_hidden_matrix,
    kept_scores,
    layer_kinds,
    num_parameters,
    num_stack_parameters,
    parameter_shapes,
)
from megatron_vilg.models.tokenizers import build_image_tokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention_choice import executed_by
from megatron_vilg.ops.fold_plan import fold_plan
from megatron_vilg.ops.linear import has_onednn
from megatron_vilg.ops.rules import AttentionRule, full_length_mask, layer_patterns
from megatron_vilg.sequence import Direction
from tests.tiny import tiny_config

VARIANTS = [
    {},
    {"qk_norm": False, "segment_embedding": False},
    {"sandwich_norm": True, "codebook_dim": 4, "num_layers": 3},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_shapes_are_those_of_the_model(changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    with torch.device("meta"):
        model = ViLG(config)
    assert list(parameter_shapes(config).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("name", ["e2e-300m", "paper-10b"])
def test_large_presets_have_the_size_in_their_name(name: str) -> None:
    config = dataclasses.replace(PRESETS[name]().resolve(text_vocab_size=18_000).model)
    with torch.device("meta"):
        model = ViLG(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert num_stack_parameters(config) == sum(p.numel() for p in model.blocks.parameters())
    stack = {"e2e-300m": 0.302e9, "paper-10b": 9.66e9}[name]
    assert num_stack_parameters(config) == pytest.approx(stack, rel=0.002)


@pytest.mark.parametrize("side", [4, 6, 12])
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("changes", [{}, {"conv_wrap": False}, {"image_to_text_row": "window"}])
def test_kept_scores_are_those_of_the_masks(side: int, direction: Direction, changes: dict[str, object]) -> None:
    config = tiny_config(image_side=side, conv_kernel=5, **changes)
    used = config.spec.num_used
    for pattern in ("full", "row", "column", "conv"):
        rule = AttentionRule(pattern, config.spec, config.conv_kernel, config.conv_wrap, config.image_to_text_row)
        mask = full_length_mask(rule, direction, torch.device("cpu"))[:used, :used]
        assert kept_scores(config, pattern, direction) == int(mask.sum())


def test_hidden_kernels_of_a_tokenizer_are_all_but_the_first_and_the_last() -> None:
    """The first of a dVAE's decoder is its codebook: ``decoder.0`` is a block, and its kernels are hidden ones."""
    first = {"vqgan": {"encoder.1.weight", "decoder.0.weight"}, "dvae": {"encoder.1.weight", "code"}}
    for kind, begins in first.items():
        sizes = {"channels": 8, "channel_multipliers": (1, 2), "norm_groups": 2, "codebook_size": 16, "codebook_dim": 4}
        with torch.device("meta"):
            tokenizer = build_image_tokenizer(ImageTokenizerConfig(image_size=16, kind=kind, **sizes))
        larger = {name: p.ndim for name, p in tokenizer.named_parameters() if p.ndim >= 2}
        last = {f"encoder.{len(tokenizer.encoder) - 1}.weight", f"decoder.{len(tokenizer.decoder) - 2}.weight"}
        assert {name for name, ndim in larger.items() if not is_hidden_matrix(name, ndim)} == begins | last
        assert is_hidden_matrix("decoder.0.residual.1.weight", 4)


def test_kinds_of_layers_are_those_of_the_rules() -> None:
    for count in (1, 2, 3, 8, 48):
        for pattern in ("paper", "full"):
            assert layer_kinds(count, pattern) == layer_patterns(count, pattern)


def _behind(name: str) -> bool:
    """Whether a parameter of a block is of a product behind attention."""
    return name in ("attention.out.weight", "mlp.up.weight", "mlp.down.weight")


def test_flops_are_those_a_profiler_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def product(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
        return 2 * x.numel() * weight[0]

    config = tiny_config(pattern="full")
    spec = config.spec
    model = ViLG(config)
    text = torch.zeros(2, spec.num_text_slots, dtype=torch.int64)
    image = torch.zeros(2, spec.num_image_tokens, dtype=torch.int64)
    products = {torch.ops.mkldnn._linear_pointwise: product} if has_onednn() else None  # torch does not count these
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        model(text, image, text_len=torch.full((2,), spec.num_text_slots))
    flops = forward_flops(config)
    # The profiler counts padding too: positions in matrix products, their squares in attention.
    padded = spec.length / spec.num_used
    behind_last = sum(p.numel() for n, p in model.blocks[str(config.num_layers - 1)].named_parameters() if _behind(n))
    predicted = 2 * behind_last * (spec.num_image_tokens + spec.num_text_slots + 1)
    expected = (flops.linear - predicted) * padded + predicted + flops.attention_dense * padded**2 + flops.heads
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)
    assert flops.attention_kept < flops.attention_dense
    assert flops.kept == flops.linear + flops.attention_kept + flops.heads


@pytest.mark.parametrize("side", [4, 5, 8, 16, 17])
@pytest.mark.parametrize("changes", [{}, {"conv_wrap": False}, {"image_to_text_row": "window"}])
def test_folding_is_planned_as_it_is_done(side: int, changes: dict[str, object]) -> None:
    config = tiny_config(image_side=side, conv_kernel=5, **changes)
    with torch.device("meta"):
        model = ViLG(config)
    for pattern in ("row", "column", "conv"):
        if executed_by("fold", config, pattern) != "fold":
            continue
        for direction in Direction:
            plan = fold_plan(model.rule(pattern), direction, torch.device("cpu"))
            assert plan is not None
            done = FoldShape(plan.num_blocks, len(plan.globals) + plan.window)
            assert fold_shape(config, pattern, direction) == done, (pattern, direction)
