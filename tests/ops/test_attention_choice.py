from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import choose_implementation, prepare
from megatron_vilg.ops.attention_choice import executed_by, implementation_of
from tests.tiny import tiny_config


@pytest.mark.parametrize("side", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 11, 15])
@pytest.mark.parametrize("changes", [{}, {"conv_wrap": False}, {"image_to_text_row": "window"}])
def test_what_executes_is_what_is_prepared(side: int, kernel: int, changes: dict[str, object]) -> None:
    config = tiny_config(image_side=side, conv_kernel=min(kernel, 2 * side - 1), **changes)
    with torch.device("meta"):
        model = ViLG(config)
    for pattern in ("full", "row", "column", "conv"):
        for asked in ("dense", "sdpa", "fold"):
            prepared = prepare(model.rule(pattern), torch.tensor([5, 2]), asked)
            assert executed_by(asked, config, pattern) == prepared.implementation, (pattern, asked)


def test_where_folding_ends() -> None:
    """A window of 11 rows and the wrap: 45 tokens in front, 8 of the block, 45 behind, of 64."""
    assert executed_by("fold", tiny_config(image_side=8, conv_kernel=11), "conv") == "sdpa"
    assert executed_by("fold", tiny_config(image_side=8, conv_kernel=5), "conv") == "fold"
    assert executed_by("fold", tiny_config(image_side=32, conv_kernel=11), "full") == "sdpa"
    assert executed_by("flex", tiny_config(image_side=32, conv_kernel=11), "full") == "flex"


@pytest.mark.parametrize(
    ("requested", "side", "expected"),
    [
        ("auto", 8, ("dense", "model.image_side=8 < 16")),
        ("auto", 16, ("fold", "model.image_side=16 >= 16; full layers, and windows over most of the picture, by sdpa")),
        ("fold", 8, ("fold", "asked for; full layers, and windows over most of the picture, by sdpa")),
        ("dense", 32, ("dense", "asked for")),
        ("triton", 32, ("triton", "asked for")),
    ],
)
def test_the_reason_names_what_full_layers_use(requested: str, side: int, expected: tuple[str, str]) -> None:
    assert implementation_of(requested, side) == expected  # type: ignore[arg-type]
    assert choose_implementation(requested, side, "cuda") == expected or requested == "triton"  # type: ignore[arg-type]


def test_it_is_known_without_torch() -> None:
    code = "import sys, megatron_vilg.ops.attention_choice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
