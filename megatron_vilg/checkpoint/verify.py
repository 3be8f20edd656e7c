"""Is a folder what it says it is, and does it hold the same as another one?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from megatron_vilg.checkpoint.averages import as_exported, averages_in
from megatron_vilg.checkpoint.canonical import FileSource
from megatron_vilg.checkpoint.manifest import FILE_NAME, Manifest, find_damage
from megatron_vilg.checkpoint.new_folder import Progress
from megatron_vilg.checkpoint.restyler import expected_shapes
from megatron_vilg.checkpoint.sources import GENERATOR, IMAGE_TOKENIZER, RECONSTRUCTOR, RERANKER, RESTYLER, companions
from megatron_vilg.checkpoint.tensors import (
    MODEL,
    MOMENTUM_SLOT,
    OPTIMIZER,
    TensorInfo,
    TensorSource,
    count_not_finite,
    in_order,
    parameter_of,
    part_of,
    pieces,
    read_whole,
)
from megatron_vilg.checkpoint.transfer import equal_bits
from megatron_vilg.config.reranker import RerankerConfig
from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, ReconstructorConfig
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.cost import is_hidden_matrix
from megatron_vilg.models.dual_encoder import DualEncoder
from megatron_vilg.models.image_tokenizer import ImageTokenizer
from megatron_vilg.models.reconstructor import Reconstructor
from megatron_vilg.models.tokenizers import build_image_tokenizer
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.sequence import Direction

_COARSE = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
"""How far outputs of weights rounded to a type may be off, as a share of the largest output."""
_PREFIX = f"{RECONSTRUCTOR}."


def problems_of(source: TensorSource, progress: Progress | None = None) -> list[str]:
    """Digests of files, names and shapes, configuration and tokenizers beside the weights, bad values, unequal copies.

    Returns:
        One line per problem; empty when the folder is sound.
    """
    problems: list[str] = []
    manifest = source.manifest
    if manifest is not None:
        if (source.path / FILE_NAME).is_file() and not source.is_verified:
            problems += find_damage(source.path, manifest)
        config, beside = None, []
        try:
            config, _ = companions(source)
        except CheckpointError as error:
            beside.append(str(error))
        problems += wrong_names(manifest, source.tensors, config) + beside
    if problems:
        return problems
    done, total = 0, sum(info.num_bytes for info in source.tensors.values())
    for name in in_order(source.tensors):
        info, bad = source.tensors[name], 0
        for start, stop in pieces(info):
            rows = source.rows(name, start, stop)
            bad += count_not_finite(name, rows)
            done += rows.numel() * rows.dtype.itemsize
            if progress is not None:
                progress("reading", done, total)
        if bad:
            problems.append(f"{name}: {bad} of {info.numel} values are not finite")
    return problems + source.verify()


def verdict(source: TensorSource) -> str:
    """What is right where :func:`problems_of` has found no problem; of a file that no manifest lists that is little."""
    count = f"{len(source.tensors)} tensors, {source.format}"
    if isinstance(source, FileSource) and source.listed_by() is None:
        return (
            f"{source.path}: header right and all values finite, but no {FILE_NAME} beside it lists it, so there is no "
            f"digest to compare with; {count}"
        )
    return f"{source.path}: sound; {count}"


def expected_weights(manifest: Manifest) -> dict[str, tuple[int, ...]] | None:
    """Shape of every weight by name, as the configuration in the manifest implies; None for other kinds.

    Raises:
        CheckpointError: the configuration does not fit this version of the package.
    """
    try:
        if manifest.kind == RESTYLER:
            return expected_shapes(manifest)
        with torch.device("meta"):
            model = _build(manifest)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the manifest's configuration does not fit this version of the package: {error}"
        ) from error
    return None if model is None else {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _build(manifest: Manifest) -> nn.Module | None:
    values = dict(manifest.model)
    if manifest.kind == GENERATOR and values:
        return ViLG(TypeAdapter(ModelConfig).validate_python(values))
    if manifest.kind == IMAGE_TOKENIZER:
        return build_image_tokenizer(TypeAdapter(ImageTokenizerConfig).validate_python(values))
    if manifest.kind == RERANKER:
        config = TypeAdapter(RerankerConfig).validate_python(values)
        return DualEncoder(config, manifest.text_vocab_size, int(manifest.stream.get("num_text_slots", 0)))
    return None


def _expected_reconstructor(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shape of every weight of a reconstructor, named as where it is alone; None where sections are missing."""
    model = manifest.model or config.get("model")
    if not model or RECONSTRUCTOR not in config or "image_tokenizer" not in config:
        return None
    try:
        with torch.device("meta"):
            part = Reconstructor(
                TypeAdapter(ReconstructorConfig).validate_python(dict(config[RECONSTRUCTOR])),
                TypeAdapter(ModelConfig).validate_python(dict(model)),
                TypeAdapter(ImageTokenizerConfig).validate_python(dict(config["image_tokenizer"])),
            )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the reconstructor's configuration does not fit this version of the package: {error}"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}


