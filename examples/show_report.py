"""Print the main figures of a ``report.json``: ``python examples/show_report.py RUN/report.json``."""

from __future__ import annotations

import json
import sys
from typing import Any

LINES = (
    ("cross-entropy, text to image (nats per token)", "ce text_to_image", ("right", "shuffled", "unigram")),
    ("  on held-out pairs", "ce_unseen text_to_image", ("right", "shuffled", "unigram")),
    ("cross-entropy, image to text (nats per token)", "ce image_to_text", ("right", "shuffled", "unigram")),
    ("  on held-out pairs", "ce_unseen image_to_text", ("right", "shuffled", "unigram")),
    ("captions word for word", "caption", ("trained exact_match", "unseen exact_match")),
    ("drawings of the asked concept", "retrieval", ("trained r_at_1", "unseen r_at_1", "chance", "ceiling")),
    ("drawings in the asked style", "style", ("trained", "unseen", "chance", "ceiling")),
    ("image tokenizer", "reconstruction", ("l1", "psnr")),
)


def look_up(report: dict[str, Any], path: str) -> Any:
    """The value behind keys separated by spaces; None where one is missing."""
    value: Any = report
    for key in path.split():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def main(path: str) -> None:
    """Print one line per topic, leaving out what the report does not hold."""
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    for title, section, names in LINES:
        values = [(name, look_up(report, f"{section} {name}")) for name in names]
        shown = [f"{name.split()[0]} {value:.3f}" for name, value in values if isinstance(value, int | float)]
        if shown:
            print(f"  {title:<46} {'  '.join(shown)}")


if __name__ == "__main__":
    main(sys.argv[1])
