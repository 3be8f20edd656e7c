from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vilg.data.emoji import STYLES, EmojiSet, family_of, icon_svg, tidy_label_en, tidy_label_zh
from megatron_vilg.errors import DataError
from tests.data.fake_emoji import write_packages


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> EmojiSet:
    return EmojiSet(write_packages(tmp_path_factory.mktemp("cache")), tuple(STYLES))


def test_concepts_have_names_groups_and_families(emoji: EmojiSet) -> None:
    by_name = {concept.label_en: concept for concept in emoji.concepts}
    assert len(by_name) == 19
    assert by_name["flag of China"].label_zh == "中国的旗帜" and by_name["flag of China"].group == "flags"
    assert by_name["tiger"].family == by_name["tiger face"].family != by_name["ox"].family
    assert by_name["rat"].tags_zh[-1] == "老鼠标签"


def test_every_style_draws_every_concept_even_without_code_points(emoji: EmojiSet) -> None:
    assert all(emoji.styles_of(concept) == tuple(STYLES) for concept in emoji.concepts)


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_square_and_have_colours(emoji: EmojiSet, style: str) -> None:
    image = emoji.draw(emoji.concepts[3], style, 20)
    pixels = np.asarray(image)
    assert image.mode == "RGBA" and pixels.shape == (20, 20, 4)
    assert pixels[10, 10, 3] == 255
    assert (pixels[0, 0, 3] == 0) == (style != "fluent-3d")


def test_aliases_and_offsets_in_svg() -> None:
    icons = {
        "icons": {"a": {"body": "<g/>", "left": -2, "width": 20}},
        "aliases": {"b": {"parent": "a", "top": 4}},
        "height": 18,
    }
    assert 'viewBox="-2 4 20 18"' in icon_svg(icons, "b")


@pytest.mark.parametrize(
    ("label", "want"),
    [
        ("旗: 中国", "中国的旗帜"),
        ("旗: 海盗旗", "海盗旗"),
        ("按键: 1", "按键1"),
        ("男人: 秃顶", "秃顶的男人"),
        ("猫", "猫"),
    ],
)
def test_tidy_label_zh(label: str, want: str) -> None:
    assert tidy_label_zh(label) == want


def test_tidy_label_en() -> None:
    assert tidy_label_en("flag: China") == "flag of China"
    assert tidy_label_en("man: bald") == "man, bald"


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("man running", "woman running, facing right", True),
        ("red heart", "sparkling heart", True),
        ("locked", "unlocked", True),
        ("cat face", "cat", True),
        ("lion", "tiger", False),
        ("red apple", "green apple", True),
        ("man", "woman", False),
    ],
)
def test_families(one: str, other: str, together: bool) -> None:
    assert (family_of(one, "") == family_of(other, "")) == together


def test_unknown_style_names_what_works(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"styles = 'noto,apple': works any of noto,twemoji"):
        EmojiSet(tmp_path, ["noto", "apple"])


def test_one_style_alone_without_code_points(tmp_path: Path) -> None:
    alone = EmojiSet(write_packages(tmp_path), ["emojione"])
    assert all(alone.has(concept, "emojione") for concept in alone.concepts)
