from __future__ import annotations

import pytest
import torch

from megatron_vilg.models.critics import CriticGate, PatchCritic, adaptive_weight, critic_loss, deceive_loss


def test_scores_are_per_patch_and_initial_weights_small() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(16)
    assert critic(torch.zeros(2, 3, 48, 48)).shape == (2, 1, 4, 4)
    assert critic(torch.zeros(2, 3, 24, 24)).shape == (2, 1, 1, 1)
    assert critic.layers[2].weight.detach().std() == pytest.approx(0.02, rel=0.05)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert critic_loss(real, fake) == pytest.approx(0.5 * ((0 + 1) / 2 + (0 + 2) / 2))
    assert deceive_loss(fake) == pytest.approx(1.0)


def test_training_steps_lower_the_critics_loss() -> None:
    torch.manual_seed(0)
    critic = PatchCritic(4)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    real, fake = torch.rand(4, 3, 32, 32), -torch.rand(4, 3, 32, 32)
    losses = []
    for _ in range(10):
        loss = critic_loss(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    large, small = (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.0, 0.5])).sum()
    ratio = adaptive_weight(large, small, weight)
    assert ratio == pytest.approx(5.0 / (0.5 + 1e-4)) and not ratio.requires_grad
    assert adaptive_weight(1e6 * large, small * 1e-6, weight) == 1e4


def test_adaptive_weight_does_not_hide_a_loss_that_misses_the_layer() -> None:
    weight = torch.ones(1, requires_grad=True)
    elsewhere = torch.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        adaptive_weight((weight * 2).sum(), elsewhere.sum(), weight)


def test_gate_needs_both_the_step_and_the_quality_and_then_stays_open() -> None:
    gate = CriticGate(start_step=3, threshold=0.1, decay=0.5)
    good, bad = torch.tensor(0.05), torch.tensor(0.9)
    assert not gate.update(0, good)
    assert not gate.update(1, good)
    assert gate.update(3, good)
    assert gate.update(4, bad)
    slow = CriticGate(start_step=9, threshold=0.1, decay=0.75)
    slow.update(0, bad)
    slow.update(1, good)
    assert float(slow.average) == pytest.approx(0.75 * 0.9 + 0.25 * 0.05), "the decay is the share of what was before"
    late = CriticGate(start_step=0, threshold=0.1, decay=0.5)
    assert [late.update(step, bad if step == 0 else good) for step in range(6)] == [False] * 5 + [True]
    average = late.average.clone()
    late.update(6, torch.tensor(float("nan")))
    assert torch.equal(late.average, average), "a step that is left out leaves the mean as it was"
    restored = CriticGate(start_step=0, threshold=0.1, decay=0.5)
    restored.load_state_dict(late.state_dict())
    assert restored.update(6, bad) and torch.equal(restored.is_open, torch.tensor(True))
