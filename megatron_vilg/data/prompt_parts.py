"""What a prompt consists of, as far as its punctuation says: the manner and the thing of ``MANNER的THING``."""

from __future__ import annotations

import re

_BORDER = re.compile(r"的|[，,；;：:]\s*")


def prompt_parts(prompt: str) -> tuple[str, str]:
    """Manner and thing: the texts before and behind the first 的, or behind and before the first comma, semicolon or
    colon, whichever comes first; two empty texts where there is nothing to divide.

    Captions of web pictures are mostly of the form attribute, 的, thing; the demo's all are.
    """
    border = _BORDER.search(prompt)
    if border is None:
        return "", ""
    before, behind = prompt[: border.start()].strip(), prompt[border.end() :].strip()
    if not (before and behind):
        return "", ""
    return (before, behind) if border[0] == "的" else (behind, before)
