from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_vilg.data.records import read_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.pairs import Kind, hold_against_training, read_eval_set
from megatron_vilg.evaluate.retrieval import Label
from tests.train.token_caches import cache_of, write_cache


def add(folder: Path, key: str, **fields: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (len(key) * 9 % 255, 40, 90)).save(buffer, format="PNG")
    (folder / f"{key}.png").write_bytes(buffer.getvalue())
    (folder / f"{key}.txt").write_text(f"{key}的说明", encoding="utf-8")
    if fields:
        (folder / f"{key}.json").write_text(json.dumps(fields), encoding="utf-8")


def test_splits_and_fields_say_what_a_pair_is(tmp_path: Path) -> None:
    named = {"label_zh": "熊", "label_en": "bear", "style_zh": "卡通风格"}
    add(tmp_path / "train", "a", concept="1f43b", style="noto", **named)
    add(tmp_path / "val-pairs", "b", concept="1f43b", style="openmoji")
    add(tmp_path / "val-concepts", "c", concept="1f431", style="noto")
    pairs, scenes = read_eval_set(tmp_path, 8)
    assert len(scenes) == 0
    assert {pair.caption[0]: pair.kind for pair in pairs.pairs} == {
        "a": Kind.TRAINED, "b": Kind.UNSEEN, "c": Kind.NEW_CONCEPT,
    }  # fmt: skip
    (trained,) = pairs.of_kind(Kind.TRAINED)
    assert pairs.pairs[trained].label == Label("1f43b", "noto")
    assert pairs.pairs[trained].note == "bear · noto"
    assert pairs.pairs[trained].concept_name == "熊"
    assert pairs.pixels([0, 2]).shape == (2, 3, 8, 8)
    assert pairs.counts() == {"trained": 1, "unseen": 1, "held_out_concepts": 1, "concepts": 1, "styles": 1}
    assert pairs.captions(pairs.of_kind(Kind.UNSEEN)) == ["b的说明"]


def test_a_set_that_names_no_concepts(tmp_path: Path) -> None:
    add(tmp_path / "train", "a")
    add(tmp_path / "val", "b")
    pairs, scenes = read_eval_set(tmp_path, 8)
    assert len(scenes) == 0
    assert [pair.kind for pair in pairs.pairs] == [Kind.TRAINED, Kind.UNSEEN]
    assert pairs.labelled([0, 1]) == []


def test_scenes_are_kept_apart(tmp_path: Path) -> None:
    add(tmp_path / "train", "a", concept="1f43b", style="noto")
    add(tmp_path / "train", "b", style="noto", scene={"kind": "count", "count": 2, "background": "红色"})
    add(tmp_path / "val-scenes", "c", style="noto", scene={"kind": "size", "size": "很大", "background": "红色"})
    pairs, scenes = read_eval_set(tmp_path, 8)
    assert [pair.caption for pair in pairs.pairs] == ["a的说明"]
    assert [pair.kind for pair in scenes.pairs] == [Kind.TRAINED, Kind.UNSEEN]
    assert scenes.pairs[0].scene == {"kind": "count", "count": 2, "background": "红色"}
    assert scenes.pixels([0, 1]).shape == (2, 3, 8, 8)


