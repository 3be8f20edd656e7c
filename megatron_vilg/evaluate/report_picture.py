"""A report as one picture: prompts with what was drawn, pictures with what was said, figures, credits."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from megatron_vilg.evaluate.canvas import AMBER, GREEN, GREY, INK, LINE, RED, SHADE, Canvas, column_widths
from megatron_vilg.evaluate.view import CaptionedPicture, DrawnPrompt, Group, ReportView, Sample, Table

_MARGIN, _GUTTER = 48, 56
_PICTURE, _GAP = 88, 8
_ROW = _PICTURE + 20
_PROMPT = 244
_CAPTION_PICTURE, _CAPTION_COLUMNS = 64, 2
_CELL = 16

_PICTURE_COLUMNS = ("真图 real", "重建 rebuilt")
_SAMPLE_COLUMN = "生成 drawn"


def render_picture(view: ReportView) -> Image.Image:
    """Draw a report on a white page."""
    num_samples = max((len(p.samples) for group in view.groups for p in group.prompts), default=4)
    column = _PROMPT + (2 + num_samples) * (_PICTURE + _GAP) + _GAP
    canvas = Canvas(2 * _MARGIN + max(len(view.groups), 2) * (column + _GUTTER) - _GUTTER)
    inside = canvas.width - 2 * _MARGIN
    canvas.text(_MARGIN, 36, view.title, 36)
    y = canvas.paragraph(_MARGIN, 86, view.subtitle, 18, inside, GREY, max_lines=3) + 18
    y = _section(canvas, y, "文字 → 图片", "Text to image", view.choice)
    y = max((_prompts(canvas, x, y, column, g) for x, g in _columns(view.groups, column)), default=y)
    if any(sample.concept is not None for g in view.groups for p in g.prompts for sample in p.samples):
        y = _legend(canvas, y + 4)
    y = _section(canvas, y + 22, "图片 → 文字", "Image to text", "灰：真实说明 · grey: true caption")
    y = max((_captions(canvas, x, y, column, g) for x, g in _columns(view.groups, column)), default=y)
    y = _section(canvas, y + 14, "数字", "Figures", "")
    y = _tables(canvas, y, column, view.tables)
    canvas.rule(_MARGIN, y + 10, inside)
    y += 24
    for line in view.footer:
        y = canvas.paragraph(_MARGIN, y, line, 14, inside, GREY, max_lines=4) + 3
    return canvas.finish(28)


def _columns(groups: Sequence[Group], column: int) -> list[tuple[int, Group]]:
    return [(_MARGIN + number * (column + _GUTTER), group) for number, group in enumerate(groups)]


def _section(canvas: Canvas, y: float, chinese: str, english: str, remark: str) -> float:
    inside = canvas.width - 2 * _MARGIN
    canvas.box(_MARGIN, y, inside, 42, fill=SHADE)
    canvas.text(_MARGIN + 14, y + 5, f"{chinese}   {english}", 22)
    canvas.text(_MARGIN + inside - 14, y + 11, remark, 15, GREY, align="right")
    return y + 56


def _prompts(canvas: Canvas, x: int, y: float, column: int, group: Group) -> float:
    y = _heading(canvas, x, y, column, group)
    if not group.prompts:
        return y
    first = x + _PROMPT
    for number, name in enumerate(_PICTURE_COLUMNS):
        middle = first + number * (_PICTURE + _GAP) + _PICTURE / 2
        canvas.text(middle, y, name, 14, GREY, align="middle")
    num_samples = max(len(p.samples) for p in group.prompts)
    samples = first + 2 * (_PICTURE + _GAP) + _GAP
    width = num_samples * (_PICTURE + _GAP) - _GAP
    canvas.text(samples + width / 2, y, f"{_SAMPLE_COLUMN} × {num_samples}", 14, GREY, align="middle")
    y += 24
    for prompt in group.prompts:
        _prompt_row(canvas, x, round(y), prompt)
        y += _ROW
    return y


def _prompt_row(canvas: Canvas, x: int, y: int, prompt: DrawnPrompt) -> None:
    below = canvas.paragraph(x, y + 4, prompt.prompt, 20, _PROMPT - 18, max_lines=2)
    canvas.paragraph(x, below + 4, prompt.note, 13, _PROMPT - 18, GREY, max_lines=2)
    first = x + _PROMPT
    canvas.picture(first, y, prompt.real, _PICTURE)
    canvas.picture(first + _PICTURE + _GAP, y, prompt.reconstruction, _PICTURE)
    for number, sample in enumerate(prompt.samples):
        left = first + (2 + number) * (_PICTURE + _GAP) + _GAP
        canvas.picture(left, y, sample.picture, _PICTURE)
        colour = _verdict_colour(sample)
        if colour is not None:
            canvas.box(left - 1, y + _PICTURE + 3, _PICTURE + 2, 5, fill=colour)


def _verdict_colour(sample: Sample) -> str | None:
    if sample.concept is None:
        return None
    if not sample.concept:
        return RED
    return GREEN if sample.style in (True, None) else AMBER


def _legend(canvas: Canvas, y: float) -> float:
    x: float = _MARGIN
    for colour, text in (
        (GREEN, "概念和风格都对 · concept and style right"),
        (AMBER, "概念对，风格不对 · concept right, style not"),
        (RED, "概念不对 · concept wrong"),
    ):
        canvas.box(x, y + 7, 34, 5, fill=colour)
        canvas.text(x + 42, y, text, 14, GREY)
        x += 400
    return y + 26


def _captions(canvas: Canvas, x: int, y: float, column: int, group: Group) -> float:
    y = _heading(canvas, x, y, column, group)
    cell = column / _CAPTION_COLUMNS
    rows = -(-len(group.captions) // _CAPTION_COLUMNS)
    for number, item in enumerate(group.captions):
        left, top = x + (number // rows) * cell, y + (number % rows) * (_CAPTION_PICTURE + 14)
        _caption_cell(canvas, round(left), round(top), cell, item)
    return y + rows * (_CAPTION_PICTURE + 14)


def _caption_cell(canvas: Canvas, x: int, y: int, width: float, item: CaptionedPicture) -> None:
    canvas.picture(x, y, item.picture, _CAPTION_PICTURE)
    left, room = x + _CAPTION_PICTURE + 12, width - _CAPTION_PICTURE - 24
    canvas.paragraph(left, y + 4, item.true, 16, room, GREY, max_lines=1)
    text = item.generated or "（空 · empty）"
    canvas.paragraph(left, y + 32, text, 18, room, GREEN if item.is_right else RED, max_lines=1)


def _heading(canvas: Canvas, x: int, y: float, column: int, group: Group) -> float:
    canvas.text(x, y, group.title, 20)
    canvas.text(x, y + 29, group.subtitle, 14, GREY)
    canvas.rule(x, y + 54, column)
    return y + 64


def _tables(canvas: Canvas, y: float, column: int, tables: Sequence[Table]) -> float:
    """Each table goes below the one of two columns that ends higher up."""
    ends = [y, y]
    for table in tables:
        side = ends.index(min(ends))
        ends[side] = _table(canvas, _MARGIN + side * (column + _GUTTER), ends[side], column, table) + 14
    return max(ends)


def _table(canvas: Canvas, x: float, y: float, width: int, table: Table) -> float:
    """Rows over the whole ``width``: names to the left, figures to the right of their columns."""
    canvas.text(x, y, table.title, 18)
    y += 34
    natural = column_widths([table.header, *table.rows], _CELL, 26)
    spread = max(0, width - sum(natural)) // len(natural)
    for number, row in enumerate([table.header, *table.rows]):
        right = x
        for column, cell in enumerate(row):
            right += natural[column] + spread
            colour = GREY if number == 0 else INK
            if column == 0:
                canvas.text(x, y, cell, _CELL, colour)
            else:
                canvas.text(right, y, cell, _CELL, colour, align="right")
        y += 27
        canvas.rule(x, y - 2, width, GREY if number == 0 else LINE)
        y += 3
    return canvas.paragraph(x, y + 4, table.note, 13, width, GREY, max_lines=6) if table.note else y