def wrong_names(
    manifest: Manifest, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None
) -> list[str]:
    """Names and shapes: weights against the configuration, optimizer state against the weights.

    Args:
        manifest: says all of a generator and of an image tokenizer.
        tensors: by full name.
        config: what lies beside the weights; without it, or without its sections ``reconstructor`` and
            ``image_tokenizer``, any names and shapes of a reconstructor will do.

    Returns:
        One line per tensor that is missing, too many, of another shape, or of integers.

    Raises:
        CheckpointError: as :func:`expected_weights`.
    """
    problems = []
    expected = expected_weights(manifest)
    weights = {name.partition(".")[2]: info for name, info in tensors.items() if part_of(name) == MODEL}
    if manifest.kind == RECONSTRUCTOR:
        expected = _expected_reconstructor(manifest, config or {})
    elif expected is not None and (held := {n: info.shape for n, info in weights.items() if n.startswith(_PREFIX)}):
        wanted_part = _expected_reconstructor(manifest, config or {})
        expected |= held if wanted_part is None else {_PREFIX + name: shape for name, shape in wanted_part.items()}
    if expected is not None:
        for name in sorted(expected.keys() | weights.keys()):
            if name not in weights:
                problems.append(f"{name}: missing")
            elif name not in expected:
                problems.append(f"{name}: not part of this model")
            elif weights[name].shape != expected[name]:
                problems.append(f"{name}: has shape {list(weights[name].shape)}, expected {list(expected[name])}")
            elif not weights[name].dtype.is_floating_point:
                problems.append(f"{name}: has element type {weights[name].dtype}, expected a floating-point type")
    state = {(name.split(".")[1], parameter_of(name)) for name in tensors if part_of(name) == OPTIMIZER}
    unknown = sorted(pair for pair in state if pair[1] not in weights)
    problems += [f"{OPTIMIZER}.{slot}.{parameter}: there is no such weight" for slot, parameter in unknown]
    slots, trained = {slot for slot, _ in state}, {parameter for _, parameter in state}
    by_muon: set[str] = set()
    if MOMENTUM_SLOT in slots:
        by_muon = {name for name, info in weights.items() if is_hidden_matrix(name, len(info.shape))}
    wanted = {(slot, name) for slot in slots - {MOMENTUM_SLOT} for name in trained - by_muon}
    wanted |= {(MOMENTUM_SLOT, name) for name in by_muon}
    problems += [f"{OPTIMIZER}.{slot}.{parameter}: missing" for slot, parameter in sorted(wanted - state)]
    return problems


def differences(one: TensorSource, other: TensorSource, progress: Progress | None = None) -> list[str]:
    """Tensors of ``one`` beside those of ``other``: bit by bit, or rounded where the element types differ.

    Only floating-point types are rounded, both to the one of fewer bits. Neither fp16 nor bf16 holds all values of the
    other one, so they are never the same, and nor are integers and anything else. The order of the two does not matter.

    Parts that only one of them has at all, such as optimizer state, are not compared. Where only one of them has
    averaged weights beside those of the last step, it is those that the other's weights should be.

    Returns:
        One line per tensor that is missing or differs; empty when they hold the same.
    """
    if bool(averages_in(one.tensors)) != bool(averages_in(other.tensors)):
        one, other = as_exported(one), as_exported(other)
    parts = {part_of(name) for name in one.tensors} & {part_of(name) for name in other.tensors}
    names = sorted(name for name in one.tensors.keys() | other.tensors.keys() if part_of(name) in parts)
    problems, done, total = [], 0, sum(one.tensors[name].num_bytes for name in names if name in one.tensors)
    if not names:
        return [f"{one.path} and {other.path} have no part in common"]
    for name in names:
        mine, theirs = one.tensors.get(name), other.tensors.get(name)
        if mine is None or theirs is None:
            problems.append(f"{name}: only in {(other if mine is None else one).path}")
            continue
        if mine.shape != theirs.shape:
            problems.append(f"{name}: shape {list(mine.shape)} and {list(theirs.shape)}")
        elif not _can_be_rounded(mine.dtype, theirs.dtype):
            problems.append(f"{name}: element types {mine.dtype} and {theirs.dtype}, and neither rounds to the other")
        elif (largest := _largest_difference(one, other, name)) is not None:
            problems.append(f"{name}: values differ by up to {largest:.3g}")
        done += mine.num_bytes
        if progress is not None:
            progress("comparing", done, total)
    return problems


