"""Turn measured rows into a page: python benchmarks/report.py benchmarks/results/*.json

Writes one picture per metric beside ``docs/performance.md`` (``docs/results/performance-C1.svg``, ...) and the tables
of that page, between its markers. A page whose sections would vanish is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "results"
BEGIN, END = "<!-- rows: written by benchmarks/report.py -->", "<!-- end of rows -->"
CLAIMS = {
    "C1": "A training step against the plain loop and GPT-2",
    "C2": "A training step against x-transformers and dalle-pytorch",
    "C3": "One attention layer against torch's fused kernel",
    "C4": "Drawing four prompts against caches that keep everything",
    "C5": "Keys and values read per picture",
    "C6": "Keys and values kept per picture",
    "C7": "Sixteen pictures of one prompt",
    "C8": "Output layer and loss against whole logits",
    "C14": "The image tokenizer in bf16",
    "C15": "The optimizer's update",
    "C16": "Starting",
    "C17": "Muon's update against torch's",
    "O1": "Pairs that Muon needs beside AdamW",
    "O2": "Steps that an image tokenizer needs with Muon beside AdamW",
    "K1": "Merging and sharding a checkpoint against a plain copy and other converters",
    "G0": "What the GPU does at best",
    "G1": "One attention layer on a GPU",
    "G2": "A training step on a GPU",
    "G3": "Twelve layers of the 10B model on a GPU",
    "G4": "The whole 10B model on one GPU",
    "G5": "Drawing on a GPU against its bandwidth",
    "G6": "The image tokenizer on a GPU",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = [
        "| metric | ours | unit | peer | its value | ratio | of limit | goal | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        share = "" if row.get("share_of_limit") is None else f"{row['share_of_limit']:.0%}"
        missed = "**missed**" if row["ok"] is False else ""
        cells = (
            row["metric"],
            number(row["value"]),
            row["unit"],
            row["peer"] or "",
            number(row["peer_value"]),
            ratio,
            share,
            row["goal"] or "",
            missed,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits, or none."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def picture(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the ratios to each peer, a line at 1, and a mark at each goal."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": title, "svg.fonttype": "none"}  # the same rows give the same file, as text
    from matplotlib import pyplot

    shown = [row for row in rows if row["ratio"] is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.34 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        axes.barh(place, row["ratio"], color="#b5482f" if row["ok"] is False else "#2f6fb5", height=0.62)
        axes.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize=8)
        if row["goal"] and row["goal"].endswith("x"):
            axes.plot([float(row["goal"].split()[1][:-1])] * 2, [place - 0.42, place + 0.42], color="black", lw=1.4)
    axes.axvline(1.0, color="grey", lw=0.8, ls=":")
    axes.set_yticks(range(len(shown)), [f"{row['metric']} / {row['peer']}" for row in shown], fontsize=8)
    axes.set_xlabel("times better than the peer (black mark: goal)", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def section(record: dict[str, Any], pictures: Path) -> str:
    """Everything between the markers; writes the pictures."""
    load = f", {record['load']}" if "load" in record else ""
    parts = [f"`{record['command']}`, {record['date']}, {record['device']}{load}, {record['versions']}."]
    for id in dict.fromkeys(row["id"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["id"] == id]
        title = f"{id}: {CLAIMS.get(id, rows[0]['metric'])}"
        parts.append(f"### {title}")
        if any(row["ratio"] is not None for row in rows):
            name = f"performance-{id}.svg"
            picture(rows, title, pictures / name)
            parts.append(f"![{title}](results/{name})")
        parts.append(table(rows))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None, page: Path = PAGE, pictures: Path = PICTURES) -> int:
    """Write the page; several files (of ``run.py --json``) follow each other.

    The text outside the markers speaks of the tables, so sections that are there and in none of the files are an error.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="F.json", help="what run.py --json wrote")
    parser.add_argument("--drop", action="store_true", help="sections that are in none of the files may go")
    args = parser.parse_args(arguments)
    paths: list[Path] = args.files
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    rows, _, tail = rest.partition(END)
    known = {row["id"] for record in records for row in record["rows"]}
    lost = [id for id in re.findall(r"^### (\w+):", rows, re.MULTILINE) if id not in known]
    if lost and not args.drop:
        parser.error(f"{page} has {', '.join(lost)}, which none of these files has. Works: their files too, or --drop")
    sections = [section(record, pictures) for record in records]
    page.write_text(head + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + tail, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
