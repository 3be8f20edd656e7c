"""Damaged tars, tars strung together, and the order of keys that begin alike."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_vilg.data.records import ReadReport, find_records, read_records

Png = Callable[..., bytes]
Member = tuple[str, bytes]


def write_tar(path: Path, members: Sequence[Member]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(source: Path) -> tuple[list[str], ReadReport]:
    """Keys in the order in which they come, and the report; any number of bad records is allowed."""
    report = ReadReport()
    return [record.key for record in read_records(source, report=report, max_bad_share=1.0)], report


@pytest.fixture
def pair(make_png: Png) -> Callable[..., list[Member]]:
    def members(key: str, *more: str) -> list[Member]:
        files = [(f"{key}.png", make_png(len(key))), (f"{key}.txt", key.encode())]
        return files + [(f"{key}.{suffix}", b"{}") for suffix in more]

    return members


Pair = Callable[..., list[Member]]


def test_pairs_that_begin_alike_keep_their_order(tmp_path: Path, pair: Pair) -> None:
    names = ["photo", "photo.1", "photo.2", "photo.3", "photo-b", "photo.4", "q.2", "q.1", "q", "q.3", "q.4"]
    members = [file for name in names for file in pair(name, "json")]
    keys, report = read(write_tar(tmp_path / "x.tar", members))
    assert keys == names and not report.skipped


def test_a_pair_that_is_complete_late_comes_late_with_all_its_files(tmp_path: Path, pair: Pair) -> None:
    (picture, text), (_, _, about) = pair("a"), pair("a", "json")
    members = [picture, *pair("a.1"), text, *pair("a.2")]
    assert read(write_tar(tmp_path / "x.tar", members))[0] == ["a", "a.1", "a.2"]
    members = [picture, text, *pair("a.1"), (about[0], b'{"label": "x"}'), *pair("a.2")]
    records = list(read_records(write_tar(tmp_path / "y.tar", members)))
    assert [record.key for record in records] == ["a", "a.1", "a.2"] and records[0].fields == {"label": "x"}


def test_files_that_come_after_their_pair_was_read_are_named(tmp_path: Path, pair: Pair) -> None:
    members = [*pair("a"), *pair("a.1"), *pair("a.2"), ("a.json", b"{}"), ("a.cls", b"1"), ("a.seg.png", b"x")]
    keys, report = read(write_tar(tmp_path / "x.tar", members))
    assert keys == ["a", "a.1", "a.2"] and report.names == {"file apart from its pair": ["a.json"]}


def test_a_key_keeps_the_slash_that_it_begins_with(tmp_path: Path, pair: Pair) -> None:
    keys, _ = read(write_tar(tmp_path / "x.tar", [*pair("/a"), *pair("a"), *pair("/b/c"), *pair("./d")]))
    assert keys == ["/a", "a", "/b/c", "./d"]


@pytest.mark.parametrize("compressed", [False, True])
def test_what_stands_behind_the_end_of_a_tar_is_named(tmp_path: Path, pair: Pair, compressed: bool) -> None:
    first = write_tar(tmp_path / "a", pair("a")).read_bytes()
    second = write_tar(tmp_path / "b", pair("b")).read_bytes()
    source = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    source.write_bytes(gzip.compress(first) + gzip.compress(second) if compressed else first + second)
    keys, report = read(source)
    assert keys == ["a"] and report.num_skipped == 1
    (name,) = report.names["data behind the end of a tar"]
    assert name.startswith(f"{source.name} from byte {len(first)} on")


def test_zeros_behind_the_end_of_a_tar_are_padding(tmp_path: Path, pair: Pair) -> None:
    source = write_tar(tmp_path / "x.tar", pair("a"))
    source.write_bytes(source.read_bytes() + bytes(3 << 20))
    keys, report = read(source)
    assert keys == ["a"] and not report.skipped


def test_flipped_bits_in_a_compressed_tar_are_damage_and_stop_nothing(tmp_path: Path, pair: Pair) -> None:
    names = [f"{number:03d}" for number in range(40)]
    plain = write_tar(tmp_path / "x", [file for name in names for file in pair(name)]).read_bytes()
    good = gzip.compress(plain)
    source, losses = tmp_path / "x.tar.gz", set()
    for place in range(40, len(good) - 8, len(good) // 40):
        data = bytearray(good)
        data[place] ^= 0x10
        source.write_bytes(data)
        report = ReadReport()
        (part,) = find_records(source)["train"]
        losses.add(40 - len(list(part.read(report))))
        assert report.skipped["truncated tar"] == 1 and report.names["truncated tar"][0].startswith("x.tar.gz after ")
    assert max(losses) > 1  # what stands behind the damage


def with_size(data: bytes, member: int, field: bytes) -> bytes:
    """A tar whose header of this member says this size, with the checksum that fits."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        start = tar.getmembers()[member].offset
    header = bytearray(data[start : start + 512])
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:start] + bytes(header) + data[start + 512 :]


@pytest.mark.parametrize(
    "field", [b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00", b"77777777777\0", b"xyz\0" * 3], ids=range(4)
)
def test_damaged_sizes_in_a_tar_are_damage(tmp_path: Path, pair: Pair, field: bytes) -> None:
    source = write_tar(tmp_path / "x.tar", [*pair("a"), *pair("b"), *pair("c")])
    source.write_bytes(with_size(source.read_bytes(), 3, field))
    keys, report = read(source)
    assert keys == ["a"] and report.skipped == {"truncated tar": 1}
    assert report.names["truncated tar"][0] == "x.tar after b"
