"""Initial weights are a function of seed and name alone."""

from __future__ import annotations

import pytest
import torch

from megatron_vilg.parallel.init import init_weights, normal_values
from tests.tiny import tiny_config, tiny_model


def test_same_name_and_seed_give_the_same_values() -> None:
    a, b = normal_values("blocks.0.x", (3, 4), 7, 0.02), normal_values("blocks.0.x", (3, 4), 7, 0.02)
    assert torch.equal(a, b)
    assert not torch.equal(a, normal_values("blocks.1.x", (3, 4), 7, 0.02))
    assert not torch.equal(a, normal_values("blocks.0.x", (3, 4), 8, 0.02))


def test_scales() -> None:
    config = tiny_config(width=64, num_heads=4)
    model = tiny_model(config)
    init_weights(model, seed=0, std=0.02, num_layers=4)
    weights = dict(model.named_parameters())
    assert weights["blocks.0.attention.q.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["blocks.0.mlp.down.weight"].std().item() == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert (weights["blocks.0.norm1.weight"] == 1).all() and (weights["blocks.0.mlp.up.bias"] == 0).all()
