"""Which implementation executes attention, from sizes alone. No torch in here, so that ``vilg plan`` can ask too."""

from __future__ import annotations

from typing import Literal, cast, get_args

from megatron_vilg.config.schema import ModelConfig

Implementation = Literal["dense", "sdpa", "fold", "flex", "triton"]

FOLD_FROM_SIDE = 16
"""Image side from which folding is faster than a dense mask (measured on CPU; see ``benchmarks/``)."""


def implementation_of(requested: Implementation | Literal["auto"], image_side: int) -> tuple[Implementation, str]:
    """The implementation that ``ops.attention`` stands for, and the reason, for the log; whatever the device."""
    if requested in get_args(Implementation):
        chosen, reason = cast(Implementation, requested), "asked for"
    elif image_side >= FOLD_FROM_SIDE:
        chosen, reason = "fold", f"model.image_side={image_side} >= {FOLD_FROM_SIDE}"
    else:
        chosen, reason = "dense", f"model.image_side={image_side} < {FOLD_FROM_SIDE}"
    if chosen == "fold":
        reason += "; full layers, and windows over most of the picture, by sdpa"
    return chosen, reason


def executed_by(implementation: Implementation, model: ModelConfig, pattern: str) -> Implementation:
    """The implementation that executes layers of ``pattern`` in training: what cannot be folded is left to sdpa."""
    return "sdpa" if implementation == "fold" and not _folds(model, pattern) else implementation


def _folds(model: ModelConfig, pattern: str) -> bool:
    """Whether ``ops.fold_plan`` has plans for both directions; image-to-text, which sees both ways, decides."""
    side, count = model.image_side, model.image_side**2
    if pattern == "full":
        return False
    if pattern == "conv":
        half = model.conv_kernel // 2
        reach = half * side + (half if model.conv_wrap else 0)
    elif pattern == "row" and model.image_to_text_row == "window":
        reach = side
    else:
        return True
    return 2 * min(reach, count - side) + side <= count
