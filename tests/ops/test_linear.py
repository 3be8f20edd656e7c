"""oneDNN's product and its gradients are torch's; whatever it is not for goes to torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vilg.models.layers import Linear
from megatron_vilg.ops import linear as module
from megatron_vilg.ops.linear import has_onednn, linear

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN product")


def inputs(shape: tuple[int, ...], outputs: int, *, bias: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator), torch.randn(outputs, shape[-1], generator=generator)]
    if bias:
        tensors.append(torch.randn(outputs, generator=generator))
    return [tensor.requires_grad_() for tensor in tensors]


def refuse(*_: object) -> Tensor:
    raise AssertionError("oneDNN was asked")


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (3, 5, 24), (2, 3, 4, 24)])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    tensors = inputs(shape, 40, bias=bias)
    expected, found = F.linear(*tensors), linear(*tensors)
    assert "_Linear" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grads = zip(torch.autograd.grad(found, tensors, slope), torch.autograd.grad(expected, tensors, slope), strict=True)
    for grad, other in grads:
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-5)


@needs_onednn
def test_strided_tensors_and_gradients() -> None:
    x, weight = inputs((6, 4, 24), 40, bias=False)
    expected, found = F.linear(x.transpose(0, 1), weight[:20]), linear(x.transpose(0, 1), weight[:20])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    slope = torch.randn(20, 6, 4).permute(2, 1, 0)
    for grad, other in zip(
        torch.autograd.grad(found, (x, weight), slope), torch.autograd.grad(expected, (x, weight), slope), strict=True
    ):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(slope, weight[:20].T), slope @ weight[:20], atol=1e-5, rtol=1e-5)


@needs_onednn
def test_only_the_gradients_asked_for() -> None:
    x, weight, bias = inputs((5, 24), 40, bias=True)
    with torch.no_grad():
        assert linear(x, weight, bias).grad_fn is None
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_other_types_and_autocast_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_product", refuse)
    x, weight = inputs((5, 24), 40, bias=False)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x[:0], weight).shape == (0, 40)
    assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    monkeypatch.setattr(module, "has_onednn", lambda: False)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


@needs_onednn
def test_layer_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(24, 40), torch.randn(3, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(module, "onednn_product", refuse)
    with pytest.raises(AssertionError, match="oneDNN was asked"):
        layer(x)
