"""What a prompt consists of, as far as its punctuation says: the manner and the thing of ``MANNER的THING``."""

from __future__ import annotations

import re

_BORDER = re.compile(r"的|[，,；;：:]\s*")


def prompt_parts(prompt: str) -> tuple[str, ...]:
    """The texts before and behind the first 的, comma, semicolon or colon; none where there is nothing to divide.

    Captions of web pictures are mostly of the form attribute, 的, thing; the demo's all are.
    """
    border = _BORDER.search(prompt)
    if border is None:
        return ()
    parts = (prompt[: border.start()].strip(), prompt[border.end() :].strip())
    return parts if all(parts) else ()
