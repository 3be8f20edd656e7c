"""bf16 where the hardware computes it, fp32 elsewhere; what was asked for is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vilg.ops import precision as module
from megatron_vilg.ops.precision import choose_precision, cpu_instructions


@pytest.mark.parametrize(
    ("instructions", "expected", "reason"),
    [
        ({"avx512_bf16": True}, "bf16", "this CPU has avx512_bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16", "this CPU has amx_bf16"),
        ({"avx2": True, "avx512_f": True}, "fp32", "this CPU has no bfloat16 instructions"),
        ({}, "fp32", "this CPU has no bfloat16 instructions"),
    ],
)
def test_a_cpu_is_asked(
    instructions: dict[str, Any], expected: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_instructions", lambda: instructions)
    assert choose_precision("auto", "cpu") == (expected, reason)


@pytest.mark.parametrize(("has_it", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked(has_it: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert choose_precision("auto", "cuda")[0] == expected


def test_other_devices_get_fp32() -> None:
    assert choose_precision("auto", "meta") == ("fp32", "nothing is known of bfloat16 on meta")


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
def test_what_was_asked_for_holds(requested: Any) -> None:
    assert choose_precision(requested, "cpu") == (requested, "asked for")


def test_instructions_of_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.torch.cpu, "get_capabilities", raising=False)
    assert cpu_instructions() == {}
