from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_vilg.data.demo import DemoOptions, Pair, choose_pairs, other_wordings, write_demo
from megatron_vilg.data.emoji import DEMO_STYLES, STYLES, EmojiSet
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.errors import DataError
from tests.data.fake_emoji import write_packages


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packages(tmp_path_factory.mktemp("cache"))


def options(**changes: Any) -> DemoOptions:
    return DemoOptions(**({"concepts": 12, "held_out_concepts": 3, "size": 16} | changes))


def by_split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    result: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        result[pair.split].append(pair)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_nothing_held_out_is_trained_and_all_of_it_is_fair(cache: Path, seed: int) -> None:
    pairs = by_split(choose_pairs(EmojiSet(cache, DEMO_STYLES), options(seed=seed)))
    trained = {(p.concept.hexcode, p.style) for p in pairs["train"]}
    names = {p.concept.label_en for p in pairs["train"]}
    assert len({p.concept.hexcode for p in pairs["train"]}) == 12
    assert len({p.concept.hexcode for p in pairs["val-concepts"]}) == 3
    assert not {p.concept.family for p in pairs["val-concepts"]} & {p.concept.family for p in pairs["train"]}
    assert 3 <= len(pairs["val-pairs"]) <= 6  # 8 % of 72, families whole
    for pair in pairs["val-pairs"]:
        assert (pair.concept.hexcode, pair.style) not in trained
        assert sum((pair.concept.hexcode, style) in trained for style in DEMO_STYLES) >= 3
        assert pair.style in {p.style for p in pairs["train"]}
    held = {(p.concept.family, p.style) for p in pairs["val-pairs"]}
    assert not held & {(p.concept.family, p.style) for p in pairs["train"]}
    assert not names & {"man", "flag of China", "camel"}


def test_zero_takes_everything(cache: Path) -> None:
    pairs = by_split(choose_pairs(EmojiSet(cache, DEMO_STYLES), options(concepts=0)))
    assert sum(len(split) for split in pairs.values()) == 19 * 6
    assert len({p.concept.hexcode for p in pairs["val-concepts"]}) == 1  # 5 % of 19


def test_choice_depends_on_the_seed_and_more_concepts_keep_the_first(cache: Path) -> None:
    emoji = EmojiSet(cache, DEMO_STYLES)

    def chosen(**changes: Any) -> set[str]:
        return {p.concept.hexcode for p in choose_pairs(emoji, options(**changes)) if p.split != "val-concepts"}

    assert chosen(concepts=6) < chosen(concepts=9)
    assert chosen(concepts=6) != chosen(concepts=6, seed=1)


def test_too_many_concepts_says_how_many_there_are(cache: Path) -> None:
    with pytest.raises(DataError, match=r"concepts = 20 and 3 held out: only 16 .*Use at most concepts=13, or 0"):
        choose_pairs(EmojiSet(cache, DEMO_STYLES), options(concepts=20))


def test_one_style_has_no_held_out_pairs(cache: Path) -> None:
    pairs = by_split(choose_pairs(EmojiSet(cache, ("noto",)), options(styles=("noto",))))
    assert set(pairs) == {"train", "val-concepts"}


def test_wordings(cache: Path) -> None:
    concept = EmojiSet(cache, ("noto",)).concepts[0]
    chinese = other_wordings(concept, "noto", ("zh",))
    assert {"老鼠", "谷歌卡通风格", "老鼠，谷歌卡通风格", "谷歌卡通风格的老鼠标签"} <= set(chinese)
    assert "谷歌卡通风格的老鼠" not in chinese and len(set(chinese)) == len(chinese)
    both = other_wordings(concept, "noto", ("zh", "en"))
    assert set(chinese) < set(both) and "rat in Google cartoon style" in both


def test_no_picture_is_trained_with_the_name_of_another(cache: Path, tmp_path: Path) -> None:
    names = {concept.label_zh: concept.hexcode for concept in EmojiSet(cache, ("noto",)).concepts}
    concept = dataclasses.replace(EmojiSet(cache, ("noto",)).concepts[0], tags_zh=("猫", "鼠", "粮", "灰色"))
    texts = other_wordings(concept, "noto", ("zh",), {"老鼠", "猫"})
    assert "谷歌卡通风格的猫" not in texts and {"谷歌卡通风格的鼠", "谷歌卡通风格的粮"} <= set(texts)
    write_demo(tmp_path / "a", cache, options(concepts=0))
    asked = 0
    for split in find_records(tmp_path / "a"):
        for record in read_records(tmp_path / "a", split):
            manner, concept_code = f"{record.fields['style_zh']}的", record.fields["concept"]
            for text in record.alternates:
                if text.startswith(manner):
                    asked += 1
                    assert names.get(text.removeprefix(manner), concept_code) == concept_code
    assert asked


def test_written_set_reads_back_and_is_equal_byte_for_byte(cache: Path, tmp_path: Path) -> None:
    manifest = write_demo(tmp_path / "a", cache, options())
    again = write_demo(tmp_path / "b", cache, options())
    assert manifest == again == json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert list(find_records(tmp_path / "a")) == ["train", "val-concepts", "val-pairs"]
    for split, count in manifest["pairs"].items():
        records = list(read_records(tmp_path / "a", split, max_bad_share=0.0))
        assert len(records) == count
        for record in records:
            fields = record.fields
            assert record.caption == f"{fields['style_zh']}的{fields['label_zh']}"
            assert record.decode().size == (16, 16) and fields["split"] == split and record.alternates
    assert len({r.fields["style"] for r in list(read_records(tmp_path / "a", "train"))[:10]}) > 2
    readme = (tmp_path / "a" / "README.md").read_text()
    assert all(style.licence in readme and style.credit in readme for style in map(STYLES.get, DEMO_STYLES) if style)
    assert not (tmp_path / "a.partial").exists()


def test_a_finished_set_is_kept_and_another_is_not_overwritten(cache: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "a", cache, options())
    before = (tmp_path / "a" / "train-00000.tar").stat().st_mtime_ns
    write_demo(tmp_path / "a", tmp_path / "no-cache-needed", options())
    assert (tmp_path / "a" / "train-00000.tar").stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"size.*16 there, 24 asked for"):
        write_demo(tmp_path / "a", cache, options(size=24))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(DataError, match="a demo set in format 1, not 2"):
        write_demo(tmp_path / "a", cache, options())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="it exists and is no demo set"):
        write_demo(tmp_path / "mine", cache, options())
    assert (tmp_path / "mine" / "photo.jpg").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"languages": ("zh", "fr")}, "languages = 'zh,fr': works zh, en, or zh,en"),
        ({"languages": ()}, "languages = ''"),
        ({"size": 4}, "size = 4: at least 16 works"),
        ({"styles": ("noto", "noto")}, "each style once"),
        ({"concepts": -1}, "concepts = -1: at least 0"),
    ],
)
def test_wrong_options(cache: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_demo(tmp_path / "a", cache, options(**changes))
    assert not (tmp_path / "a").exists()
