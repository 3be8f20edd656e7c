"""Parameters, operations and bytes of the lists of layers are those of the real networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vilg.config.schema import ImageTokenizerConfig, ReconstructorConfig
from megatron_vilg.models.critics import PatchCritic
from megatron_vilg.models.reconstructor import Reconstructor
from megatron_vilg.models.reconstructor_cost import (
    critic_layers,
    forward_flops,
    kept_bytes,
    num_values,
    parameter_shapes,
    reconstructor_layers,
)
from tests.tiny import tiny_config

MODEL = tiny_config(width=64, image_side=8)
SMALL = {"image_size": 64, "channels": 16, "channel_multipliers": (1, 1, 2, 4), "norm_groups": 8, "codebook_dim": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "vqgan": {},
    "vqgan without attention": {"bottom_attention": False, "num_res_blocks": 1, "patch": 2, "image_size": 128},
    "vqgan of taming-transformers": {"latent_channels": 24, "attention_levels": (3,)},
    "dvae": {"kind": "dvae"},
    "dvae folded": {"kind": "dvae", "num_res_blocks": 3, "patch": 2, "image_size": 128, "codebook_dim": 24},
}


def tokenizer_of(name: str) -> ImageTokenizerConfig:
    return dataclasses.replace(ImageTokenizerConfig(**SMALL), **VARIANTS[name])  # type: ignore[arg-type]


def decoded(part: Reconstructor, device: str) -> Tensor:
    hidden = torch.zeros(1, MODEL.image_side**2, MODEL.width, device=device, requires_grad=True)
    return part.decode_vectors(part.mapping(hidden))


def kept_by(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps, parameters and their copies in other types left out."""
    shapes = {p.shape for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape not in shapes:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()  # alive until everything is counted
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("inner", [0, 40])
def test_shapes_and_operations_are_those_of_the_network(name: str, inner: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, tokenizer = ReconstructorConfig(mapping_width=inner), tokenizer_of(name)
    layers = reconstructor_layers(config, MODEL, tokenizer)
    with torch.device("meta"):
        part = Reconstructor(config, MODEL, tokenizer)
    assert list(parameter_shapes(layers).items()) == [(n, tuple(p.shape)) for n, p in part.named_parameters()]
    with FlopCounterMode(display=False) as counter:
        decoded(part, "meta")
    assert forward_flops(layers) == counter.get_total_flops()


@pytest.mark.parametrize("side", [24, 64])
def test_the_critics_are_too(side: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    critic, layers = PatchCritic(6).to("meta"), critic_layers(6, side)
    assert parameter_shapes(layers) == {n: tuple(p.shape) for n, p in critic.named_parameters()}
    pictures = torch.zeros(2, 3, side, side, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        critic(pictures)
    assert 2 * forward_flops(layers) == counter.get_total_flops()
    assert kept_by(critic, lambda: critic(pictures)) == pytest.approx(2 * kept_bytes(layers, 4), rel=0.01)
    assert num_values(critic_layers(64, 256)) == 2_765_633


@pytest.fixture
def cudas_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast computes group norms in float32 on a GPU, but not on a CPU."""
    group_norm, layer_norm = nn.functional.group_norm, nn.functional.layer_norm

    def in_float(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def computed(x: Tensor, *args: Any, **options: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return norm(x.float(), *args, **options)

        return computed

    monkeypatch.setattr(nn.functional, "group_norm", in_float(group_norm))
    monkeypatch.setattr(nn.functional, "layer_norm", in_float(layer_norm))


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("compute", [4, 2])
def test_what_a_picture_keeps_is_what_is_saved(name: str, compute: int, cudas_norms: None) -> None:
    """Statistics of norms are left out, and what is still float32 before the first kernel: 2 % at this size."""
    tokenizer = tokenizer_of(name)
    part = Reconstructor(ReconstructorConfig(), MODEL, tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == 2):
        real = kept_by(part, lambda: decoded(part, "cpu"))
    layers = reconstructor_layers(ReconstructorConfig(), MODEL, tokenizer)
    assert kept_bytes(layers, compute) == pytest.approx(real, rel=0.025)
