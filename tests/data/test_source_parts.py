"""Sources as they come from elsewhere: other encodings, strange names, links, lists beside pictures."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vilg.data.records import ReadReport, find_records, read_records
from megatron_vilg.errors import DataError

Folder = Callable[[Path, int], Path]
Png = Callable[..., bytes]
CAPTION = "红色的猫"


def read(source: Path, **options: object) -> tuple[dict[str, str], ReadReport]:
    """Captions by key, and the report; any number of bad records is allowed."""
    report = ReadReport()
    records = read_records(source, report=report, max_bad_share=1.0, **options)  # type: ignore[arg-type]
    return {record.key: record.caption for record in records}, report


def write_tar(path: Path, files: dict[str, bytes], encoding: str = "utf-8") -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding=encoding) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


TEXTS = {
    "plain": CAPTION.encode(),
    "marked": codecs.BOM_UTF8 + CAPTION.encode(),
    "wide": CAPTION.encode("utf-16"),
    "wide_be": codecs.BOM_UTF16_BE + CAPTION.encode("utf-16-be"),
}
GARBLED = {
    "gbk": CAPTION.encode("gbk"),
    "latin": "rot, größer".encode("latin-1"),
    "wide_unmarked": "cat".encode("utf-16-le"),
    "cut": CAPTION.encode()[:-1],
}


@pytest.mark.parametrize("kind", ["folder", "tar", "json", "list"])
def test_captions_in_other_encodings_are_not_learned(tmp_path: Path, make_png: Png, kind: str) -> None:
    def as_json(data: bytes) -> bytes:
        head, tail = '{"caption": "', '"}'
        if data.startswith(codecs.BOM_UTF8):
            return codecs.BOM_UTF8 + head.encode() + data[3:] + tail.encode()
        for encoding, mark in (("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)):
            if data.startswith(mark):
                return mark + head.encode(encoding) + data[2:] + tail.encode(encoding)
        return head.encode() + data + tail.encode()

    good, bad = dict(TEXTS), dict(GARBLED)
    if kind == "list":  # its lines end where a byte says so, so they cannot be wide
        good, bad = {"plain": good["plain"]}, {"gbk": bad["gbk"], "cut": bad["cut"]}
    files = {}
    for key, text in (good | bad).items():
        files[f"{key}.png"] = make_png(1)
        files[f"{key}.json" if kind == "json" else f"{key}.txt"] = as_json(text) if kind == "json" else text
    source = tmp_path / "d"
    if kind == "tar":
        source = write_tar(tmp_path / "d.tar", files)
    else:
        source.mkdir()
        for name, data in files.items():
            if kind != "list" or name.endswith(".png"):
                (source / name).write_bytes(data)
    if kind == "list":
        source = tmp_path / "list.jsonl"
        lines = [f'{{"image": "d/{key}.png", "caption": "'.encode() + t + b'"}' for key, t in (good | bad).items()]
        source.write_bytes(b"\n".join(lines))
        good = {"d/plain": good["plain"]}
    got, report = read(source)
    assert got == dict.fromkeys(good, CAPTION)
    reason = "caption is not UTF-8" if kind in ("folder", "tar") else "json is not UTF-8"
    assert report.skipped == {reason: len(bad)} and len(report.names[reason]) == len(bad)


def test_half_characters_in_json_are_no_captions_and_do_not_stop_writing(
    tmp_path: Path, make_png: Png, make_folder: Folder, make_cache: object
) -> None:
    source = make_folder(tmp_path / "d", 12)
    (source / "x.png").write_bytes(make_png(1))
    (source / "x.json").write_text(r'{"caption": "\ud83d"}')
    (source / "p000.json").write_text(r'{"note": "\ud83d", "alternates": ["\ud83d", "\u7ea2"]}')
    got, report = read(source)
    assert report.names == {"caption is not UTF-8": ["x"]} and len(got) == 12
    assert make_cache.write(source, tmp_path / "c")  # type: ignore[attr-defined]
    first = json.loads((tmp_path / "c" / "train-00000.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["fields"]["note"] == "\ud83d"


def test_file_names_in_other_encodings_are_read(tmp_path: Path, make_png: Png, make_cache: object) -> None:
    name = "红猫".encode("gbk")
    folder = os.fsencode(tmp_path / "d") + b"/" + "图".encode("gbk")
    os.makedirs(folder)
    for suffix, data in ((b".png", make_png(1)), (b".txt", CAPTION.encode())):
        Path(os.fsdecode(folder + b"/" + name + suffix)).write_bytes(data)
    tar = write_tar(tmp_path / "x.tar", {"红猫.png": make_png(1), "红猫.txt": CAPTION.encode()}, encoding="gbk")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "tars-") + name))
    odd.mkdir()
    shutil.copy(tar, odd / "x.tar")
    key = name.decode("utf-8", errors="surrogateescape").encode("utf-8", errors="backslashreplace").decode()
    for source, keys in ((tmp_path / "d", None), (tar, [key]), (odd, [key])):
        for val_share in (0.0, 0.5):
            got, report = read(source, val_share=val_share)
            assert list(got.values()) == [CAPTION] and not report.skipped
            assert keys is None or list(got) == keys
            assert all(part.fingerprint for parts in find_records(source).values() for part in parts)
        assert make_cache.write(source, tmp_path / f"cache-{source.name.encode(errors='replace').hex()}")  # type: ignore[attr-defined]


def test_names_with_several_dots_in_tars_are_read_as_in_folders(tmp_path: Path, make_png: Png) -> None:
    names = ("apple.v1", "apple.v2", "pear", "plum.1.5")
    files = {f"{n}.{s}": d for n in names for s, d in (("png", make_png(1)), ("txt", n.encode()))}
    folder = tmp_path / "d"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    want, _ = read(folder)
    got, report = read(write_tar(tmp_path / "x.tar", files))
    assert got == want == {n: n for n in names} and not report.skipped


def test_further_members_of_a_sample_are_no_pairs_but_pairs_are(tmp_path: Path, make_png: Png) -> None:
    files = {
        "a.en.txt": b"cat", "a.png": make_png(1), "a.seg.png": make_png(2), "a.txt": b"a",
        "b.png": make_png(1), "b.txt": b"b", "b.v2.png": make_png(2), "b.v2.txt": b"b2",
        "c.seg.png": make_png(1), "d.en.txt": b"d", "e.cls": b"1",
    }  # fmt: skip
    got, report = read(write_tar(tmp_path / "x.tar", files))
    assert got == {"a": "a", "b": "b", "b.v2": "b2"}
    assert report.names == {"missing caption": ["c.seg"], "missing picture": ["d.en"]}


def test_a_tar_of_names_that_all_begin_alike_is_not_held_in_memory(tmp_path: Path, make_png: Png) -> None:
    files = {}
    for number in range(4):
        files |= {f"img.{number}.png": make_png(number), f"img.{number}.txt": b"x"}
    tar = write_tar(tmp_path / "x.tar", files)
    damaged = tar.read_bytes()[: 512 * 12]  # the third and fourth pair are lost, not those before them
    tar.write_bytes(damaged)
    got, report = read(tar)
    assert list(got) == ["img.0", "img.1", "img.2"][: len(got)] and len(got) >= 2
    assert report.skipped == {"truncated tar": 1}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_further_pictures_under_one_name_are_named_and_stop_nothing(
    tmp_path: Path, make_png: Png, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {}
    for number in range(6):
        for suffix in ("jpg", "png"):
            files[f"{number}.{suffix}"] = make_png(number if suffix == "png" else 100)
        files[f"{number}.txt"] = b"x"
    want = {f"{number}.jpg" for number in range(6)}
    source = tmp_path / "d"
    if kind == "tar":
        source = write_tar(tmp_path / "d.tar", files)
    else:
        files |= {"5.PNG": make_png(100)}
        want.add("5.PNG")
        source.mkdir()
        for name, data in files.items():
            (source / name).write_bytes(data)
    report = ReadReport()
    got = {r.key: r.image for r in read_records(source, report=report, max_bad_share=0.0)}
    assert got == {str(number): make_png(number) for number in range(6)}
    assert report.read == 6 and report.num_skipped == 0
    assert report.skipped == {"several pictures under one name": len(want)}
    assert set(report.names["several pictures under one name"]) == want
    assert f"read 6 pairs, skipped {len(want)} ({len(want)} several pictures under one name: 0.jpg, 1" in caplog.text
    # Each is counted in the split of its pair alone.
    report = ReadReport()
    list(read_records(source, report=report, val_share=0.5, with_images=False))
    assert report.skipped.total() == len(want) and report.read == 6


def test_tars_among_pictures_with_captions_are_refused(
    tmp_path: Path, make_folder: Folder, make_shards: Callable[..., Path], make_png: Png
) -> None:
    root = make_folder(tmp_path / "d", 3)
    make_shards(root / "old", {"backup": 2})
    message = r"holds both tars \(1, the first old/backup-00000\.tar\) and pictures .* \(3, the first p000\).*Works: "
    with pytest.raises(DataError, match=message) as caught:
        find_records(root)
    pattern = str(caught.value).rpartition("for the tars ")[2].strip("'")
    assert list(read(Path(pattern))[0]) == ["backup000", "backup001"]
    for path in root.glob("*.txt"):
        path.unlink()  # pictures without captions are no pairs: plots, or samples to look at
    assert list(read(root)[0]) == ["backup000", "backup001"]


def test_a_pattern_finds_tars_at_any_depth_and_none_twice(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    for folder, prefix in (("", "a"), ("x", "b"), ("x/val", "c")):
        make_shards(tmp_path / folder, {prefix: 1})
    (tmp_path / "x" / "round").symlink_to(tmp_path)
    pattern = f"{tmp_path}/**/*.tar"
    assert list(read(Path(pattern), split="train")[0]) == ["a000", "b000"]
    assert list(read(Path(pattern), split="val")[0]) == ["c000"]


def test_linked_folders_and_files_are_followed(tmp_path: Path, make_folder: Folder) -> None:
    make_folder(tmp_path / "store" / "more", 2)
    root = make_folder(tmp_path / "d", 1)
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "round").symlink_to(root)
    (tmp_path / "store" / "back").symlink_to(root)
    (root / "itself").symlink_to(root / "itself")
    (root / "q.png").symlink_to(root / "p000.png")
    (root / "q.txt").symlink_to(root / "p000.txt")
    got, report = read(root)
    assert list(got) == ["linked/more/p000", "linked/more/p001", "p000", "q"] and not report.skipped


def test_a_folder_of_linked_folders_of_tars(
    tmp_path: Path, make_shards: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    make_shards(tmp_path / "a", {"train": 2})
    root = tmp_path / "d"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "a")
    (root / "gone.tar").symlink_to(tmp_path / "nothing")
    got, report = read(root)
    assert list(got) == ["train000", "train001"]
    assert report.names == {"unreadable file": ["gone.tar after nothing"]}
    assert all(part.fingerprint and part.stamp for part in find_records(root)["train"])


def test_links_to_nothing_are_counted_and_named(tmp_path: Path, make_folder: Folder) -> None:
    root = make_folder(tmp_path / "d", 3)
    for name in ("p000.png", "p001.txt"):
        (root / name).unlink()
        (root / name).symlink_to(tmp_path / "nothing")
    got, report = read(root)
    assert list(got) == ["p002"] and report.names == {"unreadable file": ["p000", "p001"]}
    assert all(part.fingerprint and part.stamp for part in find_records(root)["train"])


def test_pictures_with_one_list_are_the_list(tmp_path: Path, make_png: Png, make_folder: Folder) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(make_png(number))
    lines = [{"file_name": f"{number}.png", "text": f"图{number}"} for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    got, report = read(tmp_path)
    assert got == {"0": "图0", "1": "图1", "2": "图2"} and not report.skipped
    make_folder(tmp_path, 1)  # a picture with a caption of its own: the folder is what is read
    assert list(read(tmp_path)[0]) == ["p000"]


def write_list(path: Path, pictures: dict[str, object], **fields: str) -> None:
    lines = [{"file_name": name, "text": caption} | fields for name, caption in pictures.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def test_lists_called_after_their_splits_are_read_together(tmp_path: Path, make_png: Png) -> None:
    for root, places in (("beside", ["img"] * 3), ("inside", ["train", "train", "validation"])):
        for number, place in enumerate(places):
            picture = tmp_path / root / place / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(make_png(number))
    write_list(tmp_path / "beside" / "train.jsonl", {"img/0.png": "a", "img/1.png": "b"})
    write_list(tmp_path / "beside" / "val.jsonl", {"img/2.png": "c"}, split="unknown")
    write_list(tmp_path / "inside" / "train" / "metadata.jsonl", {"0.png": "a", "1.png": "b"})
    assert list(find_records(tmp_path / "inside", val_share=0.9)) == ["train"]
    write_list(tmp_path / "inside" / "validation" / "metadata.jsonl", {"2.png": "c"})
    for source in (tmp_path / "beside", tmp_path / "inside"):
        assert list(find_records(source, val_share=0.9)) == ["train", "val"]
        for split, want in (("train", ["a", "b"]), ("val", ["c"])):
            got, report = read(source, split=split, val_share=0.9)
            assert list(got.values()) == want and not report.skipped
        assert all(part.fingerprint and part.stamp for parts in find_records(source).values() for part in parts)


def test_one_list_is_split_by_its_keys_whatever_it_is_called(tmp_path: Path, make_png: Png) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(make_png(number))
    write_list(tmp_path / "train.jsonl", {f"{number}.png": "x" for number in range(20)})
    write_list(tmp_path / "logs" / "val.jsonl", {"0.png": "y"})
    assert list(find_records(tmp_path, val_share=0.5)) == ["train", "val"]
    assert set(read(tmp_path, val_share=0.5)[0].values()) == {"x"}


def test_lists_that_name_no_splits_are_named(tmp_path: Path, make_png: Png) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(make_png(0))
    for name in ("train", "b", "c", "d"):
        write_list(tmp_path / f"{name}.jsonl", {"img/0.png": "a"})
    with pytest.raises(DataError, match=r"has 4 lists \(b\.jsonl, c\.jsonl, d\.jsonl, \.\.\.\).*one of these lists"):
        read(tmp_path)
    assert read(tmp_path / "b.jsonl")[0] == {"img/0": "a"}


@pytest.mark.parametrize("caption", [["a cat", "cats"], 3, {"en": "a cat"}])
def test_captions_that_are_no_text_are_called_so(tmp_path: Path, make_png: Png, caption: object) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(make_png(0))
        (folder / f"{name}.json").write_text(json.dumps({"caption": caption if name == "a" else "x"}))
    write_list(tmp_path / "l.jsonl", {"d/a.png": caption, "d/b.png": "x"})
    tar = write_tar(tmp_path / "x.tar", {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    for source in (folder, tmp_path / "l.jsonl", tar):
        got, report = read(source)
        assert list(got.values()) == ["x"] and report.skipped == {"caption is not text": 1}


def test_a_picture_that_stands_in_the_line_or_has_too_long_a_name_is_counted(tmp_path: Path, make_png: Png) -> None:
    (tmp_path / "a.png").write_bytes(make_png(0))
    inline = "data:image/png;base64," + "A" * 5000
    write_list(tmp_path / "l.jsonl", {inline: "x", "x/" * 4000: "y", "b/" * 200 + "c.png": "z", "a.png": "w"})
    got, report = read(tmp_path / "l.jsonl", val_share=0.5)
    assert got == {"a": "w"} and report.num_skipped == 3
    assert report.skipped == {"unreadable file": 2, "missing picture": 1}
    assert all(name.startswith("l.jsonl byte ") for names in report.names.values() for name in names)
    assert all(
        part.fingerprint and part.stamp for parts in find_records(tmp_path / "l.jsonl").values() for part in parts
    )


@pytest.mark.parametrize("levels", [101, 900, 100_000])
def test_deeply_nested_json_is_broken(tmp_path: Path, make_png: Png, levels: int) -> None:
    def nested(depth: int) -> bytes:
        return b'{"caption": "x", "image": "a.png", "more": ' + b"[" * depth + b"]" * depth + b"}"

    folder = tmp_path / "d"
    folder.mkdir()
    for name, data in {"a": nested(levels), "b": nested(99)}.items():
        (folder / f"{name}.png").write_bytes(make_png(0))
        (folder / f"{name}.json").write_bytes(data)
    listed = folder / "l.jsonl"
    listed.write_bytes(nested(levels) + b"\n" + nested(99))
    tar = write_tar(tmp_path / "x.tar", {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    for source in (folder, listed, tar):
        got, report = read(source)
        assert list(got.values()) == ["x"] and report.skipped == {"broken json": 1}, source


def test_bare_pictures_without_a_list_say_what_is_missing(tmp_path: Path, make_png: Png) -> None:
    (tmp_path / "a.png").write_bytes(make_png(1))
    with pytest.raises(DataError, match="missing caption: a"):
        list(read_records(tmp_path))


def test_an_unreadable_folder_is_named(
    tmp_path: Path, make_folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "d", 2)
    make_folder(root / "secret", 1)
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("megatron_vilg.data.sources.os.scandir", refuse)
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        assert len(read(root)[0]) == 2
    assert "secret: is left out (Permission denied)" in caplog.text
