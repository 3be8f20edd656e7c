from __future__ import annotations

import gzip
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vilg.data.records import ReadReport, find_records, read_records
from megatron_vilg.data.shards import ShardWriter
from megatron_vilg.data.split_names import hash_split
from megatron_vilg.errors import DataError

Folder = Callable[[Path, int], Path]
Shards = Callable[..., Path]
Png = Callable[..., bytes]


def keys(path: Path, split: str | None = None, **options: object) -> list[str]:
    return [record.key for record in read_records(path, split, **options)]  # type: ignore[arg-type]


def test_folder_in_key_order_with_fields(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", 12)
    (root / "p003.json").write_text('{"alternates": ["另一种", "另一种", ""], "concept": "x"}', encoding="utf-8")
    records = list(read_records(root))
    assert [r.key for r in records] == [f"p{i:03d}" for i in range(12)]
    assert records[3].caption == "红色的第3张图"
    assert records[3].alternates == ["另一种"] and records[3].fields["concept"] == "x"
    assert records[0].decode().size == (12, 12)


def test_all_kinds_give_the_same_pairs(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", 5)
    listed = tmp_path / "pairs.jsonl"
    lines = [{"image": f"d/p{i:03d}.png", "caption": f"红色的第{i}张图", "key": f"p{i:03d}"} for i in range(5)]
    listed.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    with ShardWriter(tmp_path / "t", "00000") as writer:
        for record in read_records(root):
            writer.add(record.key, record.image, record.caption, {})
    tar = tmp_path / "t" / "00000-00000.tar"
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    want = [(r.key, r.image, r.caption) for r in read_records(root)]
    for source in (listed, tar, tar.parent, tmp_path / "t" / "*.tar", tmp_path / "z"):
        assert [(r.key, r.image, r.caption) for r in read_records(source)] == want, source


def test_jsonl_fields_absolute_paths_and_other_names(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", 2)
    listed = tmp_path / "metadata.jsonl"
    line = {"file_name": str(root / "p001.png"), "text": "一张图", "alternates": ["图"], "split": "validation"}
    listed.write_text(json.dumps(line), encoding="utf-8")
    (record,) = read_records(listed, "val")
    assert record.caption == "一张图" and record.alternates == ["图"] and "text" not in record.fields


def test_caption_of_json_where_txt_is_missing(tmp_path: Path, make_png: Png) -> None:
    (tmp_path / "a.png").write_bytes(make_png(0))
    (tmp_path / "a.json").write_text('{"caption": "  一\\n 二 "}', encoding="utf-8")
    (record,) = read_records(tmp_path)
    assert record.caption == "一 二"


def test_bad_records_are_counted_and_named(
    tmp_path: Path, make_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path, 40)
    (root / "p004.png").write_bytes((root / "p004.png").read_bytes()[:50])
    (root / "p005.txt").write_text(" \n ", encoding="utf-8")
    (root / "p006.txt").unlink()
    (root / "p007.png").unlink()
    (root / "p008.json").write_text("{", encoding="utf-8")
    report = ReadReport()
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        got = [r.key for r in read_records(root, report=report)]
    assert len(got) == 35 and report.read == 35
    assert report.names == {
        "unreadable picture": ["p004"],
        "empty caption": ["p005"],
        "missing caption": ["p006"],
        "missing picture": ["p007"],
        "broken json": ["p008"],
    }
    assert report.num_skipped == 5
    assert "skipped p004: unreadable picture" in caplog.text
    assert ReadReport.from_json(json.loads(json.dumps(report.to_json()))) == report


@pytest.mark.parametrize("cut", ["data", "header", "border"])
def test_truncated_tar_keeps_what_is_whole(tmp_path: Path, make_shards: Shards, cut: str) -> None:
    root = make_shards(tmp_path, {"train": 30}, per_shard=10)
    shard = root / "train-00001.tar"
    with tarfile.open(shard) as tar:
        member = tar.getmembers()[12]  # the fifth picture
    end = {"data": member.offset_data + 20, "header": member.offset + 100, "border": member.offset}[cut]
    shard.write_bytes(shard.read_bytes()[:end])
    report = ReadReport()
    got = [r.key for r in read_records(root, report=report)]
    assert [k for k in got if k < "train010"] == [f"train{i:03d}" for i in range(10)]
    assert "train012" in got and "train014" not in got and "train029" in got
    assert report.skipped == {"truncated tar": 1}
    assert report.names["truncated tar"][0].startswith("train-00001.tar")


def test_garbage_instead_of_a_tar(tmp_path: Path, make_shards: Shards) -> None:
    root = make_shards(tmp_path, {"train": 30}, per_shard=10)
    (root / "train-00001.tar").write_bytes(b"no tar at all" * 100)
    report = ReadReport()
    assert len(list(read_records(root, report=report))) == 20
    assert report.skipped == {"truncated tar": 1}


def test_too_many_bad_records_stop(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path, 20)
    for i in range(6):
        (root / f"p{i:03d}.png").write_bytes(b"x")
    message = r"data\.max_bad_share = 0\.01: 6 of 20 records .*unreadable picture: p000.*data\.max_bad_share=0\.31$"
    with pytest.raises(DataError, match=message):
        keys(root)
    assert len(keys(root, max_bad_share=0.5)) == 14


def test_a_share_of_zero_forgives_nothing(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path, 20)
    (root / "p001.txt").write_text("", encoding="utf-8")
    assert len(keys(root)) == 19
    with pytest.raises(DataError, match="1 of 20"):
        keys(root, max_bad_share=0.0)


def test_large_sets_stop_early(tmp_path: Path) -> None:
    report = ReadReport(read=2000)
    for i in range(21):
        report.skip("empty caption", str(i))
    with pytest.raises(DataError, match="21 of 2021"):
        report.check("x", 0.01)
    assert len(report.names["empty caption"]) == 10


def test_nothing_there_says_what_works(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "*.tar"):
        with pytest.raises(DataError, match=r"found no pairs at .* \.jsonl file"):
            keys(path)


def test_no_usable_pair(tmp_path: Path, make_png: Png) -> None:
    (tmp_path / "a.png").write_bytes(make_png(0))
    with pytest.raises(DataError, match=r"max_bad_share.*1 of 1 records.*Repair them: none is good$"):
        keys(tmp_path)
    with pytest.raises(DataError, match=r"no usable pair .*missing caption: a"):
        keys(tmp_path, max_bad_share=1.0)


def test_splits_from_shard_names(tmp_path: Path, make_shards: Shards) -> None:
    root = make_shards(tmp_path, {"val-pairs": 3, "train": 4, "val-concepts": 2, "train-scenes": 1})
    assert list(find_records(root)) == ["train", "val-concepts", "val-pairs"]
    assert keys(root, "val-pairs") == ["val-pairs000", "val-pairs001", "val-pairs002"]
    assert len(keys(root, "train")) == 5
    with pytest.raises(DataError, match="has no split 'test'; it has train, val-concepts, val-pairs"):
        keys(root, "test")


def test_splits_from_folders(tmp_path: Path, make_folder: Folder) -> None:
    make_folder(tmp_path / "train", 2)
    make_folder(tmp_path / "valid", 3)
    assert keys(tmp_path, "val") == ["valid/p000", "valid/p001", "valid/p002"]


def test_hash_split_is_disjoint_complete_and_alike_for_all_kinds(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", 60)
    with ShardWriter(tmp_path / "t", "x") as writer:
        for record in read_records(root):
            writer.add(record.key, record.image, record.caption, {})
    for source in (root, tmp_path / "t"):
        train, val = (keys(source, split, val_share=0.2) for split in ("train", "val"))
        assert not set(train) & set(val) and len(train) + len(val) == 60
        assert val == [k for k in sorted(train + val) if hash_split(k, 0.2) == "val"]
        assert 4 < len(val) < 22
    assert list(find_records(root, val_share=0.0)) == ["train"]


def test_parts_cover_the_source_and_fingerprints_notice_changes(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path, 7)
    parts = find_records(root, part_size=3)["train"]
    report = ReadReport()
    assert [[r.key for r in p.read(report)] for p in parts] == [
        ["p000", "p001", "p002"],
        ["p003", "p004", "p005"],
        ["p006"],
    ]
    before = [(p.stamp, p.fingerprint) for p in parts]
    (root / "p004.txt").write_text("一句更长的话", encoding="utf-8")
    after = [(p.stamp, p.fingerprint) for p in find_records(root, part_size=3)["train"]]
    assert before[0] == after[0] and before[2] == after[2]
    assert before[1][0] != after[1][0] and before[1][1] != after[1][1]


def test_captions_alone_are_read_without_pictures(tmp_path: Path, make_folder: Folder, make_shards: Shards) -> None:
    root = make_folder(tmp_path / "d", 3)
    (root / "p001.png").write_bytes(b"broken")
    make_shards(tmp_path / "t", {"train": 2})
    for source, count in ((root, 3), (tmp_path / "t", 2)):
        records = list(read_records(source, with_images=False))
        assert len(records) == count and all(r.image == b"" and r.caption for r in records)


def test_nested_keys_in_tars_and_strange_members(tmp_path: Path, make_png: Png) -> None:
    source = tmp_path / "src"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a.JPG").write_bytes(make_png(1))
    (source / "sub" / "a.txt").write_text("一", encoding="utf-8")
    (source / "sub" / "readme.md").write_text("x", encoding="utf-8")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(source, arcname=".")
    (record,) = read_records(tmp_path / "x.tar")
    assert record.key == "./sub/a"


def test_shards_are_equal_byte_for_byte(tmp_path: Path, make_shards: Shards) -> None:
    first = make_shards(tmp_path / "a", {"train": 5}, per_shard=2)
    second = make_shards(tmp_path / "b", {"train": 5}, per_shard=2)
    names = sorted(p.name for p in first.iterdir())
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_an_error_leaves_no_half_shard(tmp_path: Path, make_png: Png) -> None:
    writer = ShardWriter(tmp_path, "train")
    writer.add("a", make_png(0), "一", {})
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
