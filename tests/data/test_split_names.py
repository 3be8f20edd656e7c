from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.split_names import split_from_name

Folder = Callable[[Path, int], Path]
Shards = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000", "train"),
        ("train-scenes-00001", "train"),
        ("train2017-00000", "train"),
        ("trainset", "train"),
        ("val-pairs-00000", "val-pairs"),
        ("validation_01", "val"),
        ("validation-set", "val"),
        ("validation-coco-00000", "validation-coco"),
        ("valid-zh-00000", "valid-zh"),
        ("dev-00000-of-00010", "val"),
        ("dev-clean-00000", "dev-clean"),
        ("val2017-00000", "val2017"),
        ("val2017", "val"),
        ("Test", "test"),
        ("test2017-00000", "test2017"),
        ("testing", "test"),
        ("testset-00000", "test"),
        ("evaluation", "eval"),
        ("eval-hard", "eval-hard"),
        ("heldout", "heldout"),
        ("held-out", "heldout"),
        ("hold_out-00003", "heldout"),
        ("holdout", "heldout"),
        ("val 猫/狗", "val-猫-狗"),
        ("00017", None),
        ("laion-00001", None),
        ("trains", None),
        ("valley-00000", None),
        ("values", None),
        ("testament", None),
        ("device", None),
        ("evaluate", None),
        ("contest", None),
    ],
)
def test_split_from_name(name: str, split: str | None) -> None:
    assert split_from_name(name) == split


def test_held_out_shards_with_longer_names_are_not_trained_on(tmp_path: Path, make_shards: Shards) -> None:
    root = make_shards(tmp_path, {"train": 4, "validation-coco": 2, "val2017": 2, "held-out": 1})
    assert [r.key for r in read_records(root, "train")] == [f"train{i:03d}" for i in range(4)]
    assert list(find_records(root)) == ["train", "heldout", "val2017", "validation-coco"]


def test_names_beside_named_splits_are_trained_on_with_a_warning(
    tmp_path: Path, make_shards: Shards, make_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_shards(tmp_path / "tars", {"train": 2, "val": 1, "valley": 1})
    make_folder(tmp_path / "d" / "test", 2)
    make_folder(tmp_path / "d" / "testament", 2)
    listed = tmp_path / "pairs.jsonl"
    listed.write_text('{"image": "a", "split": "val"}\n{"image": "b"}\n{"image": "c", "split": "restval"}')
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert len(find_records(shards)["train"]) == 2
        assert "1 of 3 names say no split and are trained on ('valley-00000.tar'), beside the splits train, val" in (
            caplog.text
        )
        assert list(find_records(tmp_path / "d")) == ["train", "test"]
        assert "trained on ('testament/'), beside the splits test" in caplog.text
        assert list(find_records(listed)) == ["train", "val"]
        assert "2 of 3 names say no split and are trained on ('lines without a split', 'restval')" in caplog.text


def test_names_that_only_contain_a_split_are_warned_of(
    tmp_path: Path, make_shards: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_shards(tmp_path, {"cc3m-training": 2, "cc3m-validation": 1, "latest": 1})
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert list(find_records(root)) == ["train"]
    assert "1 of 3 names look held out but do not start so, and are trained on ('cc3m-validation-00000.tar')" in (
        caplog.text
    )


def test_plain_names_are_not_warned_of(tmp_path: Path, make_shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        find_records(make_shards(tmp_path / "a", {"valley": 2, "laion": 1}), val_share=0.1)
        find_records(make_shards(tmp_path / "b", {"train": 2, "val-pairs": 1, "val-concepts": 1, "train-scenes": 1}))
    assert not caplog.text


def test_folders_below_the_source_name_splits_of_tars_and_the_source_does_not(
    tmp_path: Path, make_shards: Shards
) -> None:
    make_shards(tmp_path / "test" / "train", {"a": 2})
    make_shards(tmp_path / "test" / "val", {"b": 1})
    make_shards(tmp_path / "test" / "val" / "more", {"c": 1})
    for source in (tmp_path / "test", f"{tmp_path}/test/*/*.tar", f"{tmp_path}/*/*/*.tar"):
        assert list(find_records(source)) == ["train", "val"], source
        assert [r.key for r in read_records(source, "train")] == ["a000", "a001"], source
    assert [r.key for r in read_records(tmp_path / "test", "val")] == ["b000", "c000"]
    for source in (tmp_path / "test" / "val" / "more", tmp_path / "test" / "val" / "b-00000.tar"):
        assert list(find_records(source)) == ["train"]


def test_a_split_of_a_line_becomes_a_file_name(tmp_path: Path) -> None:
    listed = tmp_path / "pairs.jsonl"
    listed.write_text(json.dumps({"image": "a", "split": "val/../x"}) + "\n" + json.dumps({"split": "val\udc80x"}))
    assert list(find_records(listed)) == ["val-..-x", "val-udc80x"]


def test_folders_name_splits_of_pictures_at_any_depth(
    tmp_path: Path, make_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("coco/train/cats", "coco/val/cats", "more/Test"):
        make_folder(tmp_path / folder, 2)
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert list(find_records(tmp_path, val_share=0.5)) == ["train", "test", "val"]
        assert [r.key for r in read_records(tmp_path, "val")] == ["coco/val/cats/p000", "coco/val/cats/p001"]
        assert [r.key for r in read_records(tmp_path, "test")] == ["more/Test/p000", "more/Test/p001"]
        assert not caplog.text
        make_folder(tmp_path / "coco" / "extra" / "cats", 1)
        assert len(list(read_records(tmp_path, "train"))) == 3
    assert "1 of 4 names say no split and are trained on ('coco/extra/cats/'), beside the splits test, train, val" in (
        caplog.text
    )


def test_kinds_of_things_that_are_called_like_splits_stay_in_theirs(
    tmp_path: Path, make_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("train/test tube", "train/train", "val/train"):
        make_folder(tmp_path / folder, 1)
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert list(find_records(tmp_path)) == ["train", "val"]
    assert [r.key for r in read_records(tmp_path, "val")] == ["val/train/p000"]
    assert "2 of 3 folders are called like one split and lie in another" in caplog.text
    assert "('train/test tube in train', 'val/train in val')" in caplog.text


def test_names_of_pictures_say_no_split_and_a_warning_says_so(
    tmp_path: Path, make_png: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    def write(folder: str, *names: str) -> Path:
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.png").write_bytes(make_png(1))
            (tmp_path / folder / f"{name}.txt").write_text("x")
        return tmp_path / folder

    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        find_records(write("plain", "train-0", "cat", "valley"), val_share=0.5)
        write("named/train", "val-0")
        assert list(find_records(tmp_path / "named")) == ["train"]
        assert not caplog.text
        source = write("flat", "train-0", "train-1", "val-0", "COCO_val2014_7")
        assert list(find_records(source)) == ["train"]
    assert (
        "the names of 2 of 4 pictures look held out ('COCO_val2014_7', 'val-0'), but those of pictures say no split"
        in (caplog.text)
    )
