"""Image tokenizers of other projects as ours: VQGANs of taming-transformers and LlamaGen, the dVAE of DALL-E.

Their files are pickles. They are read as data (:mod:`checkpoint.inert`), nothing in them is executed. Every tensor must
find its place and every place its tensor; what training alone needs (critics, perceptual networks) is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from megatron_vilg.checkpoint.foreign_names import ONE_HOT_INPUT, NameRule, dvae_rules, vqgan_rules
from megatron_vilg.checkpoint.image_tokenizer import KIND
from megatron_vilg.checkpoint.inert import Described
from megatron_vilg.checkpoint.manifest import REMEDY, Manifest
from megatron_vilg.checkpoint.safetensors_file import SafetensorsFile
from megatron_vilg.checkpoint.tensors import MODEL, DictSource, TensorSource
from megatron_vilg.checkpoint.torch_file import TorchFile, named_tensors
from megatron_vilg.config.check import check_image_tokenizer
from megatron_vilg.config.schema import ImageTokenizerConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.log import get_logger
from megatron_vilg.models.tokenizers import AnyTokenizer, build_image_tokenizer
from megatron_vilg.models.vqgan import VQGAN

log = get_logger(__name__)
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".safetensors")
NOT_NEEDED = ("loss.", "colorize", "quantize.codebook_used")
"""Beginnings of names that only training needs."""
WRAPPERS = ("state_dict", "model")
"""What training tools call the weights in their files."""
AVERAGED = ("ema", *WRAPPERS)
"""LlamaGen's ``--ema`` keeps averages beside the weights of the last step, and its own evaluation takes them."""
_SIZE = 256
"""Side in pixels of the pictures that the published models were trained on."""


def read_taming(path: Path, config_file: Path | None = None, image_size: int | None = None) -> DictSource:
    """A VQGAN of taming-transformers, VQ or Gumbel, with its yaml.

    Args:
        path: weights, or a folder with one file of weights and one yaml somewhere in it.
        config_file: the yaml, where the folder has none or several.
        image_size: side of the pictures it shall encode; None: as in its yaml.

    Raises:
        CheckpointError: files are missing, damaged, or not what they should be.
    """
    weights = _one_file(path, SUFFIXES, "--load-dir")
    config_file = config_file or _one_file(path if path.is_dir() else path.parent, (".yaml", ".yml"), "--config")
    with TensorSource(path) as files:
        readers = _find(files, weights)
        config = taming_config(config_file, is_gumbel="quantize.proj.weight" in readers, image_size=image_size)
        return _converted(path, _read(readers), config, "taming-transformers")


def read_llamagen(path: Path, image_size: int | None = None) -> DictSource:
    """A VQ tokenizer of LlamaGen, with averaged weights where it has some; its sizes follow from its tensors.

    Raises:
        CheckpointError: as :func:`read_taming`.
    """
    weights = _one_file(path, SUFFIXES, "--load-dir")
    with TensorSource(path) as files:
        tensors = _read(_find(files, weights, AVERAGED))
        return _converted(path, tensors, llamagen_config(weights, tensors, image_size or _SIZE), "LlamaGen")


def read_dalle(path: Path, image_size: int | None = None) -> DictSource:
    """The dVAE of DALL-E: a folder with ``encoder.pkl`` and ``decoder.pkl``.

    Raises:
        CheckpointError: as :func:`read_taming`.
    """
    with TensorSource(path) as files:
        tensors: dict[str, Tensor] = {}
        for side in ("encoder", "decoder"):
            file = next((f for s in (".pkl", ".pt", ".safetensors") if (f := path / f"{side}{s}").is_file()), None)
            if file is None:
                raise CheckpointError(f"--load-dir={path}: no {side}.pkl in it. Works: encoder.pkl and decoder.pkl")
            tensors |= {f"{side}.{name}": tensor for name, tensor in _read(_find(files, file)).items()}
        return _converted(path, tensors, dalle_config(path, tensors, image_size or _SIZE), "DALL-E")


