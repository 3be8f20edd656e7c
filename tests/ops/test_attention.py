"""The fast forms equal the dense reference, outputs and gradients."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from megatron_vilg.errors import ConfigError
from megatron_vilg.ops.attention import attention, choose_implementation
from megatron_vilg.ops.fold import fold_attention, fold_bias
from megatron_vilg.ops.fold_plan import fold_plan
from megatron_vilg.ops.rules import AttentionRule, text_keys_used
from megatron_vilg.sequence import Direction, StreamSpec

PATTERNS = ["full", "row", "column", "conv"]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def runs_triton() -> bool:
    """Whether kernels can run here: on a GPU, or in an interpreter that gets along with this NumPy."""
    if find_spec("triton") is None:
        return False
    return (
        torch.cuda.is_available()
        or Version(version("triton")) >= Version("3.7")
        or Version(np.__version__) < Version("2.4")
    )


needs_running_triton = pytest.mark.skipif(not runs_triton(), reason="needs a GPU, Triton >= 3.7 or NumPy < 2.4")


def inputs(rule: AttentionRule, rows: int, size: int = 8, heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, rule.spec.length, heads, size)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def run(rule: AttentionRule, text_len: torch.Tensor, implementation: str, direction: Direction | None, size: int = 8):  # type: ignore[no-untyped-def]
    # Where there is a GPU the kernels are compiled for it; elsewhere Triton's interpreter runs them.
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    *qkv, out_grad = (x.to(device) for x in inputs(rule, len(text_len), size))
    qkv = [x.requires_grad_() for x in qkv]
    out = attention(*qkv, rule, text_len.to(device), implementation, direction)  # type: ignore[arg-type]
    out.backward(out_grad)
    return [x.cpu() for x in (out.detach(), *(x.grad for x in qkv))]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


cases = given(
    pattern=st.sampled_from(PATTERNS),
    side=st.integers(2, 6),
    slots=st.integers(1, 6),
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    kernel=st.sampled_from([3, 5, 11]),
    wrap=st.booleans(),
    window=st.sampled_from(["same_row", "window"]),
    direction=st.sampled_from([None, Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT]),
)


def case(pattern, side, slots, lengths, kernel, wrap, window):  # type: ignore[no-untyped-def]
    """A rule, and text lengths of an even number of rows; length 0 leaves all text slots to padding."""
    spec = StreamSpec(num_text_slots=slots, image_side=side)
    rule = AttentionRule(pattern, spec, kernel, wrap, window)
    return rule, torch.tensor([min(n, slots) for n in lengths[: len(lengths) // 2 * 2]])


@settings(max_examples=60, deadline=None)
@cases
def test_twins_agree(pattern, side, slots, lengths, kernel, wrap, window, direction) -> None:  # type: ignore[no-untyped-def]
    rule, text_len = case(pattern, side, slots, lengths, kernel, wrap, window)
    expected = run(rule, text_len, "dense", direction)
    for other in ("sdpa", "fold"):
        assert_same(run(rule, text_len, other, direction), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=6, deadline=None)
@cases
def test_flex_agrees_forward(pattern, side, slots, lengths, kernel, wrap, window, direction) -> None:  # type: ignore[no-untyped-def]
    rule, text_len = case(pattern, side, slots, lengths, kernel, wrap, window)
    q, k, v, _ = inputs(rule, len(text_len))
    expected = attention(q, k, v, rule, text_len, "dense", direction)
    torch.testing.assert_close(attention(q, k, v, rule, text_len, "flex", direction), expected, atol=1e-5, rtol=1e-5)


@needs_running_triton
@settings(max_examples=8, deadline=None)
@cases
def test_triton_agrees(pattern, side, slots, lengths, kernel, wrap, window, direction) -> None:  # type: ignore[no-untyped-def]
    rule, text_len = case(pattern, side, slots, lengths, kernel, wrap, window)
    assert_same(run(rule, text_len[:2], "triton", direction, 16), run(rule, text_len[:2], "dense", direction, 16))


@needs_running_triton
@pytest.mark.parametrize(("pattern", "size"), [("row", 64), ("column", 64), ("conv", 128)])
def test_triton_head_sizes_over_several_tiles(pattern: str, size: int) -> None:
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=5, image_side=8), conv_kernel=3)  # type: ignore[arg-type]
    text_len = torch.tensor([5, 0])
    assert_same(run(rule, text_len, "triton", None, size), run(rule, text_len, "dense", None, size))


def half_precision_error(dtype: torch.dtype, device: str) -> float:
    """The largest error of output and gradients, as a share of the largest value."""
    rule = AttentionRule("row", StreamSpec(num_text_slots=3, image_side=4))
    text_len = torch.tensor([3, 1], device=device)
    values = [x.to(device, dtype) for x in inputs(rule, 2, 64)]
    found = []
    for implementation, kind in (("triton", dtype), ("dense", torch.float32)):
        *qkv, grad = (x.to(kind) for x in values)
        qkv = [x.requires_grad_() for x in qkv]
        out = attention(*qkv, rule, text_len, implementation)  # type: ignore[arg-type]
        found.append([out.detach(), *torch.autograd.grad(out, qkv, grad)])
        assert all(x.dtype == kind for x in found[-1])
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True))


@needs_running_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter has no bf16")
def test_triton_half_precision_in_fp32_softmax() -> None:
    assert half_precision_error(torch.float16, "cpu") < 3e-3


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_bf16_on_a_gpu() -> None:
    assert half_precision_error(torch.bfloat16, "cuda") < 2e-2


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("direction", list(Direction))
def test_fold_at_a_side_with_half_rows(pattern: str, direction: Direction) -> None:
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=7, image_side=16))  # type: ignore[arg-type]
    text_len = torch.tensor([7, 0, 4])
    assert_same(run(rule, text_len, "fold", direction), run(rule, text_len, "dense", direction))


@pytest.mark.parametrize(
    ("direction", "row", "keys"),
    [
        (Direction.TEXT_TO_IMAGE, "same_row", [48, 32, 197]),
        (Direction.IMAGE_TO_TEXT, "same_row", [32, 32, 362]),
        (Direction.IMAGE_TO_TEXT, "window", [80, 32, 362]),
    ],
)
def test_image_keys_that_folding_computes_at_the_papers_sizes(direction: Direction, row: str, keys: list[int]) -> None:
    """Those of ``docs/performance.md``: blocks are as long as makes their windows shortest."""
    spec = StreamSpec(num_text_slots=61, image_side=32)
    rules = [AttentionRule(p, spec, image_to_text_row=row) for p in ("row", "column", "conv")]  # type: ignore[arg-type]
    plans = [fold_plan(rule, direction, torch.device("cpu")) for rule in rules]
    assert [plan and plan.window for plan in plans] == keys


@pytest.mark.parametrize("pattern", ["row", "column", "conv"])
@pytest.mark.parametrize("direction", list(Direction))
def test_fold_for_devices_with_a_fused_kernel(pattern: str, direction: Direction) -> None:
    """The form for GPUs, on the CPU."""
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=7, image_side=16))  # type: ignore[arg-type]
    text_len = torch.tensor([7, 0, 4])
    plan = fold_plan(rule, direction, text_len.device)
    assert plan is not None
    *qkv, grad = inputs(rule, 3)
    qkv = [x.requires_grad_() for x in qkv]
    out = fold_attention(*qkv, plan, fold_bias(plan, text_keys_used(rule.spec, direction, text_len), torch.float32))  # type: ignore[call-arg]
    out.backward(grad)
    assert_same([out.detach(), *(x.grad for x in qkv)], run(rule, text_len, "dense", direction))  # type: ignore[misc]


def test_fold_takes_bf16_and_ignores_autocast() -> None:
    rule = AttentionRule("conv", StreamSpec(num_text_slots=7, image_side=16))
    text_len = torch.tensor([7, 2])
    q, k, v, _ = (x.bfloat16() for x in inputs(rule, 2))
    expected = attention(q.float(), k.float(), v.float(), rule, text_len)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, rule, text_len, "fold")
    torch.testing.assert_close(out, expected.bfloat16(), atol=1e-2, rtol=1e-2)


ROUNDING = {
    ("dense", 1): (0.0045, 0.005),
    ("dense", 3): (0.010, 0.022),
    ("sdpa", 1): (0.0027, 0.0043),
    ("sdpa", 3): (0.0021, 0.0075),
    ("fold", 1): (0.0022, 0.0022),
    ("fold", 3): (0.0020, 0.0022),
    ("fused fold", 1): (0.0027, 0.0052),
    ("fused fold", 3): (0.0021, 0.0075),
}
"""Root mean square of the error in bf16 as a share of the result's: output, worst gradient; measured figures x 1.3."""


