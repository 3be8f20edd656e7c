from __future__ import annotations

import pytest

from megatron_vilg.data.prompt_parts import prompt_parts


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("黑色描边风格的鬼", ("黑色描边风格", "鬼")),
        ("立体三维风格的可爱的鬼", ("立体三维风格", "可爱的鬼")),
        ("公鸡，谷歌卡通风格", ("谷歌卡通风格", "公鸡")),
        ("rooster, Google cartoon style", ("Google cartoon style", "rooster")),
        ("公鸡", ("", "")),
        ("红色的", ("", "")),
        ("的士", ("", "")),
        ("", ("", "")),
    ],
)
def test_the_first_border_divides(prompt: str, parts: tuple[str, str]) -> None:
    assert prompt_parts(prompt) == parts
