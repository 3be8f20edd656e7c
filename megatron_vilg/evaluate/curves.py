"""What a run noted about its stability while it trained, from ``metrics.jsonl`` to plots over its steps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.view import Curve, LinePlot

METRICS_FILE = "metrics.jsonl"
MOST_POINTS = 400
"""Points of a curve that are kept: more than a plot has pixels for."""
_INSTRUMENT = "hidden/last_rms"
"""In every line that the instruments wrote, whatever the run."""
_LAYER = re.compile(r"attention/max_logit\(layer (\d+)\)")
_BRACKETS = re.compile(r"\((.*)\)")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One plot: which metrics, what they mean."""

    title: str
    unit: str
    is_shown: Callable[[str], bool]
    note: str = ""
    low: float | None = None
    high: float | None = None


def _among(*names: str) -> Callable[[str], bool]:
    return frozenset(names).__contains__


def _starting(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


_KINDS = (
    _Kind(
        "Cross-entropy",
        "nats per token",
        _among("loss/text_to_image(nats/token)", "loss/image_to_text(nats/token)"),
    ),
    _Kind(
        "Largest attention logit of each layer",
        "logit",
        _starting("attention/max_logit"),
        "Growth means a softmax that saturates; remedy: model.qk_norm.",
    ),
    _Kind(
        "Size of the last block's output",
        "root mean square",
        _among(_INSTRUMENT),
        "Chameleon saw it grow long before its loss diverged; remedies: model.sandwich_norm, a lower optim.lr.",
    ),
    _Kind(
        "Mean log Z of both heads", "nats", _starting("log_z("), "Growth means drifting logits; remedy: loss.z_loss."
    ),
    _Kind("Gradient norm of each loss term", "norm over the generator, before weights", _starting("gradient(")),
    _Kind(
        "Cosine of generation's and reconstruction's gradient",
        "cosine",
        _starting("gradient/cosine"),
        "Below 0 the two terms work against each other.",
        -1.0,
        1.0,
    ),
    _Kind(
        "Update over weight of each part",
        "ratio of norms",
        _starting("update/weight("),
        "1e-3 is usual; 1e-2 is a learning rate that is too high for that part.",
    ),
    _Kind("Openness of the critic", "0: shut, 1: open", _among("critic/open(0-1)"), "", 0.0, 1.0),
    _Kind("Losses of the critic", "hinge loss", _among("loss/critic", "loss/adversarial")),
    _Kind("Weight of the critic", "factor of its loss", _among("critic/weight")),
)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's ``metrics.jsonl``, each with its ``step``; none where there is no such file.

    A last line without an end, as a run leaves it that is killed or still writes, is left out.

    Raises:
        DataError: another line is not a metric line; with its number.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); remove the line to go on without it") from error
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise DataError(f"{path}:{number}: a line of metrics is an object with a step; remove it to go on")
        found.append(content)
    return found


def instrument_plots(lines: Sequence[dict[str, Any]]) -> tuple[LinePlot, ...]:
    """A plot of every kind of instrument that the lines have values of; none if the instruments never looked."""
    if not any(_INSTRUMENT in line for line in lines):
        return ()
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    plots = []
    for kind in _KINDS:
        shown = sorted((name for name in names if kind.is_shown(name)), key=_order)
        curves = tuple(_curve(name, lines) for name in shown)
        if curves:
            plots.append(LinePlot(kind.title, kind.unit, curves, kind.note, kind.low, kind.high))
    return tuple(plots)


def _order(name: str) -> tuple[int, str]:
    """Layers by number; other curves keep the alphabet."""
    layer = _LAYER.fullmatch(name)
    return (int(layer[1]) if layer else 0, name)


def _curve(name: str, lines: Sequence[dict[str, Any]]) -> Curve:
    inside = _BRACKETS.search(name)
    label = inside[1] if inside and not name.startswith(("loss/", "critic/")) else name.split("(")[0].split("/")[-1]
    points = [(line["step"], line[name]) for line in lines if name in line]
    return Curve(label.replace("_", " "), thinned([(step, math.nan if y is None else y) for step, y in points]))


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> tuple[tuple[int, float], ...]:
    """At most about ``most`` points: of each stretch of steps the lowest and the highest, so that no peak is lost.

    A stretch with a value that is not finite shows that one.
    """
    if len(points) <= most:
        return tuple(points)
    size = -(-2 * len(points) // most)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        lost = [point for point in stretch if not math.isfinite(point[1])]
        ends = lost[:1] or {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return tuple(kept)
