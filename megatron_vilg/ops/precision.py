"""In which arithmetic products are fast: bfloat16 where the hardware has instructions for it, else fp32."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]

_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
"""What a processor must have for its bfloat16 products to be faster than those in fp32."""


def choose_precision(requested: Precision | Literal["auto"], device: torch.device | str) -> tuple[Precision, str]:
    """The arithmetic that ``auto`` stands for on a device, and the reason, for the log.

    A CPU without such instructions computes bfloat16 products piece by piece: on one with AVX2, matrix products ran at
    7 to 9 GFLOP/s where fp32 reaches 60 to 75, and a training step took 16 times as long (``docs/performance.md``).
    """
    device = torch.device(device)
    if requested != "auto":
        return requested, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bfloat16 instructions"
        return "fp32", "this GPU has no bfloat16 instructions"
    if device.type == "cpu":
        found = [name for name in _CPU_INSTRUCTIONS if cpu_instructions().get(name)]
        return ("bf16", f"this CPU has {found[0]}") if found else ("fp32", "this CPU has no bfloat16 instructions")
    return "fp32", f"nothing is known of bfloat16 on {device.type}"


def cpu_instructions() -> dict[str, object]:
    """What torch knows of the processor; empty in versions of torch that cannot tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    return dict(tell()) if tell is not None else {}
