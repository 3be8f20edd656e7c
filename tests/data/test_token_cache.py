from __future__ import annotations

import json
import logging
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vilg.config.schema import DataConfig
from megatron_vilg.data.images import decode_image, load_pixels
from megatron_vilg.data.records import find_records, read_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import DataError

Shards = Callable[..., Path]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def encode_like_the_cache(pixels: torch.Tensor) -> torch.Tensor:
    cells = torch.nn.functional.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 3).flatten(1)
    return ((cells + 1) / 2 * 63).round().long()


def test_tokens_are_those_of_the_tokenizers(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 13, "val-pairs": 3}, per_shard=5)
    assert make_cache.write(source, tmp_path / "c")
    cache = TokenCache.open(tmp_path / "c")
    assert cache.splits == {"train": 13, "val-pairs": 3}
    tokens, records = cache.split("train"), list(read_records(source, "train"))
    assert [r.key for r in cache.records("train")] == [r.key for r in records]
    assert records[7].fields["concept"] == "c7"
    assert [(r.caption, r.fields) for r in cache.records("train")] == [(r.caption, r.fields) for r in records]
    order = np.asarray([12, 0, 7, 7, 5])
    zeros = np.zeros(5, np.int64)
    want = encode_like_the_cache(load_pixels([records[i].image for i in order], 12)).numpy()
    assert np.array_equal(tokens.images(order, zeros), want)
    ids, lengths = tokens.captions(order, zeros)
    for row, length, i in zip(ids, lengths, order, strict=True):
        assert make_cache.tokenizer.decode(row[:length]) == records[i].caption
        assert not row[length:].any()
    assert tokens.num_captions(order).tolist() == [3] * 5
    other, other_len = tokens.captions(order, zeros + 2)
    assert make_cache.tokenizer.decode(other[0][: other_len[0]]) == records[12].alternates[1]


def test_no_batch_of_whole_pictures_is_held(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = weakref.WeakValueDictionary[int, Image.Image]()
    most = []

    def decode(data: bytes) -> Image.Image:
        picture = decode_image(data)
        alive[len(most)] = picture
        most.append(len(alive))
        return picture

    source = make_folder(tmp_path / "d", 20)
    monkeypatch.setattr("megatron_vilg.data.records.decode_image", decode)
    assert make_cache.write(source, tmp_path / "c", part_size=100)
    assert len(most) == 20 and max(most) <= 2  # the one in hand, and the next one


def test_others_may_read_the_tokens_where_the_umask_lets_them(
    tmp_path: Path, make_shards: Shards, make_cache: Any
) -> None:
    assert make_cache.write(make_shards(tmp_path / "d", {"train": 3}), tmp_path / "c")
    assert len({path.stat().st_mode for path in (tmp_path / "c").iterdir() if path.is_file()}) == 1


def test_views_belong_to_training_and_differ(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 10, "val": 2})
    make_cache.write(source, tmp_path / "c")
    cache = TokenCache.open(tmp_path / "c")
    assert cache.split("train").num_views == 2 and cache.split("val").num_views == 0
    pairs = np.arange(10)
    views = [cache.split("train").images(pairs, np.full(10, v)) for v in range(3)]
    assert not np.array_equal(views[0], views[1]) and not np.array_equal(views[1], views[2])


def test_same_input_same_bytes_however_the_work_is_shared(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 23, "val": 4}, per_shard=5)
    assert make_cache.write(source, tmp_path / "whole")
    done = [make_cache.write(source, tmp_path / "shared", worker=(i, 3)) for i in range(3)]
    assert done == [False, False, True]
    assert files(tmp_path / "whole") == files(tmp_path / "shared")
    assert not [n for n in files(tmp_path / "shared") if n.endswith("partial")]


def test_an_interrupted_run_does_only_the_rest(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 20}, per_shard=5)
    calls = []

    def count_and_stop(pixels: torch.Tensor) -> torch.Tensor:
        if len(calls) == 7:  # three versions of a picture per shard: in the third shard
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return encode_like_the_cache(pixels)

    with pytest.raises(KeyboardInterrupt):
        make_cache.write(source, tmp_path / "c", encode_images=count_and_stop)
    with pytest.raises(DataError, match=r"is not finished\. Run `vilg data encode"):
        TokenCache.open(tmp_path / "c")
    again: list[int] = []

    def count(pixels: torch.Tensor) -> torch.Tensor:
        again.append(len(pixels))
        return encode_like_the_cache(pixels)

    assert make_cache.write(source, tmp_path / "c", encode_images=count)
    assert len(again) == 6
    make_cache.write(source, tmp_path / "straight")
    assert files(tmp_path / "c") == files(tmp_path / "straight")
    again.clear()
    assert make_cache.write(source, tmp_path / "c", encode_images=count) and not again


