from __future__ import annotations

import pytest
import torch

from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.models.dual_encoder import DualEncoder


def encoder(**options: object) -> DualEncoder:
    torch.manual_seed(0)
    config = RerankerConfig(width=32, num_heads=2, **options)  # type: ignore[arg-type]
    return DualEncoder(config, text_vocab_size=20, num_text_slots=6).eval()


def test_score_is_the_scaled_cosine_of_both_vectors() -> None:
    model = encoder()
    pixels = torch.rand(3, 3, 20, 20) * 2 - 1
    text_ids, text_len = torch.randint(2, 20, (3, 6)), torch.tensor([6, 2, 4])
    with torch.no_grad():
        pictures, texts = model.embed_features(model.features(pixels)), model.embed_texts(text_ids, text_len)
        scores = model.score(pixels, text_ids, text_len)
    for vectors in (pictures, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    expected = 10.0 * torch.nn.functional.cosine_similarity(pictures, texts)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scores.unique().numel() == 3


@pytest.mark.parametrize("layers", [0, 2])
def test_what_is_behind_a_caption_and_beside_it_changes_nothing(layers: int) -> None:
    model = encoder(text_layers=layers)
    text_ids, text_len = torch.randint(2, 20, (3, 6)), torch.tensor([5, 0, 2])
    other = torch.where(torch.arange(6) < text_len[:, None], text_ids, 7)
    other[1, 0] = text_ids[1, 0]  # an empty caption still has a first piece
    with torch.no_grad():
        found = model.embed_texts(text_ids, text_len)
        torch.testing.assert_close(model.embed_texts(other, text_len), found)
        torch.testing.assert_close(model.embed_texts(text_ids[2:], text_len[2:]), found[2:], atol=1e-6, rtol=1e-5)
        assert model.embed_texts(text_ids[:0], text_len[:0]).shape == (0, 32)
    assert found.isfinite().all()


def test_the_order_of_pieces_means_something_to_blocks() -> None:
    text_ids, text_len = torch.tensor([[3, 4, 0, 0, 0, 0], [4, 3, 0, 0, 0, 0]]), torch.tensor([2, 2])
    with torch.no_grad():
        one, other = encoder(text_layers=2).embed_texts(text_ids, text_len)
        same, again = encoder(text_layers=0).embed_texts(text_ids, text_len)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(same, again)


def test_the_feature_network_stays_as_it_is() -> None:
    model = encoder().train()
    assert not model.network.training
    assert not any(name.startswith("network.") for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        model.log_scale.fill_(100.0)
    assert model.scale.item() == 50.0
