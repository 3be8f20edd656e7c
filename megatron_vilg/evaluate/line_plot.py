"""Curves over training steps as SVG text, to stand inside an HTML page; needs no package."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from megatron_vilg.evaluate.canvas import AMBER, GREEN, GREY, INK, LINE, RED
from megatron_vilg.evaluate.view import Curve, LinePlot

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
_COLOURS = ("#2f6fb5", RED, GREEN, AMBER, "#7a4fa3", "#4a9ea8")
_MOST_NAMED = 6
"""More curves than this (layers) are drawn from light to dark, and only the first and the last are named."""
_LOG_FROM = 50.0
"""Positive values that span more than this factor stand on a logarithmic axis."""


def render_plot(plot: LinePlot) -> str:
    """One plot as ``<figure>``: title, curves, legend, note. Values that are not finite are marked at the top edge."""
    values = [y for curve in plot.curves for _, y in curve.points if math.isfinite(y)]
    steps = [x for curve in plot.curves for x, _ in curve.points]
    axis = _Axis(values, plot.low, plot.high)
    frame = _Frame(min(steps), max(steps), axis)
    body = "\n".join([*frame.grid(), *(frame.curve(c, colour) for c, colour in _coloured(plot.curves))])
    note = f'<p class="note">{html.escape(plot.note)}</p>' if plot.note else ""
    return (
        f"<figure><h3>{html.escape(plot.title)} <small>{html.escape(plot.unit)}</small></h3>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(plot.title)}" font-size="11">\n'
        f"{body}\n</svg>\n<figcaption>{_legend(plot.curves)}{note}</figcaption></figure>\n"
    )


class _Axis:
    """Values to shares of the height, from 0 (below) to 1."""

    def __init__(self, values: Sequence[float], low: float | None, high: float | None) -> None:
        bounds = values or [0.0, 1.0]
        bottom = min(bounds) if low is None else low
        top = max(bounds) if high is None else high
        self.is_log = low is None and bottom > 0 and top / bottom > _LOG_FROM
        if self.is_log:
            bottom, top = math.log10(bottom), math.log10(top)
        elif low is None and 0 < bottom < 0.5 * top:
            bottom = 0.0
        if top - bottom <= 1e-9 * max(1.0, abs(top)):  # a constant stands in the middle
            bottom, top = bottom - 0.5, top + 0.5
        room = 0.0 if low is not None else 0.04 * (top - bottom)
        self._bottom, self._top = bottom - (room if bottom else 0.0), top + room

    def share(self, value: float) -> float:
        """Where a value stands."""
        place = math.log10(value) if self.is_log else value
        return (place - self._bottom) / (self._top - self._bottom)

    def ticks(self) -> list[float]:
        """Values with a line of their own."""
        if self.is_log:
            first, last = math.ceil(self._bottom), math.floor(self._top)
            powers = range(first, last + 1, max(1, (last - first) // 4))
            return [10.0**power for power in powers]
        return round_values(self._bottom, self._top)


class _Frame:
    """The area of the curves."""

    def __init__(self, first: int, last: int, axis: _Axis) -> None:
        self._first, self._last, self._axis = first, max(last, first + 1), axis

    def _x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - self._first) / (self._last - self._first)

    def _y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * self._axis.share(value)

    def grid(self) -> Iterator[str]:
        """Lines at round values, numbers beside them, and steps below."""
        for value in self._axis.ticks():
            y = self._y(value)
            yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINE}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="{GREY}">{value:.4g}</text>'
        for step in round_values(self._first, self._last):
            x = self._x(step)
            yield f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle" fill="{GREY}">{step:.6g}</text>'
        yield f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end" fill="{GREY}">step</text>'
        base = _HEIGHT - _BOTTOM
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}" stroke="{GREY}"/>'

    def curve(self, curve: Curve, colour: str) -> str:
        """A line that is broken where values are not finite; a single point is a dot."""
        parts: list[str] = []
        for stretch in _finite_stretches(curve.points):
            if len(stretch) == 1:
                (step, value), *_ = stretch
                parts.append(f'<circle cx="{self._x(step):.1f}" cy="{self._y(value):.1f}" r="2" fill="{colour}"/>')
            else:
                places = " ".join(f"{self._x(step):.1f},{self._y(value):.1f}" for step, value in stretch)
                parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for step, value in curve.points:
            if not math.isfinite(value):
                parts.append(f'<text x="{self._x(step):.1f}" y="{_TOP}" text-anchor="middle" fill="{RED}">×</text>')
        return f"<g><title>{html.escape(curve.name)}</title>{''.join(parts)}</g>"


def _finite_stretches(points: Sequence[tuple[int, float]]) -> Iterator[list[tuple[int, float]]]:
    stretch: list[tuple[int, float]] = []
    for point in points:
        if math.isfinite(point[1]):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def round_values(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``, about that many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough)
    first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    return [number * unit for number in range(first, last + 1)]


def _coloured(curves: Sequence[Curve]) -> list[tuple[Curve, str]]:
    if len(curves) <= _MOST_NAMED:
        return list(zip(curves, _COLOURS, strict=False))
    last = len(curves) - 1
    return [(curve, _between("#a9c8ea", "#12355c", place / last)) for place, curve in enumerate(curves)]


def _between(first: str, last: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _legend(curves: Sequence[Curve]) -> str:
    coloured = _coloured(curves)
    named = coloured if len(curves) <= _MOST_NAMED else [coloured[0], coloured[-1]]
    if len(named) == 1:
        return ""
    between = " … " if len(named) < len(curves) else " &nbsp; "
    return between.join(
        f'<span style="color:{colour}">━</span> <span style="color:{INK}">{html.escape(curve.name)}</span>'
        for curve, colour in named
    )
