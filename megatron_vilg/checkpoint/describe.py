"""What is in a folder of tensors, as text for people and as plain data."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_vilg.checkpoint.canonical import dtype_name
from megatron_vilg.checkpoint.new_folder import gigabytes
from megatron_vilg.checkpoint.tensors import TensorInfo, TensorSource, as_bytes, in_order, part_of, pieces
from megatron_vilg.errors import CheckpointError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def facts(source: TensorSource) -> dict[str, Any]:
    """Format, identity and size of a folder, as plain data."""
    manifest = source.manifest
    parts: dict[str, dict[str, int]] = {}
    for name, info in source.tensors.items():
        part = parts.setdefault(part_of(name), {"tensors": 0, "numbers": 0, "bytes": 0})
        part["tensors"] += 1
        part["numbers"] += info.numel
        part["bytes"] += info.num_bytes
    known: dict[str, Any] = {}
    if manifest is not None:
        fields = ("kind", "step", "samples_seen", "layout", "tokenizers", "text_vocab_size", "image_vocab_size")
        known = {name: getattr(manifest, name) for name in (*fields, "counters", "versions", "source", "model")}
        known = {name: dict(value) if isinstance(value, Mapping) else value for name, value in known.items()}
    return {"path": str(source.path), "format": source.format, **known, "parts": parts}


def tensor_facts(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Shape, type and bytes of every tensor by full name."""
    return {
        name: {"shape": list(info.shape), "dtype": dtype_name(info), "bytes": info.num_bytes}
        for name, info in ((name, tensors[name]) for name in in_order(tensors))
    }


def head_lines(source: TensorSource) -> Iterator[str]:
    """The facts as text."""
    values = facts(source)
    parts = values.pop("parts")
    model = values.pop("model", {})
    for name, value in values.items():
        if value not in ({}, "", 0):
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            yield f"{name:17} {shown}"
    if model:
        yield f"{'model':17} " + ", ".join(f"{k}={v}" for k, v in model.items())
    for part, count in parts.items():
        size = gigabytes(count["bytes"])
        yield f"{part:17} {count['tensors']} tensors, {count['numbers']:,} numbers, {size}"


def tree_lines(tensors: Mapping[str, TensorInfo], *, fold: bool = True) -> Iterator[str]:
    """One line per tensor; layers that are alike share a line unless ``fold`` is false."""
    groups: dict[tuple[str, TensorInfo], list[int]] = {}
    for name in in_order(tensors):
        pattern = _NUMBER.sub("*", name, count=1) if fold else name
        numbers = groups.setdefault((pattern, tensors[name]), [])
        if fold and (match := _NUMBER.search(name)):
            numbers.append(int(match[0]))
    for (pattern, info), numbers in groups.items():
        name = pattern.replace("*", _span(numbers), 1) if numbers else pattern
        times = f"{len(numbers)} x " if len(numbers) > 1 else ""
        shape = "x".join(map(str, info.shape)) or "scalar"
        yield f"{name:60} {dtype_name(info):9} {shape:>16} {times + gigabytes(info.num_bytes):>16}"


def _span(numbers: list[int]) -> str:
    """``0-47``, or a list where some are missing."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return str(numbers[0])
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if whole else "{" + ",".join(map(str, numbers)) + "}"


def find_tensor(source: TensorSource, name: str) -> str:
    """The full name of a tensor given with or without its first word.

    Raises:
        CheckpointError: there is none; names some that are near.
    """
    if name in source.tensors:
        return name
    if f"model.{name}" in source.tensors:
        return f"model.{name}"
    near = [other for other in source.tensors if name in other][:8]
    hint = f"; there is {', '.join(near)}" if near else "; `vilg checkpoint inspect` lists them all"
    raise CheckpointError(f"{source.path}: no tensor {name!r}{hint}")


def statistics(source: TensorSource, name: str) -> dict[str, Any]:
    """Figures of one tensor's values, computed in float64 piece by piece.

    Those that are not finite are the texts ``nan``, ``inf`` and ``-inf``, as JSON has no such numbers; ``nan`` is also
    what there is to say of a tensor without finite values.
    """
    info = source.tensors[name]
    digest, count, finite = hashlib.sha256(), 0, 0
    total = squares = torch.zeros((), dtype=torch.float64)
    low, high, zeros = float("nan"), float("nan"), 0
    first: list[float] = []
    for start, stop in pieces(info):
        rows = source.rows(name, start, stop)
        digest.update(as_bytes(rows).numpy().data)
        values = rows.double().flatten()
        first = first or values[:4].tolist()
        count += values.numel()
        values = values[torch.isfinite(values)]
        finite += values.numel()
        if values.numel():
            total, squares = total + values.sum(), squares + values.square().sum()
            # a number first: comparisons with NaN are false, and the first argument stays
            low, high = min(float(values.min()), low), max(float(values.max()), high)
            zeros += int((values == 0).sum())
    mean = float(total) / finite if finite else float("nan")
    variance = max(0.0, float(squares) / finite - mean**2) if finite else float("nan")
    return {
        "name": name,
        "shape": list(info.shape),
        "dtype": dtype_name(info),
        "bytes": info.num_bytes,
        "min": _plain(low),
        "max": _plain(high),
        "mean": _plain(mean),
        "std": _plain(variance**0.5),
        "norm": _plain(float(squares) ** 0.5),
        "zeros": zeros,
        "not_finite": count - finite,
        "first": [_plain(value) for value in first],
        "sha256": digest.hexdigest(),
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def manifest_differences(one: TensorSource, other: TensorSource) -> list[str]:
    """One line per field of the facts in which two folders differ."""
    mine, theirs = facts(one), facts(other)
    lines = []
    for key in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(key), theirs.get(key)
        if key in ("path", "parts") or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            inner = [
                f"{key}.{k}: {a.get(k)!r} | {b.get(k)!r}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
            ]
            lines += inner
        else:
            lines.append(f"{key}: {a!r} | {b!r}")
    return lines