def taming_config(file: Path, *, is_gumbel: bool, image_size: int | None) -> ImageTokenizerConfig:
    """Our configuration from a yaml of taming-transformers.

    Raises:
        CheckpointError: it is none, or asks for what we cannot express.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        section = content.get("model", content)
        params = section.get("params", section)
        network = params["ddconfig"]
        resolution = int(network["resolution"])
        multipliers = tuple(int(m) for m in network["ch_mult"])
        sides = [resolution // 2**level for level in range(len(multipliers))]
        values = {
            "image_size": image_size or resolution,
            "channels": int(network["ch"]),
            "channel_multipliers": multipliers,
            "num_res_blocks": int(network["num_res_blocks"]),
            "attention_levels": tuple(n for n, side in enumerate(sides) if side in network["attn_resolutions"]),
            "latent_channels": int(network["z_channels"]),
            "codebook_size": int(params["n_embed"]),
            "codebook_dim": int(params["embed_dim"]),
        }
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--config={file}: cannot be read as yaml ({error})") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"--config={file}: is no configuration of a VQGAN: {error!r} is missing or wrong"
        ) from error
    problems = [
        f"ddconfig.{key}={network[key]}: only {works} can be read"
        for key, works in (("double_z", False), ("in_channels", 3), ("out_ch", 3), ("resamp_with_conv", True))
        if network.get(key, works) != works
    ]
    if params.get("remap") is not None:
        problems.append("remap: codes that are numbered anew by a file cannot be read")
    target = str(section.get("target", ""))
    if target and target.endswith("GumbelVQ") != is_gumbel:
        problems.append(f"target={target}: the weights are those of a {'Gumbel' if is_gumbel else 'VQ'} model")
    if problems:
        raise CheckpointError(f"--config={file}: " + "; ".join(problems))
    return _config(file, {**values, "code_choice": "logits" if is_gumbel else "nearest"})


def llamagen_config(file: Path, tensors: Mapping[str, Tensor], image_size: int) -> ImageTokenizerConfig:
    """Our configuration from the shapes of LlamaGen's tensors."""
    try:
        channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.conv_blocks."))
        widths = [tensors[f"encoder.conv_blocks.{n}.res.0.conv1.weight"].shape[0] for n in range(levels)]
        blocks = 1 + max(int(n.split(".")[4]) for n in tensors if n.startswith("encoder.conv_blocks.0.res."))
        values = {
            "channels": channels,
            "channel_multipliers": tuple(width // channels for width in widths),
            "num_res_blocks": blocks,
            "attention_levels": (levels - 1,),
            "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
            "codebook_size": tensors["quantize.embedding.weight"].shape[0],
            "codebook_dim": tensors["quantize.embedding.weight"].shape[1],
            "l2_normalise": True,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: is no VQ tokenizer of LlamaGen ({error!r})") from error
    return _config(file, {"image_size": image_size, **values})


def dalle_config(path: Path, tensors: Mapping[str, Tensor], image_size: int) -> ImageTokenizerConfig:
    """Our configuration from the shapes of DALL-E's tensors."""
    try:
        channels = tensors["encoder.blocks.input.w"].shape[0]
        groups = sorted({name.split(".")[2] for name in tensors if name.startswith("encoder.blocks.group_")})
        widths = [tensors[f"encoder.blocks.{group}.block_1.res_path.conv_4.w"].shape[0] for group in groups]
        values = {
            "kind": "dvae",
            "channels": channels,
            "channel_multipliers": tuple(width // channels for width in widths),
            "num_res_blocks": len({n.split(".")[3] for n in tensors if n.startswith("encoder.blocks.group_1.block_")}),
            "codebook_size": tensors["decoder.blocks.input.w"].shape[1],
            "codebook_dim": tensors["decoder.blocks.input.w"].shape[0],
            "squeeze_input": True,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"--load-dir={path}: is no dVAE of DALL-E ({error!r})") from error
    return _config(path, {"image_size": image_size, **values})


def _config(file: Path, values: Mapping[str, Any]) -> ImageTokenizerConfig:
    defaults = {"bottom_attention": True, "norm_groups": 32, "l2_normalise": False, "codebook_update": "gradient"}
    try:
        config = ImageTokenizerConfig(**{**defaults, **values})
    except ValidationError as error:
        raise CheckpointError(f"{file}: sizes make no sense: {error}") from error
    if problems := check_image_tokenizer(config):
        raise CheckpointError(f"{file}: " + "; ".join(problems))
    return config


def _one_file(path: Path, suffixes: tuple[str, ...], option: str) -> Path:
    """The only file below ``path`` with one of these endings."""
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist. Works: {option} FILE, or the folder that it is in")
    found = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file() and f.suffix in suffixes)
    if len(found) != 1:
        shown = ", ".join(file.name for file in found[:5]) or "none"
        raise CheckpointError(f"{path}: needs one file *{'|'.join(suffixes)}, found {shown}. Works: {option} FILE")
    return found[0]


def _find(files: TensorSource, path: Path, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of a file, by name, without the first of the wrappers that is around them."""
    if path.suffix == ".safetensors":
        file = SafetensorsFile(files.descriptor(path), path)

        def whole(name: str) -> Tensor:
            info = file.tensors[name]
            return file.rows(name, 0, info.num_rows).reshape(info.shape)

        return {name: partial(whole, name) for name in file.tensors}
    archive = TorchFile(files.descriptor(path), path)
    try:
        found = named_tensors(_unwrapped(archive.content, path, wrappers))
    except RecursionError as error:
        raise CheckpointError(f"{path}: a dictionary in it contains itself; the file is damaged. {REMEDY}") from error
    if not found:
        raise CheckpointError(f"{path}: no tensors in it")

    def read(described: Described) -> Tensor:
        archive.check(described)
        rows = described.shape[0] if described.shape else 1
        return archive.rows(described, 0, rows).reshape(described.shape)

    return {name: partial(read, described) for name, described in found.items()}


def _unwrapped(content: Any, path: Path, wrappers: Sequence[str]) -> Any:
    """What the first of the wrappers holds, if that is tensors, and so on inwards."""
    for wrapper in wrappers:
        inner = content.get(wrapper) if isinstance(content, dict) else None
        if isinstance(inner, dict) and named_tensors(inner):
            content = inner
            log.info("%s: weights taken from %r", path, wrapper)
    return content


def _read(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    return {name: read() for name, read in readers.items()}


def _converted(path: Path, tensors: Mapping[str, Tensor], config: ImageTokenizerConfig, project: str) -> DictSource:
    model = build_image_tokenizer(config)
    own = model.state_dict()
    used: set[str] = set()
    problems: list[str] = []
    for rule in _rules(model, project):
        used |= set(rule.theirs)
        missing = [name for name in rule.theirs if name not in tensors]
        if missing:
            problems.append(f"{', '.join(missing)}: missing")
            continue
        value, place = _joined(rule, tensors), own[rule.ours]
        if whole := [name for name in rule.theirs if not tensors[name].is_floating_point()]:
            types = ", ".join(str(tensors[name].dtype) for name in whole)
            problems.append(f"{', '.join(whole)}: holds {types}; only floating-point weights can be read")
            continue
        if _without_ones(value.shape) != _without_ones(place.shape):
            found = " + ".join(str(list(tensors[name].shape)) for name in rule.theirs)
            problems.append(f"{', '.join(rule.theirs)}: has shape {found}, expected {list(place.shape)}")
            continue
        own[rule.ours] = value.float().reshape(place.shape).clone(memory_format=torch.contiguous_format)
    left = sorted(name for name in tensors.keys() - used if not name.startswith(NOT_NEEDED))
    problems += [f"{name}: has no place in this architecture" for name in left]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{path}: does not fit {project}\n  " + "\n  ".join(problems[:20]) + more)
    if out := sorted({name.split(".")[0] for name in tensors.keys() - used}):
        log.info("left out, needed for training only: %s", ", ".join(out))
    if isinstance(model, VQGAN):  # averages of the codebook, which training starts from
        own["quantizer.ema_sum"], own["quantizer.ema_count"] = own["quantizer.code"], torch.ones(config.codebook_size)
    manifest = Manifest(
        kind=KIND,
        model=dataclasses.asdict(config),
        image_vocab_size=config.codebook_size,
        counters={"imported_from": project},
    )
    return DictSource({f"{MODEL}.{name}": value.contiguous() for name, value in own.items()}, manifest, path)


def _without_ones(shape: Sequence[int]) -> list[int]:
    """A shape without its last dimensions of size 1: a 1 x 1 convolution is a linear layer, nothing else may differ."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _rules(model: AnyTokenizer, project: str) -> Iterator[NameRule]:
    if isinstance(model, VQGAN):
        return vqgan_rules(model, "taming" if project == "taming-transformers" else "llamagen")
    return dvae_rules(model)


def _joined(rule: NameRule, tensors: Mapping[str, Tensor]) -> Tensor:
    if rule.theirs == ONE_HOT_INPUT:
        weight, bias = (tensors[name].float() for name in rule.theirs)
        return weight.flatten(1).t() + bias
    return torch.cat([tensors[name] for name in rule.theirs])
