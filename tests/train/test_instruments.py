"""The instruments: right numbers, and a model that is none the wiser."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_vilg.train.instruments import Instruments
from tests.models.test_reconstructor import joint_model
from tests.tiny import tiny_batch, tiny_config, tiny_model


def pixels() -> torch.Tensor:
    return torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_metrics_of_a_joint_model() -> None:
    model, _ = joint_model("dvae")
    model.train()
    batch = dataclasses.replace(tiny_batch(model.config), pixels=pixels())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Instruments(model).before(batch)
    assert {f"attention/max_logit(layer {i})" for i in range(4)} <= found.keys()
    for name in ("text_to_image", "image_to_text", "reconstruction"):
        assert found[f"gradient({name})"] > 0
    assert -1 <= found["gradient/cosine(generation, reconstruction)"] <= 1
    assert found["hidden/last_rms"] > 0 and all(math.isfinite(value) for value in found.values())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Instruments(model).before(batch) == found, "the same numbers again"


def test_detached_reconstruction_has_no_gradient_in_the_generator() -> None:
    model, _ = joint_model("dvae", detach=True)
    found = Instruments(model).before(dataclasses.replace(tiny_batch(model.config), pixels=pixels()))
    assert found["gradient(reconstruction)"] == 0.0


def test_attention_logits_follow_the_queries() -> None:
    model = tiny_model(tiny_config(qk_norm=False))
    batch = tiny_batch(model.config)
    first = Instruments(model).before(batch)
    with torch.no_grad():
        model.blocks["0"].attention.q.weight.mul_(3.0)  # type: ignore[union-attr,operator]
        model.blocks["0"].attention.q.bias.mul_(3.0)  # type: ignore[union-attr,operator]
    second = Instruments(model).before(batch)
    name = "attention/max_logit(layer 0)"
    assert second[name] == pytest.approx(3.0 * first[name], rel=1e-4)
    assert "gradient(reconstruction)" not in first


def test_log_z_grows_with_the_output_layer() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config)
    with torch.no_grad():
        model.heads["image"].weight.zero_()  # type: ignore[index,union-attr,operator]
    found = Instruments(model).before(batch)
    assert found["log_z(text_to_image)"] == pytest.approx(math.log(11), rel=1e-5)


def test_update_ratio() -> None:
    model = tiny_model()
    instruments = Instruments(model)
    instruments.before(tiny_batch(model.config))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(1.01)
    found = instruments.after()
    assert found["update/weight(blocks)"] == pytest.approx(0.01, rel=1e-3)
    assert found["update/weight(embed)"] == 0.0
