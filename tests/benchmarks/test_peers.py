"""The plain loop is a model of the same size that trains and decodes as it should."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch

from benchmarks import peers, plain_loop
from benchmarks.plain_loop import generate, train_step
from benchmarks.sizes import SIZES, num_parameters, plain_model, random_pairs
from megatron_vilg.models.vilg import ViLG
from tests.tiny import tiny_config


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_model_is_as_large_as_ours(size: str) -> None:
    model = SIZES[size]("fp32").model
    with torch.device("meta"):
        assert num_parameters(plain_model(model)) == pytest.approx(num_parameters(ViLG(model)), rel=0.05)


def test_the_plain_loop_is_short() -> None:
    lines = inspect.getsource(plain_loop).splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("import", "from", '"""'))]
    assert len(code) <= 40


@torch.no_grad()
def test_the_plain_model_is_causal_and_its_cache_changes_nothing() -> None:
    config = tiny_config()
    model = plain_model(config).eval()
    ids = torch.randint(30, (2, 6))
    other = ids.clone()
    other[:, 4] += 1
    torch.testing.assert_close(model(ids)[:, :4], model(other)[:, :4])
    cache = torch.zeros(config.num_layers, 2, 2, config.num_heads, 6, config.head_dim)
    model(ids[:, :3], cache, 0)
    for place in range(3, 6):
        torch.testing.assert_close(model(ids[:, place : place + 1], cache, place)[:, 0], model(ids)[:, place])


def test_the_plain_loop_decodes_as_many_tokens_as_asked() -> None:
    config = tiny_config()
    ids = torch.randint(30, (2, 4))
    cache = torch.zeros(config.num_layers, 2, 2, config.num_heads, 9, config.head_dim)
    drawn = generate(plain_model(config), ids, cache, 5)
    assert torch.equal(drawn[:, :4], ids)
    assert drawn.shape == (2, 9)


def test_the_plain_loop_learns_a_row_by_heart() -> None:
    model = plain_model(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(10)[None].repeat(2, 1)
    for _ in range(60):
        train_step(model, optimizer, ids, bf16=False)
    assert torch.equal(model(ids[:, :-1]).argmax(-1), ids[:, 1:])


def test_random_pairs_hold_no_padding() -> None:
    model = tiny_config()
    pairs = random_pairs(model, 3, seed=0)
    assert pairs.text_len.eq(model.num_text_slots).all()
    assert pairs.text_ids.min() > 5 and pairs.image_ids.max() < model.image_vocab_size


@pytest.mark.parametrize("name", ["taming.models.vqgan", "youtokentome"])
def test_stand_ins_are_gone_once_the_peer_is_imported(name: str) -> None:
    with peers.stand_ins():
        importlib.import_module(name)
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
