"""Packages that do the same, if they are installed: x-transformers, and dalle-pytorch with DALL-E's axial layers."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_vilg.config.schema import ModelConfig

X_TRANSFORMERS, DALLE = "x-transformers", "dalle-pytorch"
_ABSENT = {
    "omegaconf": ("OmegaConf",),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "torchvision": ("transforms",),
    "requests": (),
    "youtokentome": (),
    "pkg_resources": (),
}
"""What dalle-pytorch imports and does not use here."""


def has(package: str) -> bool:
    """Whether a peer is installed."""
    return find_spec(package.replace("-", "_")) is not None


def x_transformer(model: ModelConfig, vocabulary: int) -> Any:
    """A dense causal decoder of x-transformers in the model's size, with its fused attention."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(
        dim=model.width, depth=model.num_layers, heads=model.num_heads, attn_dim_head=model.head_dim, attn_flash=True
    )
    length = model.spec.num_used + 1
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=vocabulary, max_seq_len=length, attn_layers=layers))


def dalle(model: ModelConfig, *, axial: bool, cached: bool = False) -> Any:
    """dalle-pytorch's generator in the model's size.

    Args:
        axial: its row and column layers in the paper's order; else all layers are dense.
        cached: its mode for inference, in which axial layers are dense ones with a mask and have a cache.
    """
    with stand_ins():
        import dalle_pytorch

    dalle_pytorch.dalle_pytorch.top_k = _unfiltered
    levels = 2  # any number of halvings will do: pictures are given as codes
    vae = dalle_pytorch.DiscreteVAE(
        image_size=model.image_side * 2**levels,
        num_layers=levels,
        num_tokens=model.image_vocab_size,
        codebook_dim=16,
        hidden_dim=8,
    )
    vae.decode = lambda codes: codes  # the tokens alone are compared
    generator = dalle_pytorch.DALLE(
        dim=model.width,
        vae=vae,
        num_text_tokens=model.text_vocab_size,
        text_seq_len=model.num_text_slots,
        depth=model.num_layers,
        heads=model.num_heads,
        dim_head=model.head_dim,
        attn_types=("axial_row", "axial_col", "axial_row", "axial_row") if axial else ("full",),
        rotary_emb=False,
        shift_tokens=False,
        optimize_for_inference=cached,
    )
    if cached or not axial:  # version 1.6.6 drops the cache where cond_scale is 1: hand it through
        generator.forward_with_cond_scale = lambda *args, cond_scale=1, cache=None, **rest: generator(
            *args, cache=cache, **rest
        )
    return generator


def _unfiltered(logits: Tensor, thres: float) -> Tensor:
    """In place of dalle-pytorch's top-k, as nobody else filters: ``filter_thres=0`` keeps all, and sorts them."""
    return logits


def x_transformers_codes(decoder: Any, prompt: Tensor, count: int) -> Tensor:
    """Draw ``count`` tokens behind ``prompt`` [B, n] with x-transformers: [B, count], any token, no top-k."""
    return decoder.generate(prompt, count, cache_kv=True, filter_logits_fn=lambda logits: logits)


def dalle_codes(generator: Any, text: Tensor, *, cached: bool, given: Tensor | None = None, count: int = 0) -> Tensor:
    """Draw codes with dalle-pytorch: a picture, or after ``given`` [B, n] the next ``count`` codes (0: the rest)."""
    generator = generator.eval()
    if given is None:
        return generator.generate_images(text, use_cache=cached)
    with torch.no_grad():
        codes = given
        end = given.shape[1] + count if count else generator.image_seq_len
        while codes.shape[1] < end:
            logits = generator(text, codes)[:, -1]
            codes = torch.cat([codes, logits.float().softmax(-1).multinomial(1) - generator.num_text_tokens], dim=1)
    return codes


@contextmanager
def stand_ins() -> Iterator[None]:
    """Empty modules in place of what dalle-pytorch imports; gone afterwards, since transformers asks what is there."""
    roots = {name.partition(".")[0] for name in _ABSENT} - set(sys.modules)
    absent = {root for root in roots if find_spec(root) is None}
    added = {name: types.ModuleType(name) for name in _ABSENT if name.partition(".")[0] in absent}
    for name, module in added.items():
        module.__path__ = []
        for member in _ABSENT[name]:
            setattr(module, member, object)
    sys.modules.update(added)
    packages = sys.modules["pkg_resources"] if "pkg_resources" in sys.modules else import_module("pkg_resources")
    if not hasattr(packages, "get_distribution"):
        packages.get_distribution = lambda name: types.SimpleNamespace(version="1.6.6")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