@pytest.mark.parametrize("pattern", ["row", "conv"])
@pytest.mark.parametrize(("implementation", "size"), list(ROUNDING))
def test_rounding_in_bf16_stays_as_it_was_measured(implementation: str, size: int, pattern: str) -> None:
    """docs/performance.md has the figures; logits grow with the square of ``size``."""
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=13, image_side=16), conv_kernel=5)  # type: ignore[arg-type]
    direction, text_len = Direction.IMAGE_TO_TEXT, torch.tensor([13, 9])
    q, k, v, out_grad = inputs(rule, 2, 64, heads=4)
    rounded = [x.bfloat16() for x in (size * q, size * k, v, out_grad)]

    def computed(implementation: str, dtype: torch.dtype) -> list[torch.Tensor]:
        *qkv, gradient = (x.to(dtype) for x in rounded)
        qkv = [x.requires_grad_() for x in qkv]
        if implementation == "fused fold":
            plan = fold_plan(rule, direction, text_len.device)
            assert plan is not None
            bias = fold_bias(plan, text_keys_used(rule.spec, direction, text_len), dtype)
            out = fold_attention(*qkv, plan, bias)  # type: ignore[call-arg]
        else:
            out = attention(*qkv, rule, text_len, implementation, direction)  # type: ignore[call-arg, arg-type]
        return [x.double() for x in (out.detach(), *torch.autograd.grad(out, qkv, gradient))]

    exact = computed("dense", torch.float64)
    found = computed(implementation, torch.bfloat16)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    most_out, most_gradient = ROUNDING[implementation, size]
    assert errors[0] < most_out and max(errors[1:]) < most_gradient, errors


@pytest.mark.parametrize(
    ("requested", "side", "chosen"),
    [("auto", 8, "dense"), ("auto", 32, "fold"), ("dense", 32, "dense"), ("fold", 8, "fold"), ("flex", 8, "flex")],
)
def test_choice_is_explained(requested: str, side: int, chosen: str) -> None:
    implementation, reason = choose_implementation(requested, side)  # type: ignore[arg-type]
    assert implementation == chosen and reason


def test_what_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ops.attention=flex: .* no backward pass on a CPU. Works here: fold"):
        choose_implementation("flex", 32, "cpu", training=True)
    monkeypatch.setattr("megatron_vilg.ops.attention.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ops.attention=triton: the package triton is not installed"):
        choose_implementation("triton", 32, "cpu")


@needs_triton
def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="Triton needs a GPU"):
        choose_implementation("triton", 32, "cpu")
    assert choose_implementation("triton", 32, "cuda") == ("triton", "asked for")
