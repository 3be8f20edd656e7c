"""The results of ``stability.py`` as JSON, as a Markdown table, and as a picture of all rows beside the one without."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("text_to_image", "text to image", ".2f"),
    ("image_to_text", "image to text", ".2f"),
    ("pixel_error", "pixel error", ".3f"),
    ("largest_logit", "largest logit", ".3g"),
    ("largest_rms", "largest RMS", ".3g"),
    ("largest_log_z", "largest log Z", ".3g"),
    ("largest_gradient", "largest gradient", ".3g"),
    ("skipped", "skipped", ".3g"),
    ("rollbacks", "rollbacks", ".3g"),
)
"""Key of a run's figures, heading, format of the mean over seeds."""


def write_report(record: dict[str, Any], out: Path) -> None:
    """Write ``stability.json``, ``.md`` and ``.svg`` into a folder; the picture needs matplotlib."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(_rounded(record)) + "\n"), ("md", table(record["rows"]) + "\n")):
        partial = out / f"stability.{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / f"stability.{name}")
    picture(record["rows"], out / "stability.svg")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds; a dash where a run has no such figure, and how many of the runs diverged."""
    lines = [
        "| on | " + " | ".join(heading for _, heading, _ in COLUMNS) + " | diverged |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for row in rows:
        cells = [_cell([run[key] for run in row["runs"]], spec) for key, _, spec in COLUMNS]
        lost = sum(run["diverged"] for run in row["runs"])
        lines.append(f"| {row['row']} | " + " | ".join(cells) + f" | {lost} of {len(row['runs'])} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None], spec: str) -> str:
    """Mean and, of several values, the range."""
    finite = [value for value in values if value is not None]
    if not finite:
        return "-"
    mean = f"{statistics.fmean(finite):{spec}}"
    low, high = f"{min(finite):{spec}}", f"{max(finite):{spec}}"
    return mean if low == high else f"{mean} ({low} to {high})"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel per row: its seeds in colour, those of the row with nothing on in grey; sums of both cross-entropies."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "stability", "svg.fonttype": "none"}  # the same rows give the same file
    from matplotlib import pyplot

    nothing = [run for row in rows if not row["settings"] for run in row["runs"]]
    across = 4
    down = -(-len(rows) // across)
    figure, grid = pyplot.subplots(
        down, across, figsize=(11, 2.2 * down), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes, row in zip(grid.flat, rows, strict=False):
        for run in nothing:
            _draw(axes, run, "#b8bec6", 0.9)
        for run in row["runs"]:
            _draw(axes, run, "#b5482f" if run["diverged"] else "#2f6fb5", 1.1)
        axes.set_title(row["row"], fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel("step (grey: nothing on, blue: this row, red: a run of this row that diverged)", fontsize=8)
    figure.supylabel("sum of both cross-entropies, nats per token", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw(axes: Any, run: dict[str, Any], colour: str, width: float) -> None:
    points = [(step, value) for step, value in run["curve"] if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, lw=width)


def _rounded(value: Any) -> Any:
    """Figures to four significant digits more than anyone needs."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value
