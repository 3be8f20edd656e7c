"""The figures of a report as tables and footer lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vilg.evaluate.retrieval import FEW_CONCEPTS
from megatron_vilg.evaluate.view import Table

_KINDS = ("trained", "unseen")
_FONT_CREDIT = "字体 font: Noto Sans SC (SIL Open Font License 1.1)"
_NONE = "–"
_HEADER = ("", "训练过 trained", "没见过 unseen", "乱猜 chance", "上限 ceiling")


def report_tables(figures: Mapping[str, Any]) -> tuple[Table, ...]:
    """Drawing and captioning with chance and ceiling, cross-entropies, image tokenizer, and scenes if there are any."""
    tables = [_main_table(figures), _cross_entropy_table(figures), _tokenizer_table(figures)]
    if figures.get("scenes"):
        tables.append(_scene_table(figures["scenes"]))
    return tuple(tables)


def footer_lines(figures: Mapping[str, Any], credits: Sequence[str]) -> tuple[str, ...]:
    """Credits of the pictures, then what the run was made with."""
    lines = ["图片来源 pictures: " + "; ".join(credits)] if credits else []
    sampling = ", ".join(f"{name} {value}" for name, value in figures["drawing_settings"].items())
    lines.append(f"种子 seed {figures['seed']} · 采样 sampling: {sampling} · {_FONT_CREDIT}")
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in figures["seconds"].items())
    lines.append(f"版本 versions: {versions}" + (f" · 用时（秒） seconds: {seconds}" if seconds else ""))
    return tuple(lines)


def _main_table(figures: Mapping[str, Any]) -> Table:
    caption, rows = figures["caption"], []
    retrieval, style, both = (figures.get(name) for name in ("retrieval", "style", "concept_and_style"))
    if retrieval and style and both:
        shares = {k: retrieval[k]["r_at_1"] if k in retrieval else None for k in _KINDS}
        spans = {k: retrieval[k]["interval"] if k in retrieval else None for k in _KINDS}
        rows.append(_row("画对概念 concept drawn (R@1)", shares, spans, retrieval["chance"], retrieval["ceiling"]))
        name = f"r_at_1_of_{FEW_CONCEPTS}"
        few = {k: retrieval[k][name] for k in _KINDS if name in retrieval.get(k, {})}
        if few:
            rows.append(
                _row(f"{FEW_CONCEPTS} 选 1，画对概念 concept, of {FEW_CONCEPTS}", few, {}, 1 / FEW_CONCEPTS, None)
            )
        rows.append(_row("画对风格 style drawn", style, style["intervals"], style["chance"], style["ceiling"]))
        rows.append(_row("两者都对 both", both, both["intervals"], None, None))
        first = {k: retrieval[k]["not_reranked"] for k in _KINDS if "not_reranked" in retrieval.get(k, {})}
        if first:
            rows.append(_row("不挑选，画对概念 concept, no choice", first, {}, None, None))
            rows.append(_row("不挑选，画对风格 style, no choice", style["not_reranked"], {}, None, None))
    exact = {k: caption[k]["exact_match"] for k in _KINDS if k in caption}
    spans = {k: caption[k]["exact_match_interval"] for k in _KINDS if k in caption}
    rows.append(_row("说明全对 caption exact", exact, spans, caption["chance"], 1.0))
    greedy = {k: caption[k]["greedy_exact_match"] for k in _KINDS if k in caption}
    if figures["drawing_settings"].get("caption_candidates"):
        rows.append(_row("贪心说明全对 exact, greedy caption", greedy, {}, None, None))
    overlap = {k: caption[k]["char_f1"] for k in _KINDS if k in caption}
    rows.append(_row("说明字符 F1 caption characters", overlap, {}, caption["chance_char_f1"], 1.0))
    instrument = figures["instrument"]
    note = "( ): 95 % intervals. "
    if instrument:
        used = "also used" if instrument["used_in_training"] else "never used"
        note += (
            f"Drawings are judged by {instrument['network']} features, which training {used}, among "
            f"{instrument['gallery']}. Style: a choice among the real pictures of the asked concept. "
            "Ceiling: the real pictures sent through the image tokenizer."
        )
        settings = figures["drawing_settings"]
        if settings.get("rerank"):
            each, drawn = settings["samples_per_prompt"], max(settings["rerank"], settings["samples_per_prompt"])
            score = "the model's own score"
            if reranker := figures["reranker"]:
                score += f" and a reranker on {reranker['feature_network']} features"
            note += f" Judged: the best {each} of {drawn} drawings of a prompt by {score}; no choice: the first {each}."
        if figures.get("restyler"):
            note += (
                " Things in styles that training never showed them in are drawn by a restyler, which looks at their "
                "trained pictures in other styles."
            )
    return Table("画得对不对，说得对不对 · Drawing and captioning", _HEADER, tuple(rows), note)


def _row(
    name: str,
    shares: Mapping[str, Any],
    intervals: Mapping[str, Any],
    chance: float | None,
    ceiling: float | None,
) -> tuple[str, ...]:
    cells = [_cell(shares.get(kind), intervals.get(kind)) for kind in _KINDS]
    return (name, *cells, _cell(chance), _cell(ceiling))


def _cell(share: float | None, interval: Sequence[float] | None = None) -> str:
    if share is None:
        return _NONE
    return f"{share:.2f}" if interval is None else f"{share:.2f} ({interval[0]:.2f}–{interval[1]:.2f})"


def _cross_entropy_table(figures: Mapping[str, Any]) -> Table:
    names = {"text_to_image": "文 → 图 text to image", "image_to_text": "图 → 文 image to text"}
    rows = []
    for direction, name in names.items():
        for key, kind in (("ce", "训练过 trained"), ("ce_unseen", "没见过 unseen")):
            if figures[key] is not None:
                test = figures[key][direction]
                values = (f"{test[column]:.3f}" for column in ("right", "shuffled", "unigram"))
                rows.append((f"{name}, {kind}", *values))
    return Table(
        "交叉熵（纳特/词元） · Cross-entropy, nats per token",
        ("", "对的条件 right", "换过的条件 shuffled", "词频 unigram"),
        tuple(rows),
        "right: under its own caption or picture; shuffled: under that of another pair; unigram: token frequencies of "
        "the trained pairs. Lower is better; right below shuffled shows that the condition is used.",
    )


def _scene_table(scenes: Mapping[str, Any]) -> Table:
    rows = []
    for name, title in (("background", "底色 ground colour"), ("count", "数量 count"), ("size", "大小 size")):
        if name in scenes["ceiling"]:
            kinds = {kind: scenes.get(kind, {}).get(name, {}) for kind in _KINDS}
            shares = {kind: found.get("share") for kind, found in kinds.items()}
            spans = {kind: found.get("interval") for kind, found in kinds.items()}
            rows.append(_row(title, shares, spans, scenes["chance"].get(name), scenes["ceiling"][name]))
            first = {kind: found["not_reranked"] for kind, found in kinds.items() if "not_reranked" in found}
            if first:
                rows.append(_row(f"不挑选，{title}, no choice", first, {}, None, None))
    return Table(
        "场景 · Scenes, read back from the pixels",
        _HEADER,
        tuple(rows),
        "Chance: real scenes held against the captions of others. Ceiling: real scenes sent through the tokenizer.",
    )


def _tokenizer_table(figures: Mapping[str, Any]) -> Table:
    trained = figures["reconstruction"]
    kinds = [trained, *(trained[kind] for kind in ("unseen",) if kind in trained)]
    rows = (
        ("重建误差 reconstruction L1 (0–1)", *(f"{scores['l1']:.4f}" for scores in kinds)),
        ("峰值信噪比 PSNR (dB)", *(f"{scores['psnr']:.2f}" for scores in kinds)),
        ("码本使用率 codebook in use", f"{figures['codebook_use']:.1%}", *(_NONE for _ in kinds[1:])),
    )
    header = ("", "训练过 trained", "没见过 unseen")[: len(kinds) + 1]
    return Table("图片词元 · Image tokenizer", header, rows)
