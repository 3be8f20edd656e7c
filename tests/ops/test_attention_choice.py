from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_vilg.ops.attention import choose_implementation
from megatron_vilg.ops.attention_choice import implementation_of


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
