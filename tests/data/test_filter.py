from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vilg.data import filter as filtering
from megatron_vilg.data.filter import FilterOptions, Similarity, filter_pairs
from megatron_vilg.data.filter_rules import Word
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.similarity import ScoreFile
from megatron_vilg.errors import ConfigError, DataError, MissingPackageError

Png = Callable[..., bytes]
Folder = Callable[[Path, int], Path]
Shards = Callable[..., Path]


@pytest.fixture(autouse=True)
def without_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)


def write(root: Path, pairs: dict[str, tuple[bytes, str]]) -> Path:
    for key, (image, caption) in pairs.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".png").write_bytes(image)
        path.with_name(path.name + ".txt").write_text(caption, encoding="utf-8")
    return root


def rejects(out: Path) -> dict[str, dict[str, Any]]:
    lines = (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["key"]: line for line in map(json.loads, lines)}


def as_read(path: Path) -> list[tuple[str, str, bytes, str]]:
    return [(split, r.key, r.image, r.caption) for split in find_records(path) for r in read_records(path, split)]


def test_each_pair_gets_the_first_reason(tmp_path: Path, make_png: Png) -> None:
    big, small = make_png(1, 20), make_png(2, 9)
    source = write(
        tmp_path / "in",
        {
            "a": (big, "一只猫"),
            "b": (big, "猫" * 15 + "@"),
            "c": (small, "猫@"),
            "d": (small, "一只猫"),
            "e": (big, "一只猫"),
            "f": (big, "两只猫"),
            "g": (b"", "三只猫"),
            "h": (big, " "),
        },
    )
    out = tmp_path / "out"
    report = filter_pairs(source, out, FilterOptions(min_side=10))
    assert {key: line["reason"] for key, line in rejects(out).items()} == {
        "b": "too_long",
        "c": "special_characters",
        "d": "too_small",
        "e": "duplicate",
        "g": "unreadable_picture",
        "h": "empty_caption",
    }
    assert rejects(out)["c"] == {"key": "c", "split": "train", "reason": "special_characters", "caption": "猫@"}
    assert rejects(out)["g"]["caption"] is None
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["kept"] == 2 and report["read"] == 8
    assert list(report["rejected"].items()) == [
        *(("empty_caption", 1), ("unreadable_picture", 1), ("too_long", 1), ("no_noun", 0)),
        *(("special_characters", 1), ("too_small", 1), ("duplicate", 1), ("no_score", 0), ("low_similarity", 0)),
    ]
    assert report["not_checked"] == ["no_noun", "no_score", "low_similarity"]
    assert report["options"]["min_side"] == 10 and report["words"] == "characters"
    assert report["versions"].keys() == {"megatron_vilg", "python", "pillow", "unicode"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert [record.key for record in read_records(out)] == ["a", "f"]


def test_splits_order_fields_and_bytes_stay(tmp_path: Path, make_shards: Shards) -> None:
    source = make_shards(tmp_path / "in", {"train": 7, "val-pairs": 3, "val2017": 2}, per_shard=4)
    report = filter_pairs(source, tmp_path / "out", FilterOptions(duplicates="keep"))
    kept = {split: counts["kept"] for split, counts in report["splits"].items()}
    assert kept == {"train": 7, "val-pairs": 3, "val2017": 2}
    assert as_read(tmp_path / "out") == as_read(source)
    for name in ("val-pairs-00000.tar", "val2017-00000.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    again = filter_pairs(tmp_path / "out", tmp_path / "again", FilterOptions(duplicates="keep"))
    assert again["kept"] == 12 and not any(again["rejected"].values())


@pytest.mark.parametrize("kind", ["folder", "tar", "jsonl"])
def test_a_source_without_splits_is_divided_later_as_before(kind: str, tmp_path: Path, make_folder: Folder) -> None:
    source = make_folder(tmp_path / "in", 30)
    if kind == "tar":
        filter_pairs(source, tmp_path / "tars", FilterOptions())
        source = tmp_path / "tars"
    elif kind == "jsonl":
        lines = [{"image": f"in/p{i:03d}.png", "caption": f"第{i}张图"} for i in range(30)]
        source = tmp_path / "pairs.jsonl"
        source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    filter_pairs(source, tmp_path / "out", FilterOptions(duplicates="keep"))
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["pairs-00000.tar"]
    for split in ("train", "val"):
        before = [record.key for record in read_records(source, split, val_share=0.3)]
        assert [record.key for record in read_records(tmp_path / "out", split, val_share=0.3)] == before != []


def test_splits_with_a_dot_and_of_training_alone(tmp_path: Path, make_png: Png) -> None:
    source = write(tmp_path / "in", {"train/a": (make_png(0), "一"), "val.hard/b": (make_png(1), "二")})
    filter_pairs(source, tmp_path / "out", FilterOptions())
    assert [row[:2] for row in as_read(tmp_path / "out")] == [("train", "train/a"), ("val.hard", "val.hard/b")]
    source = write(tmp_path / "alone", {"train/a": (make_png(0), "一")})
    filter_pairs(source, tmp_path / "alone-out", FilterOptions())
    assert (tmp_path / "alone-out" / "train-00000.tar").is_file()


@pytest.mark.parametrize(("duplicates", "kept"), [("pairs", "abe"), ("pictures", "ae"), ("keep", "abcde")])
def test_duplicates(duplicates: str, kept: str, tmp_path: Path, make_png: Png) -> None:
    with Image.open(io.BytesIO(make_png(1))) as image:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)  # the same pixels in other bytes
    pairs = {"a": (make_png(1), "一"), "b": (make_png(1), "二"), "c": (make_png(1), "一"), "d": (file.getvalue(), "一")}
    source = write(tmp_path / "in", pairs | {"e": (make_png(1, 13), "一")})
    filter_pairs(source, tmp_path / "out", FilterOptions(duplicates=duplicates))
    assert [record.key for record in read_records(tmp_path / "out")] == list(kept)


def test_a_copy_in_another_split_is_a_duplicate(tmp_path: Path, make_png: Png) -> None:
    source = write(tmp_path / "in", {"train/a": (make_png(1), "一"), "val/b": (make_png(1), "一")})
    report = filter_pairs(source, tmp_path / "out", FilterOptions())
    assert report["splits"] == {
        "train": {"kept": 1, "rejected": {}},
        "val": {"kept": 0, "rejected": {"duplicate": 1}},
    }


def test_nouns(tmp_path: Path, make_png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nouns:
        name, knows_nouns = "test 1", True

        def words(self, caption: str) -> Sequence[Word]:
            return [Word(letter, letter == "猫") for letter in caption]

    source = write(tmp_path / "in", {"a": (make_png(1), "好"), "b": (make_png(2), "好猫")})
    with pytest.raises(MissingPackageError, match=r"megatron_vilg\[filter\]"):
        filter_pairs(source, tmp_path / "none", FilterOptions(require_noun="yes"))
    monkeypatch.setattr(filtering, "choose_segmenter", lambda _: Nouns())
    report = filter_pairs(source, tmp_path / "out", FilterOptions())
    assert report["rejected"]["no_noun"] == 1 and "no_noun" not in report["not_checked"]
    assert report["words"] == "test 1" and rejects(tmp_path / "out")["a"]["reason"] == "no_noun"
    report = filter_pairs(source, tmp_path / "all", FilterOptions(require_noun="no"))
    assert report["kept"] == 2 and "no_noun" in report["not_checked"]


def test_similarity_from_a_file(tmp_path: Path, make_folder: Folder) -> None:
    source = make_folder(tmp_path / "in", 4)
    file = tmp_path / "s.jsonl"
    file.write_text("\n".join(f'{{"id": "p{i:03d}", "score": {score}}}' for i, score in enumerate((0.5, 0.51, 0.9))))
    report = filter_pairs(source, tmp_path / "out", FilterOptions(), Similarity(ScoreFile(file), name=str(file)))
    assert [record.key for record in read_records(tmp_path / "out")] == ["p001", "p002"]
    found = rejects(tmp_path / "out")
    assert (found["p000"]["reason"], found["p000"]["score"]) == ("low_similarity", 0.5)
    assert found["p003"]["reason"] == "no_score" and "score" not in found["p003"]
    assert report["not_checked"] == ["no_noun", "too_small"] and report["options"]["similarity"] == str(file)
    file.write_text('{"id": "p1", "score": 1}')
    with pytest.raises(DataError, match=r"has none of 4 pairs; it names pairs like 'p1' and the source like 'p003'"):
        filter_pairs(source, tmp_path / "other", FilterOptions(), Similarity(ScoreFile(file)))
    assert not (tmp_path / "other").exists()


def test_a_scorer_gets_few_large_pictures_at_a_time(
    tmp_path: Path, make_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def score(pairs: Sequence[tuple[Image.Image, str]]) -> list[float]:
        sizes.append(len(pairs))
        return [1.0] * len(pairs)

    monkeypatch.setattr(filtering, "_PIXELS_AT_ONCE", 5 * 12 * 12 - 1)  # four of the fixture's pictures
    source, options = make_shards(tmp_path / "in", {"train": 10}), FilterOptions(duplicates="keep", max_words=0)
    report = filter_pairs(source, tmp_path / "out", options, Similarity(scorer=score, name="m:f"))
    assert sizes == [4, 4, 2] and report["kept"] == 10
    assert [r.key for r in read_records(tmp_path / "out")] == [r.key for r in read_records(source)]
    monkeypatch.setattr(filtering, "_PIXELS_AT_ONCE", 1)  # a picture above the limit comes alone
    sizes.clear()
    filter_pairs(source, tmp_path / "one", options, Similarity(scorer=score, name="m:f"))
    assert sizes == [1] * 10


def test_similarity_by_a_function_in_batches(tmp_path: Path, make_shards: Shards) -> None:
    source = make_shards(tmp_path / "in", {"train": 5, "val": 3})
    calls: list[list[str]] = []

    def scorer(pairs: Sequence[tuple[Image.Image, str]]) -> list[float]:
        assert all(picture.mode == "RGB" and picture.size == (12, 12) for picture, _ in pairs)
        calls.append([caption for _, caption in pairs])
        return [0.4 if caption.endswith("2") else 0.6 for _, caption in pairs]

    options = FilterOptions(score_batch=3, duplicates="keep")
    report = filter_pairs(source, tmp_path / "out", options, Similarity(scorer=scorer, name="m:f"))
    assert [len(call) for call in calls] == [3, 3, 2]
    assert report["splits"] == {
        "train": {"kept": 4, "rejected": {"low_similarity": 1}},
        "val": {"kept": 2, "rejected": {"low_similarity": 1}},
    }
    assert [row[1] for row in as_read(tmp_path / "out")] == [
        *("train000", "train001", "train003", "train004", "val000", "val001")
    ]


def test_other_wordings_obey_the_rules_on_captions(tmp_path: Path, make_png: Png) -> None:
    source = write(tmp_path / "in", {"a": (make_png(1), "一"), "b": (make_png(2), "二")})
    (source / "a.json").write_text(json.dumps({"alternates": ["猫", "猫@", "猫" * 15], "x": "\ud800"}))
    (source / "b.json").write_text(json.dumps({"alternates": ["猫", 3]}))
    report = filter_pairs(source, tmp_path / "out", FilterOptions())
    first, second = read_records(tmp_path / "out")
    assert first.fields == {"alternates": ["猫"], "x": "\ud800"} and second.fields == {"alternates": ["猫", 3]}
    assert report["alternates_dropped"] == 2


def test_picture_files_stay_and_others_become_png(tmp_path: Path) -> None:
    images = {}
    for kind in ("JPEG", "WEBP", "BMP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(file, kind)
        images[kind] = file.getvalue()
    source = write(tmp_path / "in", {kind: (data, "红") for kind, data in images.items()})
    filter_pairs(source, tmp_path / "out", FilterOptions(duplicates="keep"))
    found = {record.key: record.image for record in read_records(tmp_path / "out")}
    assert found["JPEG"] == images["JPEG"] and found["WEBP"] == images["WEBP"]
    with Image.open(io.BytesIO(found["BMP"])) as opened:
        assert opened.format == "PNG" and opened.getpixel((0, 0)) == (255, 0, 0)


def test_odd_keys(tmp_path: Path, make_png: Png) -> None:
    odd = ["a/b.v1", "a/b.v2", "图/" + "长" * 120, "/abs/x", "x/.hidden", "y/", "n\0ul"]
    lines = []
    for i, key in enumerate(odd):
        (tmp_path / f"{i}.png").write_bytes(make_png(i))
        lines.append(json.dumps({"key": key, "image": f"{i}.png", "caption": f"图{i}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    report = filter_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", FilterOptions())
    assert report["kept"] == len(odd)
    found = list(read_records(tmp_path / "out"))
    assert [record.caption for record in found] == [f"图{i}" for i in range(len(odd))]
    assert [record.key for record in found] == odd[:4] + [f"pair-{i:08d}" for i in (4, 5, 6)]
    assert [record.fields["key"] for record in found] == odd


def test_a_cut_tar_is_listed(tmp_path: Path, make_shards: Shards) -> None:
    source = make_shards(tmp_path / "in", {"train": 3, "val": 3})
    tar = source / "val-00000.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    report = filter_pairs(source, tmp_path / "out", FilterOptions())
    assert report["rejected"]["truncated_tar"] == 1
    (line,) = [line for line in rejects(tmp_path / "out").values() if line["reason"] == "truncated_tar"]
    assert line["split"] == "val" and line["key"].startswith("val-00000.tar after val")


def test_nothing_kept_is_no_error(tmp_path: Path, make_folder: Folder) -> None:
    report = filter_pairs(make_folder(tmp_path / "in", 2), tmp_path / "out", FilterOptions(min_side=100))
    assert report["kept"] == 0 and report["splits"] == {"train": {"kept": 0, "rejected": {"too_small": 2}}}


def test_no_usable_pair(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a": (b"", "一")})
    with pytest.raises(DataError, match=r"no usable pair at .*in' \(1 unreadable picture: a\)"):
        filter_pairs(tmp_path / "in", tmp_path / "out", FilterOptions())
    with pytest.raises(DataError, match="found no pairs at"):
        filter_pairs(tmp_path / "none", tmp_path / "out", FilterOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_places_of_the_output(tmp_path: Path, make_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "in", 2)
    with pytest.raises(ConfigError, match=r"--output=.*lies inside --input="):
        filter_pairs(source, source / "out", FilterOptions())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(DataError, match=r"--output=.*full: cannot be written .*; nothing was left there"):
        filter_pairs(source, tmp_path / "full", FilterOptions())
    (tmp_path / "empty").mkdir()
    assert filter_pairs(source, tmp_path / "empty", FilterOptions())["kept"] == 2
    monkeypatch.setattr(filtering, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match=r"--output=.*new: cannot be written \(No space left\)"):
        filter_pairs(source, tmp_path / "new", FilterOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "in"]


def test_wrong_options() -> None:
    with pytest.raises(ConfigError) as caught:
        FilterOptions(-1, "maybe", "drop", -2, "all", float("nan"), 0)
    assert caught.value.problems == (
        "--require-noun=maybe: works auto, yes, no",
        "--special-characters=drop: works reject, keep",
        "--duplicates=all: works pairs, pictures, keep",
        "--max-words=-1: works 0 or more",
        "--min-side=-2: works 0 or more",
        "--score-batch=0: works 1 or more",
        "--min-similarity=nan: works a number, such as 0.5",
    )
