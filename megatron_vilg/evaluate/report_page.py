"""A report as one HTML file without any other file: pictures are inside, as base64."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from megatron_vilg.evaluate.canvas import AMBER, GREEN, GREY, INK, LINE, RED, SHADE
from megatron_vilg.evaluate.line_plot import render_plot
from megatron_vilg.evaluate.view import CaptionedPicture, DrawnPrompt, Group, LinePlot, ReportView, Sample, Table

_STYLE = f"""
body {{ margin: 2.5rem auto; max-width: 96rem; padding: 0 1.5rem; color: {INK}; background: #fff;
  font: 15px/1.45 "Noto Sans SC", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", system-ui, sans-serif }}
h1 {{ font-weight: 400; margin-bottom: 0 }} h2 {{ font-weight: 400; background: {SHADE}; padding: .4rem .8rem }}
h3 {{ font-weight: 400; margin: .2rem 0; border-bottom: 1px solid {LINE} }}
small, .note, th {{ color: {GREY}; font-weight: 400 }}
.groups {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(34rem, 1fr)); gap: 1rem 3rem }}
img {{ width: 72px; height: 72px; border: 1px solid {LINE}; display: block }}
.wide img {{ width: auto; height: auto; max-width: 100%; border: 0 }}
table {{ border-collapse: collapse }} td, th {{ padding: 4px 8px 4px 0; text-align: left }}
.figures td, .figures th {{ border-bottom: 1px solid {LINE}; text-align: right; padding-left: 1.2rem }}
.figures td:first-child, .figures th:first-child {{ text-align: left; padding-left: 0 }}
.right img {{ border-bottom: 5px solid {GREEN} }} .half img {{ border-bottom: 5px solid {AMBER} }}
.wrong img {{ border-bottom: 5px solid {RED} }}
.true {{ color: {GREY} }} .yes {{ color: {GREEN} }} .no {{ color: {RED} }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.2rem 2rem }}
figure {{ margin: 0 }} figure svg {{ width: 100%; height: auto }} figcaption {{ font-size: 13px }}
.captions {{ display: grid; grid-template-columns: 1fr 1fr }}
.captions div {{ display: flex; gap: .7rem; margin: 4px 0 }}
"""


def page_start(title: str, subtitle: str) -> str:
    """Head and heading of a page; what follows needs no other file."""
    title = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="zh">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n<p class=note>{html.escape(subtitle)}</p>"
    )


def render_plots(heading: str, plots: Sequence[LinePlot]) -> str:
    """A section of plots under a heading; nothing where there are none."""
    if not plots:
        return ""
    return f"<h2>{html.escape(heading)}</h2>\n<div class=plots>{''.join(map(render_plot, plots))}</div>"


def render_page(view: ReportView) -> str:
    """Write a report as HTML."""
    parts = [
        page_start(view.title, view.subtitle),
        "<h2>文字 → 图片 &nbsp; Text to image</h2>",
        f"<p class=note>{html.escape(view.choice)}</p>" if view.choice else "",
        f"<div class=groups>{''.join(_prompts(group) for group in view.groups)}</div>",
        "<h2>图片 → 文字 &nbsp; Image to text</h2>",
        f"<div class=groups>{''.join(_captions(group) for group in view.groups)}</div>",
        "<h2>数字 &nbsp; Figures</h2>",
        f"<div class=groups>{''.join(_table(table) for table in view.tables)}</div>",
        render_plots("训练中的仪表 \u00a0 Instruments over training", view.plots),
        *(f"<p class=note>{html.escape(line)}</p>" for line in view.footer),
    ]
    return "\n".join(parts) + "\n</html>\n"


def _heading(group: Group) -> str:
    return f"<h3>{html.escape(group.title)} <small>{html.escape(group.subtitle)}</small></h3>"


def _prompts(group: Group) -> str:
    num_samples = max((len(prompt.samples) for prompt in group.prompts), default=1)
    head = f"<tr><th><th>真图 real<th>重建 rebuilt<th colspan={num_samples}>生成 drawn"
    return f"<section>{_heading(group)}<table>{head}{''.join(map(_prompt_row, group.prompts))}</table></section>\n"


def _prompt_row(prompt: DrawnPrompt) -> str:
    cells = [f"<td>{html.escape(prompt.prompt)}<br><small>{html.escape(prompt.note)}</small>"]
    cells += [f"<td>{inline_picture(picture)}" for picture in (prompt.real, prompt.reconstruction)]
    cells += [f"<td class={_verdict(sample)}>{inline_picture(sample.picture)}" for sample in prompt.samples]
    return f"<tr>{''.join(cells)}\n"


def _verdict(sample: Sample) -> str:
    if sample.concept is None:
        return "open"
    if not sample.concept:
        return "wrong"
    return "half" if sample.style is False else "right"


def _captions(group: Group) -> str:
    return f"<section>{_heading(group)}<div class=captions>{_joined(group.captions)}</div></section>\n"


def _joined(items: Iterable[CaptionedPicture]) -> str:
    return "\n".join(
        f"<div>{inline_picture(item.picture)}<p><span class=true>{html.escape(item.true)}</span><br>"
        f"<span class={'yes' if item.is_right else 'no'}>{html.escape(item.generated)}</span></p></div>"
        for item in items
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in table.rows)
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    return (
        f"<section><h3>{html.escape(table.title)}</h3><table class=figures><tr>{head}\n{rows}</table>{note}</section>\n"
    )


def inline_picture(picture: Image.Image) -> str:
    """A picture as an ``<img>`` that holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
