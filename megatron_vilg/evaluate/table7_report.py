"""Table 7 as a file of figures, a picture (all rows side by side, the table under them), and a page with plots."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_vilg.data.images import to_image
from megatron_vilg.evaluate.canvas import Canvas
from megatron_vilg.evaluate.report_page import inline_picture, page_start, render_plots
from megatron_vilg.evaluate.statistics import rounded_figures
from megatron_vilg.evaluate.table7 import Table7
from megatron_vilg.evaluate.view import LinePlot

_MARGIN, _SIDE, _GAP, _SIZE = 24, 96, 8, 14
_NAME_WIDTH = 190
_DECIMALS = 5


def write_table7(table: Table7, json_file: Path, picture_file: Path | None) -> None:
    """Write the figures, and the picture if asked; each appears whole or not at all."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded_figures(table.figures, _DECIMALS), ensure_ascii=False, indent=1) + "\n"
    partial = json_file.with_name(json_file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(json_file)
    if picture_file is not None:
        picture_file.parent.mkdir(parents=True, exist_ok=True)
        partial = picture_file.with_name(picture_file.name + ".partial")
        render_table7(table).save(partial, format="PNG")
        partial.replace(picture_file)


def write_table7_page(table: Table7, plots: Mapping[str, Sequence[LinePlot]], file: Path) -> None:
    """Write the picture as an HTML page of its own, and under it what each run's instruments showed.

    Args:
        table: with pictures.
        plots: by heading, one per run; a run without any is named as such.
        file: the page; it appears whole or not at all.
    """
    subtitle = "Rows, figures, and what the instruments of each run showed while it trained."
    parts = [page_start("Table 7", subtitle), f"<div class=wide>{inline_picture(render_table7(table))}</div>"]
    for heading, shown in plots.items():
        missing = f"<h2>{html.escape(heading)}</h2>\n<p class=note>Trained without log.instruments_every.</p>"
        parts.append(render_plots(heading, shown) or missing)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
    partial.replace(file)


def render_table7(table: Table7) -> Image.Image:
    """Real pictures above those of every row, held-out captions under them, then the figures."""
    assert table.real is not None
    count = len(table.real)
    canvas = Canvas(2 * _MARGIN + _NAME_WIDTH + count * (_SIDE + _GAP))
    y: float = _MARGIN
    canvas.text(_MARGIN, y, "Table 7: which part gains from end-to-end training", 20)
    y += 40
    for name, pictures in {"real picture": table.real, **table.pictures}.items():
        canvas.paragraph(_MARGIN, y + 30, name, _SIZE, _NAME_WIDTH - 12)
        for place, pixels in enumerate(pictures):
            canvas.picture(_MARGIN + _NAME_WIDTH + place * (_SIDE + _GAP), round(y), to_image(pixels), _SIDE)
        y += _SIDE + _GAP
    for place, caption in enumerate(table.captions):
        canvas.paragraph(_MARGIN + _NAME_WIDTH + place * (_SIDE + _GAP), y, caption, 12, _SIDE)
    y += 64
    for group in ("held_out", "trained"):
        y = _figures(canvas, y, group, table.figures[group])
    return canvas.finish(_MARGIN)


def _figures(canvas: Canvas, y: float, group: str, figures: Mapping[str, Any]) -> float:
    title = f"{group.replace('_', ' ')}, {figures['pairs']} pairs: mean over seeds ± 95 % interval"
    canvas.text(_MARGIN, y, title, 16)
    columns = ("paper FID", "Frechet", "L1", "PSNR (dB)", "SSIM")
    edges = [_MARGIN + 330 + 130 * place for place in range(len(columns))]
    y += 28
    for x, column in zip(edges, columns, strict=True):
        canvas.text(x, y, column, _SIZE, align="right")
    for row in figures["rows"]:
        y += 22
        canvas.text(_MARGIN, y, row["row"], _SIZE)
        paper = "-" if row["paper_fid"] is None else f"{row['paper_fid']:.1f}"
        cells = [paper, *(_cell(row, key, digits) for key, digits in _KEYS)]
        for x, cell in zip(edges, cells, strict=True):
            canvas.text(x, y, cell, _SIZE, align="right")
    return y + 48


_KEYS = (("frechet", 2), ("l1", 4), ("psnr", 2), ("ssim", 3))


def _cell(row: Mapping[str, Any], key: str, digits: int) -> str:
    if key not in row["mean"]:
        return "-"
    half = row["interval95"][key]
    return f"{row['mean'][key]:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