def test_damaged_shards_and_changed_sources_are_encoded_again(
    tmp_path: Path, make_shards: Shards, make_cache: Any
) -> None:
    source = make_shards(tmp_path / "d", {"train": 15}, per_shard=5)
    make_cache.write(source, tmp_path / "c")
    whole = files(tmp_path / "c")
    shard = tmp_path / "c" / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"train-00001.safetensors: cannot be read \(it is cut off\)"):
        TokenCache.open(tmp_path / "c").split("train")
    make_cache.write(source, tmp_path / "c")
    assert files(tmp_path / "c") == whole
    make_shards(tmp_path / "d", {"train": 12}, per_shard=5)
    make_cache.write(source, tmp_path / "c")
    assert TokenCache.open(tmp_path / "c").splits == {"train": 12}


def counting(calls: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return encode_like_the_cache(pixels)

    return encode


def edit(path: Path, data: bytes) -> None:
    """Other contents of the same size, written at the same time by the clock that users can set."""
    status = path.stat()
    assert status.st_size == len(data) and path.read_bytes() != data
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_corrected_character_is_encoded_again(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_shards: Shards, make_cache: Any
) -> None:
    folder = make_folder(tmp_path / "d", 10)
    make_cache.write(folder, tmp_path / "c")
    calls: list[int] = []
    edit(folder / "p007.txt", "绿色的第7张图".encode())
    assert make_cache.write(folder, tmp_path / "c", encode_images=counting(calls))
    assert len(calls) == 3 and TokenCache.open(tmp_path / "c").records("train")[7].caption == "绿色的第7张图"
    shards = make_shards(tmp_path / "t", {"train": 10}, per_shard=5)
    make_cache.write(shards, tmp_path / "s")
    calls.clear()
    tar = shards / "train-00001.tar"
    edit(tar, tar.read_bytes().replace("红色的图7".encode(), "绿色的图7".encode()))
    assert make_cache.write(shards, tmp_path / "s", encode_images=counting(calls))
    assert len(calls) == 3 and TokenCache.open(tmp_path / "s").records("train")[7].caption == "绿色的图7"


def test_pictures_and_captions_of_lists_are_noticed(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_cache: Any
) -> None:
    folder = make_folder(tmp_path / "d", 10)
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(json.dumps({"image": f"d/p{i:03d}.png", "caption": f"red {i}"}) for i in range(10)))
    make_cache.write(listed, tmp_path / "c")
    calls: list[int] = []
    again = {"encode_images": counting(calls)}
    assert make_cache.write(listed, tmp_path / "c", **again) and not calls
    picture = folder / "p008.png"
    edit(picture, picture.read_bytes()[:-13] + bytes([picture.read_bytes()[-13] ^ 1]) + picture.read_bytes()[-12:])
    assert [p.fingerprint for p in find_records(listed, part_size=5)["train"]] != [
        json.loads((tmp_path / "c" / f"train-0000{i}.json").read_text())["fingerprint"] for i in range(2)
    ]
    edit(listed, listed.read_bytes().replace(b"red 1", b"rad 1"))
    assert make_cache.write(listed, tmp_path / "c", **again, views=DataConfig(num_views=2, max_bad_share=1.0))
    assert TokenCache.open(tmp_path / "c").records("train")[1].caption == "rad 1"


def test_copies_of_the_data_keep_the_tokens(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_shards: Shards, make_cache: Any
) -> None:
    sources = [make_folder(tmp_path / "d", 7), make_shards(tmp_path / "t", {"train": 7, "val": 2}, per_shard=5)]
    for number, source in enumerate(sources):
        cache, copy = tmp_path / f"c{number}", tmp_path / f"copy{number}"
        make_cache.write(source, cache)
        shutil.copytree(source, copy, copy_function=shutil.copyfile)
        calls: list[int] = []
        note = cache / "train-00000.json"
        before = json.loads(note.read_text())
        assert make_cache.write(copy, cache, encode_images=counting(calls)) and not calls
        after = json.loads(note.read_text())
        assert after["fingerprint"] == before["fingerprint"] and after["stamp"] != before["stamp"]


def test_workers_with_their_own_copies_complete_a_cache(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 12}, per_shard=5)
    done = []
    for worker in range(2):
        copy = shutil.copytree(source, tmp_path / f"node{worker}", copy_function=shutil.copyfile)
        done.append(make_cache.write(copy, tmp_path / "c", worker=(worker, 2)))
    assert done == [False, True]


