"""Our dropout leaves out the right share, scales the rest, and its gradient follows the same choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vilg.ops.dropout import dropout, keep_mask


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(50_001,), (40, 25, 51)])
def test_share_scale_and_gradient(probability: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).add_(3.0).requires_grad_()
    y = dropout(x, probability, training=True)
    kept = y != 0
    assert abs(1 - kept.double().mean().item() - probability) < 4 * (probability * (1 - probability) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept], x[kept] / (1 - probability), rtol=1e-4, atol=0)
    slope = torch.randn(shape)
    (grad,) = torch.autograd.grad(y, x, slope)
    torch.testing.assert_close(grad, torch.where(kept, slope / (1 - probability), 0), rtol=1e-4, atol=0)


def test_every_place_of_a_random_number_is_a_fair_choice() -> None:
    torch.manual_seed(1)
    kept = keep_mask(torch.empty(4 * 100_000), 0.3).view(-1, 4).double()
    assert (kept.mean(0) - 0.7).abs().max() < 0.006
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 0.015


def test_a_seed_repeats_it_and_recomputation_too() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> Tensor:
        torch.manual_seed(5)
        return dropout(x, 0.4, training=True)

    assert torch.equal(run(), run())
    torch.manual_seed(5)
    again = checkpoint(lambda value: dropout(value, 0.4, training=True), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(again.sum(), x)
    torch.testing.assert_close(grad, run())


def test_nothing_happens_outside_training_or_without_probability() -> None:
    x = torch.randn(7)
    assert dropout(x, 0.5, training=False) is x and dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("probability", [1e-6, 1.0])
def test_probabilities_that_fifteen_bits_cannot_tell_are_torchs(probability: float) -> None:
    torch.manual_seed(2)
    x = torch.ones(100)
    found = dropout(x, probability, training=True)
    torch.manual_seed(2)
    assert torch.equal(found, torch.nn.functional.dropout(x, probability))
