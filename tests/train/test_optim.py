from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, ModelConfig, OptimConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.train.optim import (
    build_optimizer,
    is_decayed,
    learning_rate,
    optimizer_state,
    set_learning_rate,
    state_kind,
)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleDict({"text": nn.Embedding(5, 4), "position": nn.Embedding(3, 4)})
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, step: int) -> torch.Tensor:
        ids = torch.tensor([step % 5, (step + 1) % 5])
        hidden = self.embed["text"](ids) + self.embed["position"](torch.tensor([0, 1]))
        return self.norm(self.linear(hidden)).square().sum() + hidden.sum().sin()


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        set_learning_rate(optimizer, learning_rate(step, OptimConfig(lr=0.05, warmup_steps=3), 20))
        optimizer.zero_grad()
        loss = model(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_only_matrices_that_are_no_place_embeddings_decay() -> None:
    model = toy()
    decayed = {name for name, p in model.named_parameters() if p.requires_grad and is_decayed(name, p.ndim)}
    assert decayed == {"embed.text.weight", "linear.weight"}


def test_decay_on_the_generator() -> None:
    config = ModelConfig(
        num_layers=1, width=8, num_heads=2, image_side=2, text_vocab_size=16, image_vocab_size=5, codebook_dim=3
    )
    parameters = dict(ViLG(config).named_parameters())
    matrices = {name for name, p in parameters.items() if p.ndim >= 2}
    decayed = {name for name, p in parameters.items() if is_decayed(name, p.ndim)}
    places = {f"embed.{name}.weight" for name in ("position", "row", "column", "segment", "boundary")}
    assert matrices - decayed == places
    assert {"embed.text.weight", "embed.image.weight", "heads.text.weight", "blocks.0.mlp.up.weight"} <= decayed


def test_groups_hold_every_trained_parameter_once() -> None:
    model = toy()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(weight_decay=0.3), "cpu")
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    sizes = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
    assert sizes == [5 * 4 + 4 * 4, 3 * 4 + 4 + 4 + 4]
    assert all(g["fused"] for g in optimizer.param_groups)


def test_one_update_equals_the_closed_form() -> None:
    config = OptimConfig(lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    weight, bias = nn.Parameter(torch.full((1, 1), 2.0)), nn.Parameter(torch.full((1,), 2.0))
    optimizer = build_optimizer([("w", weight), ("b", bias)], config, "cpu")
    weight.grad, bias.grad = torch.full((1, 1), -3.0), torch.full((1,), -3.0)
    set_learning_rate(optimizer, 0.2)
    optimizer.step()
    # After bias correction the first step moves every value by lr against the sign of its gradient.
    assert weight.item() == pytest.approx(2.0 * (1 - 0.2 * 0.5) + 0.2, abs=1e-6)
    assert bias.item() == pytest.approx(2.0 + 0.2, abs=1e-6)


def test_learning_rate_closed_forms() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_share=0.1)
    assert learning_rate(0, config, 110) == pytest.approx(0.1)
    assert learning_rate(4, config, 110) == pytest.approx(0.5)
    assert learning_rate(9, config, 110) == 1.0
    assert learning_rate(10, config, 110) == 1.0
    assert learning_rate(60, config, 110) == pytest.approx(0.55)
    assert learning_rate(35, config, 110) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(110, config, 110) == pytest.approx(0.1)
    assert learning_rate(500, config, 110) == pytest.approx(0.1)


def test_learning_rate_edges() -> None:
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(s, constant, 10) for s in (0, 1, 3, 4, 9)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert learning_rate(0, OptimConfig(lr=2.0, warmup_steps=0), 10) == 2.0
    longer = OptimConfig(lr=1.0, warmup_steps=20, min_lr_share=0.1)
    assert learning_rate(9, longer, 10) == 0.5
    assert learning_rate(20, longer, 10) == pytest.approx(1.0)


def test_learning_rate_never_jumps() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=50)
    rates = [learning_rate(step, config, 500) for step in range(501)]
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 1 / 50 + 1e-9
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_state_created_early_changes_nothing() -> None:
    plain, early = toy(), toy()
    config = OptimConfig(lr=0.05)
    first, second = (build_optimizer(m.named_parameters(), config, "cpu") for m in (plain, early))
    names = optimizer_state(second, early.named_parameters())
    assert set(names["exp_avg"]) == {n for n, p in early.named_parameters() if p.requires_grad}
    assert train(plain, first, range(5)) == train(early, second, range(5))


def test_a_parameter_without_name_is_refused() -> None:
    model = toy()
    optimizer = build_optimizer(model.named_parameters(), OptimConfig(), "cpu")
    with pytest.raises(CheckpointError, match=r"updates a parameter of shape \(5, 4\) that has no name"):
        optimizer_state(optimizer, [])


def test_resuming_from_a_checkpoint_equals_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    config = OptimConfig(lr=0.05)
    straight = toy()
    optimizer = build_optimizer(straight.named_parameters(), config, "cpu")
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    train(straight, optimizer, range(7))
    state = {"model": straight.state_dict(), "optimizer": optimizer_state(optimizer, straight.named_parameters())}
    path = checkpointer.save(7, state, Manifest(kind="test", step=7))
    wanted = train(straight, optimizer, range(7, 20))

    torch.manual_seed(123)
    resumed = Toy()
    optimizer = build_optimizer(resumed.named_parameters(), config, "cpu")
    state = {"model": resumed.state_dict(), "optimizer": optimizer_state(optimizer, resumed.named_parameters())}
    assert checkpointer.load(path, state).step == 7
    assert train(resumed, optimizer, range(7, 20)) == wanted
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"model.a": (8, 512)}, ""),
        ({"model.a": (8, 512), "optimizer.exp_avg.a": (8, 512), "optimizer.step.a": ()}, "adamw"),
        ({"optimizer.step.a": (), "optimizer.momentum_buffer.b": (8, 8)}, "muon"),
        ({"model.a": (8, 512), "optimizer.exp_avg.codes.a": (8, 512)}, "adamw_8bit"),
        ({"model.a": (8, 512), "optimizer.exp_avg.codes.a": (8, 256)}, "adamw_4bit"),
    ],
)
def test_whose_state_a_checkpoint_has(tensors: dict[str, tuple[int, ...]], kind: str) -> None:
    assert state_kind(tensors) == kind
