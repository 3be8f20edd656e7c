"""The plain loop is a model of the same size that trains and decodes as it should."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch

from benchmarks import attention_layers, peers, plain_loop
from benchmarks.decoding import _uncached
from benchmarks.measure import Bench
from benchmarks.plain_loop import generate, train_step
from benchmarks.sizes import SIZES, num_parameters, plain_model, random_pairs
from benchmarks.start import muon_update, optimizer_update
from megatron_vilg.models.vilg import ViLG
from tests.tiny import tiny_config, tiny_run


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


class Growing:
    """Stands in for dalle-pytorch: notes how many codes stood before each that it was asked for."""

    image_seq_len, num_text_tokens = 16, 3

    def __init__(self) -> None:
        self.before: list[int] = []

    def eval(self) -> Growing:
        return self

    def to(self, device: torch.device) -> Growing:
        return self

    def __call__(self, text: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        self.before.append(codes.shape[1])
        return torch.zeros(len(codes), 1, 8)


def test_tokens_without_a_cache_are_spread_over_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Growing()
    monkeypatch.setattr(peers, "dalle", lambda model, axial: generator)
    row = _uncached(Bench(torch.device("cpu")), tiny_config(), ours=1.0)
    assert generator.before == [2, 6, 10, 14]
    assert row.peer == "dalle-pytorch, no cache" and row.value == 64.0 and row.peer_value > 0
    generator.before.clear()
    peers.dalle_codes(generator, torch.zeros(1, 2), cached=False, given=torch.zeros(1, 13, dtype=torch.int64))
    assert generator.before == [13, 14, 15]


@pytest.mark.skipif(not peers.has(peers.X_TRANSFORMERS), reason="x-transformers is not installed")
def test_x_transformers_draws_without_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    decoder = peers.x_transformer(config, 40).eval()
    prompt = torch.randint(40, (2, 3))
    assert peers.x_transformers_codes(decoder, prompt, 4).shape == (2, 4)
    _refuse_sorting(monkeypatch)
    assert peers.x_transformers_codes(decoder, prompt, 4).shape == (2, 4)
    with pytest.raises(AssertionError, match="sorted"):
        decoder.generate(prompt, 4, cache_kv=True)  # what it does by itself


@pytest.mark.skipif(not peers.has(peers.DALLE), reason="dalle-pytorch is not installed")
def test_dalle_pytorch_draws_without_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    generator = peers.dalle(config, axial=True, cached=True)
    _refuse_sorting(monkeypatch)
    text = random_pairs(config, 2, seed=3).text_ids[:, 0]
    codes = peers.dalle_codes(generator, text, cached=True)
    assert codes.shape == (2, config.spec.num_image_tokens)
    assert codes.min() >= 0 and codes.max() < config.image_vocab_size


def _refuse_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the peer sorted its logits, which ours does not")

    monkeypatch.setattr(torch, "topk", refuse)
    monkeypatch.setattr(torch.Tensor, "topk", refuse)


def test_the_optimizers_row_names_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.start.paper_size", lambda precision: tiny_run())
    (row,) = optimizer_update(Bench(torch.device("cpu"), rounds=1))
    assert (row.metric, row.peer) == ("fused AdamW", "AdamW, foreach")


def test_muons_row_names_the_precision_and_what_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.start.demo_size", lambda precision: tiny_run())
    monkeypatch.setattr("benchmarks.start.choose_precision", lambda asked, device: ("fp32", "for the test"))
    (row,) = muon_update(Bench(torch.device("cpu"), rounds=1))
    assert (row.metric, row.peer) == ("Muon, fp32", "torch.optim.Muon")


def test_rows_of_attention_layers_have_the_length_they_say() -> None:
    spec = attention_layers.SPEC
    said = str(attention_layers.attention_layers.__doc__)
    assert f"row of {spec.length} positions" in said and f"{spec.num_text_slots} text tokens" in said


@pytest.mark.parametrize("name", ["taming.models.vqgan", "youtokentome"])
def test_stand_ins_are_gone_once_the_peer_is_imported(name: str) -> None:
    with peers.stand_ins():
        importlib.import_module(name)
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