def test_held_out_pairs_that_were_trained_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The demo's keys repeat in every split, so a key alone says nothing; a path above the key may differ."""
    write_cache(tmp_path / "tokens", {"train": 4, "val": 2})
    same = read_eval_set(tmp_path / "tokens-pairs", 8)
    assert hold_against_training(*same, "same", tmp_path / "tokens", 0.0) == same
    other = tmp_path / "other"
    add(other / "train", "new")
    for number in range(3):
        add(other / "val" / "deeper", f"train{number}")
        (other / "val" / "deeper" / f"train{number}.txt").write_text(f"图{number}", encoding="utf-8")
    pairs = read_eval_set(other, 8)
    with pytest.raises(DataError, match=r"--data=there: 3 of 3 held-out pairs are among the training pairs .*deeper"):
        hold_against_training(*pairs, "there", tmp_path / "tokens", 0.5)
    hold_against_training(*pairs, "there", tmp_path / "tokens", 1.0)
    assert "3 of 3 held-out pairs" in caplog.text


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """Folders of classes in every split: names of files and captions repeat, as in ``train/apple/0.png``."""
    for split, count in counts.items():
        for name, caption in (("apple", "红苹果"), ("cat", "猫")):
            for number in range(count):
                add(folder / split / name, str(number))
                (folder / split / name / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def test_files_of_classes_that_are_called_alike_are_different_pairs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = write_classes(tmp_path / "own", {"train": 5, "val": 2})
    tokens = tmp_path / "tokens"
    cache_of(tokens, own, ["红苹果", "猫"])
    same = read_eval_set(own, 8)
    assert hold_against_training(*same, "own", tokens, 0.0) == same
    assert same[0].counts()["unseen"] == 4

    # The same pairs where their names say another split: of val/cat/0 to 1 nobody can tell, of 2 to 4 one can.
    swapped = tmp_path / "swapped"
    shutil.copytree(own / "train", swapped / "val")
    shutil.copytree(own / "val", swapped / "train")
    with pytest.raises(DataError, match=r"6 of 10 held-out pairs are among the training pairs .*val/apple/2, val/app"):
        hold_against_training(*read_eval_set(swapped, 8), "swapped", tokens, 0.01)

    # One of the folders alone, whose pairs are split by the hash of another path now: apple/0 may be either.
    below, _ = read_eval_set(own / "train", 8, val_share=0.3)
    assert {pair.key for pair in below.pairs} == {f"{name}/{n}" for name in ("apple", "cat") for n in range(5)}
    count = below.counts()["unseen"]
    assert count > 0
    with pytest.raises(DataError, match=f"{count} of {count} held-out pairs are among the training pairs"):
        hold_against_training(below, below.subset([]), "below", tokens, 0.01)

    grown = write_classes(shutil.copytree(own, tmp_path / "grown"), {"train": 6})
    (grown / "train" / "cat" / "1.png").unlink()
    (grown / "train" / "cat" / "1.txt").unlink()
    with pytest.raises(DataError, match=r"2 of 11 training pairs .* the 10 pairs in .*, and 1 of those are not in the"):
        hold_against_training(*read_eval_set(grown, 8), "grown", tokens, 0.05)
    kept, _ = hold_against_training(*read_eval_set(grown, 8), "grown", tokens, 0.1)
    assert kept.counts()["trained"] == 9 and "train/apple/5, train/cat/5): they are left out" in caplog.text


def test_pairs_that_were_not_trained_are_no_training_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = tmp_path / "tokens"
    write_cache(tokens, {"train": 4, "val": 2})
    add(tmp_path / "odd" / "train", "new")
    add(tmp_path / "odd" / "train", "scene", style="noto", scene={"kind": "count", "count": 2, "background": "红色"})
    with pytest.raises(DataError) as caught:
        hold_against_training(*read_eval_set(tmp_path / "odd", 8), "odd", tokens, 0.01)
    assert str(caught.value) == (
        f"--data=odd: 2 of 2 training pairs are not among the 4 pairs in {tokens} that were trained (train/new, "
        "train/scene), and 4 of those are not in the data. Works: the very folder or file that `vilg train --data` "
        "had, to which pairs may have been added"
    )

    grown = shutil.copytree(tmp_path / "tokens-pairs", tmp_path / "grown")
    with ShardWriter(grown, "train-more") as writer:
        writer.add("later", (tmp_path / "odd" / "train" / "new.png").read_bytes(), "后来的图", {})
    with ShardWriter(grown, "val-more") as writer:
        writer.add("later", (tmp_path / "odd" / "train" / "new.png").read_bytes(), "没见过的图", {})
    pairs, _ = hold_against_training(*read_eval_set(grown, 8), "grown", tokens, 0.01)
    assert {kind: count for kind, count in pairs.counts().items() if count} == {"trained": 4, "unseen": 3}
    assert all(pair.caption != "后来的图" for pair in pairs.pairs) and pairs.pixels(range(7)).shape == (7, 3, 8, 8)
    assert "1 of 5 training pairs are not among the 4 pairs" in caplog.text and "(later): they are left" in caplog.text


def test_a_set_without_training_pairs_is_refused(tmp_path: Path) -> None:
    add(tmp_path / "val", "a")
    with pytest.raises(DataError, match="has no training pairs"):
        read_eval_set(tmp_path, 8)


def test_splits_without_pairs_are_no_error_and_bad_ones_count_for_the_whole_set(tmp_path: Path) -> None:
    for number in range(20):
        add(tmp_path / "src", f"k{number:02d}")
    with ShardWriter(tmp_path / "t", "laion") as writer:
        for record in read_records(tmp_path / "src"):
            writer.add(record.key, record.image, record.caption, {})
    pairs, _ = read_eval_set(tmp_path / "t", 8, val_share=1e-6)
    assert len(pairs.of_kind(Kind.TRAINED)) == 20 and not pairs.of_kind(Kind.UNSEEN)
    for number in range(20):
        add(tmp_path / "d" / "train", f"k{number:02d}")
    for key in ("a", "b"):
        add(tmp_path / "d" / "val", key)
    (tmp_path / "d" / "val" / "a.txt").write_bytes("红色的猫".encode("gbk"))
    pairs, _ = read_eval_set(tmp_path / "d", 8)
    assert len(pairs.of_kind(Kind.UNSEEN)) == 1
