"""Chunks of logits give the loss and gradients of whole logits, in less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vilg.ops import cross_entropy
from megatron_vilg.ops.cross_entropy import CHUNKS, FEWEST_ROWS, IGNORE, chunk_rows, linear_cross_entropy


def problem(rows: int = 40, width: int = 12, vocabulary: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows // 4, 4, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    labels = torch.randint(vocabulary, (rows // 4, 4), generator=generator)
    labels[1, 2] = labels[3, 0] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def whole(hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, smoothing: float) -> tuple[Tensor, Tensor]:
    logits, labels = (hidden @ weight.T).flatten(0, 1), labels.flatten()
    bare = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return total + z_loss * (logits.logsumexp(1).square() * (labels != IGNORE)).sum(), bare


@pytest.mark.parametrize("rows_each", [1, 7, 64, None])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.2)])
def test_equals_whole_logits(rows_each: int | None, z_loss: float, smoothing: float) -> None:
    hidden, weight, labels = problem()
    expected, expected_bare = whole(hidden, weight, labels, z_loss, smoothing)
    expected_grads = torch.autograd.grad(3.0 * expected, (hidden, weight))
    total, bare = linear_cross_entropy(
        hidden, weight, labels, z_loss=z_loss, label_smoothing=smoothing, rows_each=rows_each
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(bare, expected_bare)
    for grad, other in zip(torch.autograd.grad(3.0 * total, (hidden, weight)), expected_grads, strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-5)


def test_bf16_products_under_autocast() -> None:
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, labels, rows_each=8)
        logits = (F.linear(hidden, weight)).float()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(total, (hidden, weight))
    others = torch.autograd.grad(expected, (hidden, weight))
    for grad, other, value in zip(grads, others, (hidden, weight), strict=True):
        assert grad.dtype == value.dtype
        torch.testing.assert_close(grad, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = problem()
    expected, _ = linear_cross_entropy(hidden, weight, labels)
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    with torch.no_grad():
        total, _ = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(total, expected.detach())


def test_no_row_at_all_and_no_gradient() -> None:
    hidden, weight, labels = problem()
    total, bare = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE))
    assert total.item() == bare.item() == 0.0
    grad, weight_grad = torch.autograd.grad(total, (hidden, weight))
    assert not grad.any() and not weight_grad.any()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels)[0].requires_grad


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


def test_no_tensor_is_larger_than_an_eighth_of_the_logits() -> None:
    rows, width, vocabulary = 4096, 16, 2048
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with Largest() as largest:
        total, _ = linear_cross_entropy(hidden, weight, torch.randint(vocabulary, (rows,)))
        total.backward()
    assert largest.bytes <= 4 * rows * vocabulary / 8


def test_rows_of_a_chunk() -> None:
    assert chunk_rows(100 * CHUNKS * FEWEST_ROWS, 8192, "cpu") == 100 * FEWEST_ROWS
    assert chunk_rows(1024, 8192, "cpu") == FEWEST_ROWS
    assert chunk_rows(768, 512, "cpu") >= 768  # small logits stay whole