def not_compared(one: TensorSource, other: TensorSource) -> list[str]:
    """What :func:`differences` leaves out or rounds, one line each: parts of one alone, and unlike element types."""
    if bool(averages_in(one.tensors)) != bool(averages_in(other.tensors)):
        one, other = as_exported(one), as_exported(other)
    lines = []
    for mine, theirs in ((one, other), (other, one)):
        counts = Counter(part_of(name) for name in mine.tensors)
        lines += [
            f"{part}: only in {mine.path} ({counts[part]} tensors)"
            for part in sorted(counts.keys() - {part_of(name) for name in theirs.tensors})
        ]
    types = Counter(
        (str(one.tensors[name].dtype), str(other.tensors[name].dtype))
        for name in one.tensors.keys() & other.tensors.keys()
        if one.tensors[name].dtype != other.tensors[name].dtype
    )
    lines += [
        f"{count} tensors: {mine} beside {theirs}, compared after rounding to the coarser"
        for (mine, theirs), count in sorted(types.items())
    ]
    return [line.replace("torch.", "") for line in lines]


def _can_be_rounded(one: torch.dtype, other: torch.dtype) -> bool:
    """Whether one type holds every value of the other, up to rounding."""
    return one == other or (one.is_floating_point and other.is_floating_point and one.itemsize != other.itemsize)


def _largest_difference(one: TensorSource, other: TensorSource, name: str) -> float | None:
    """None where values are the same, in the coarser of the two types; NaN where one of them has that alone."""
    dtypes = [source.tensors[name].dtype for source in (one, other)]
    coarse = min(dtypes, key=lambda dtype: dtype.itemsize)
    largest = None
    for start, stop in pieces(one.tensors[name]):
        mine, theirs = (source.rows(name, start, stop).to(coarse) for source in (one, other))
        if not equal_bits(mine, theirs):
            difference = float((mine.double() - theirs.double()).abs().max())
            if math.isnan(difference):  # which no comparison of numbers would call the largest
                return difference
            largest = max(largest or 0.0, difference)
    return largest


def output_difference(one: TensorSource, other: TensorSource) -> tuple[float, float]:
    """Run both models on the same random input; a generator's reconstructor is left out.

    Needs memory for one model at a time.

    Returns:
        Largest difference of the outputs (logits of both directions, or pixels), and the largest that rounding to
        the coarser element type explains: 0 for equal types.

    Raises:
        CheckpointError: there is no generator and no image tokenizer in it, or the two are of different kinds.
    """
    outputs = [_outputs(as_exported(source)) for source in (one, other)]
    if [x.shape for x in outputs[0]] != [x.shape for x in outputs[1]]:
        raise CheckpointError(f"{one.path} and {other.path}: outputs have different shapes, the models differ")
    largest = max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))
    scale = max(float(a.abs().max()) for a in outputs[0])
    dtypes = {info.dtype for source in (one, other) for name, info in source.tensors.items() if part_of(name) == MODEL}
    return largest, scale * max((_COARSE.get(dtype, 0.0) for dtype in dtypes), default=0.0)


@torch.no_grad()
def _outputs(source: TensorSource) -> list[Tensor]:
    manifest = source.manifest
    model = None if manifest is None else _build(manifest)
    if model is None:
        raise CheckpointError(f"{source.path}: holds no generator and no image tokenizer that could be run")
    names = [n for n in source.tensors if part_of(n) == MODEL and not n.startswith(f"{MODEL}.{_PREFIX}")]
    model.load_state_dict({name.partition(".")[2]: read_whole(source, name) for name in names})
    run: Callable[[nn.Module, torch.Generator], list[Tensor]] = _logits if isinstance(model, ViLG) else _pixels
    return run(model.eval(), torch.Generator().manual_seed(0))


def _logits(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    assert isinstance(model, ViLG)
    config = model.config
    text = torch.randint(6, config.text_vocab_size, (2, config.num_text_slots), generator=generator)
    codes = torch.randint(config.image_vocab_size, (2, config.spec.num_image_tokens), generator=generator)
    lengths = torch.full((2,), config.num_text_slots)
    return [model.logits(text, codes, lengths, direction) for direction in Direction]


def _pixels(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    assert not isinstance(model, ViLG) and isinstance(model, ImageTokenizer)
    ids = torch.randint(model.config.codebook_size, (1, model.config.grid_side**2), generator=generator)
    return [model.decode(model.lookup(ids))]


def require_sound(problems: list[str], what: Path | str) -> None:
    """Raise with all problems, the first thirty in full."""
    if problems:
        more = [f"and {len(problems) - 30} more"] if len(problems) > 30 else []
        raise CheckpointError(f"{what}: {len(problems)} problems\n  " + "\n  ".join([*problems[:30], *more]))
