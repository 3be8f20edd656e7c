from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import pytest

from megatron_vilg.data.filter_rules import (
    CaptionRules,
    Characters,
    Jieba,
    Word,
    choose_segmenter,
    has_special_characters,
)
from megatron_vilg.errors import MissingPackageError


class Spaced:
    """Words between spaces, of which those with a plus are nouns."""

    name, knows_nouns = "spaced", True

    def words(self, caption: str) -> Sequence[Word]:
        return [Word(text, "+" in text) for text in caption.split()]


@pytest.mark.parametrize(
    "caption",
    [
        "一只猫，坐在草地上。",
        "“你好”——《红楼梦》……（第①回）",
        "AT&T 的 3×4 米大楼，价格：￥99.5",
        "cafe\u0301 café 100% 36.5℃",
        "日本語のカタカナー、한국어",
        "〇一二",
    ],
)
def test_ordinary_captions(caption: str) -> None:
    assert not has_special_characters(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "猫🐱",
        "猫❤\ufe0f",
        "1\ufe0f\u20e3号",
        "9\u20e3",
        "👨\u200d👩",
        "猫\u200b",
        "猫\ue000",
        "猫\x07",
        "猫\ufffd",
        "猫\u0378",
    ]
    + [f"猫{sign}" for sign in "<>#@_*=|[]{}\\^~`★→©™■"]
    + ["<b>猫</b>", "猫&nbsp;狗", "猫&#39;", "见http://a.b", "见www.猫", "猫店.com", "MAO.CN的猫", "a.net"],
)
def test_special_characters(caption: str) -> None:
    assert has_special_characters(caption)


def test_characters_as_words() -> None:
    def words(caption: str) -> list[str]:
        return [word.text for word in Characters().words(caption)]

    assert words("一只，猫。") == ["一", "只", "猫"]
    assert words("don't use T恤 3.5 well-known") == ["don't", "use", "T", "恤", "3.5", "well-known"]
    assert words("，。 …") == []


def test_rules_in_their_order() -> None:
    rules = CaptionRules(Spaced(), max_words=3)
    reasons = [rules.reason(text) for text in ("a b c@", "a b@", "a+ b@", "a b", "a+ b")]
    assert reasons == ["too_long", "no_noun", "special_characters", "no_noun", ""]
    assert CaptionRules(Spaced(), max_words=3, reject_special=False).reason("a+ b@") == ""
    assert CaptionRules(Spaced(), max_words=0, reject_special=False).reason("a+ b c d") == ""
    assert CaptionRules(Spaced(), require_noun=False).reason("a b") == ""


def test_fewer_than_fifteen_words() -> None:
    rules = CaptionRules(Characters(), require_noun=False)
    assert [rules.reason("猫" * count) for count in (14, 15)] == ["", "too_long"]


def test_without_jieba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert isinstance(choose_segmenter("auto"), Characters)
        assert isinstance(choose_segmenter("no"), Characters)
    said = [record.getMessage() for record in caplog.records]
    assert "jieba is not installed: captions without a noun are kept, and every Chinese character counts" in said[0]
    assert "jieba is not installed: every Chinese character" in said[1]
    with pytest.raises(
        MissingPackageError, match=r"pip install 'megatron_vilg\[filter\]' .* --require-noun auto or no"
    ):
        choose_segmenter("yes")


def test_nouns_and_words_by_jieba() -> None:
    pytest.importorskip("jieba")
    segmenter = choose_segmenter("yes")
    assert isinstance(segmenter, Jieba) and segmenter.name.startswith("jieba 0.")
    assert [word.text for word in segmenter.words("一只红色的小猫，坐在草地上。")] == [
        *("一只", "红色", "的", "小猫", "坐在", "草地", "上")
    ]
    rules = CaptionRules(segmenter)
    assert {text: rules.reason(text) for text in ("漂亮", "很高兴地跑", "苹果", "微笑", "北京", "iPhone", "日落")} == {
        **dict.fromkeys(("漂亮", "很高兴地跑"), "no_noun"),
        **dict.fromkeys(("苹果", "微笑", "北京", "iPhone", "日落"), ""),
    }
    assert rules.reason("一只红色的小猫坐在绿色的草地上看书") == ""  # 17 characters, few words
    assert rules.reason("一只红色的小猫和一只黑色的小狗坐在绿色的草地上看一本很厚的书") == "too_long"