def test_untouched_files_are_not_read_again(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_folder(tmp_path / "d", 6)
    make_cache.write(source, tmp_path / "c")
    monkeypatch.setattr("megatron_vilg.data.source_parts.file_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert make_cache.write(source, tmp_path / "c")


def test_other_settings_name_both_sides(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 6})
    make_cache.write(source, tmp_path / "c")
    with pytest.raises(DataError) as info:
        make_cache.write(source, tmp_path / "c", image_tokenizer_hash="xyz", codebook_size=128)
    assert "image_tokenizer_sha256: 'abc' there, 'xyz' asked for" in str(info.value)
    assert "image_tokenizer.codebook_size: 64 there, 128 asked for" in str(info.value)
    TokenCache.open(tmp_path / "c", expect={"image_size": 12, "text_tokenizer_sha256": make_cache.tokenizer.sha256})
    with pytest.raises(DataError, match=r"text_tokenizer_sha256: '.+' there, 'other' asked for"):
        TokenCache.open(tmp_path / "c", expect={"text_tokenizer_sha256": "other"})


def test_long_captions_are_cut_and_counted(
    tmp_path: Path, make_shards: Shards, make_cache: Any, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_shards(tmp_path / "d", {"train": 6})
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        make_cache.write(source, tmp_path / "c", num_text_slots=2)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["cut_captions"] > 6 and manifest["captions"] == 18 and manifest["longest_caption"] > 2
    assert "longer than model.num_text_slots = 2 and were cut" in caplog.text
    tokens = TokenCache.open(tmp_path / "c").split("train")
    assert tokens.captions(np.arange(6), np.zeros(6, np.int64))[1].tolist() == [2] * 6


def test_bad_records_are_in_the_manifest_and_stop_past_the_limit(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_cache: Any
) -> None:
    source = make_folder(tmp_path / "d", 20)
    (source / "p003.png").write_bytes(b"x")
    assert make_cache.write(source, tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["report"] == {
        "read": 19,
        "skipped": {"unreadable picture": 1},
        "names": {"unreadable picture": ["p003"]},
    }
    for i in range(10):
        (source / f"p{i:03d}.txt").write_text("")
    with pytest.raises(DataError, match=r"data.max_bad_share = 0.01: 10 of 20"):
        make_cache.write(source, tmp_path / "c")
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert make_cache.write(source, tmp_path / "c", views=DataConfig(num_views=2, max_bad_share=0.6))


def test_a_part_without_good_records_is_an_empty_shard(
    tmp_path: Path, make_folder: Callable[[Path, int], Path], make_cache: Any
) -> None:
    source = make_folder(tmp_path / "d", 15)
    for i in range(5, 10):
        (source / f"p{i:03d}.txt").write_text("")
    assert make_cache.write(source, tmp_path / "c", views=DataConfig(num_views=1, max_bad_share=0.5))
    cache = TokenCache.open(tmp_path / "c")
    assert cache.splits == {"train": 10}
    assert cache.split("train").images(np.asarray([4, 5]), np.asarray([0, 1])).shape == (2, 9)
    assert cache.records("train")[5].key == "p010"


@pytest.mark.parametrize(
    "wrong",
    [lambda pixels: torch.zeros(len(pixels), 4, dtype=torch.long), lambda pixels: torch.full((len(pixels), 9), 64)],
)
def test_codes_that_do_not_fit_are_refused(
    tmp_path: Path, make_shards: Shards, make_cache: Any, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    source = make_shards(tmp_path / "d", {"train": 3})
    with pytest.raises(DataError, match=r"gave codes of shape .* needs shape \(3, 3, 9\), codes 0 to 63"):
        make_cache.write(source, tmp_path / "c", encode_images=wrong)


def test_wrong_workers_large_codebooks_and_missing_things(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"train": 3})
    with pytest.raises(DataError, match="worker = 3/3: the index must be from 0 to 2"):
        make_cache.write(source, tmp_path / "c", worker=(3, 3))
    with pytest.raises(DataError, match=r"codebook_size = 70000.*at most 65536"):
        make_cache.write(source, tmp_path / "c", codebook_size=70_000)
    with pytest.raises(DataError, match="does not exist"):
        TokenCache.open(tmp_path / "none")
    make_cache.write(source, tmp_path / "c")
    with pytest.raises(DataError, match="has no split 'val'; it has train"):
        TokenCache.open(tmp_path / "c").split("val")
    manifest = tmp_path / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="has format 9, this version reads 1"):
        TokenCache.open(tmp_path / "c")


def test_only_held_out_pairs_are_not_enough(tmp_path: Path, make_shards: Shards, make_cache: Any) -> None:
    source = make_shards(tmp_path / "d", {"val": 3})
    with pytest.raises(DataError, match="gives no pair to train on"):
        make_cache.write(source, tmp_path / "c")
