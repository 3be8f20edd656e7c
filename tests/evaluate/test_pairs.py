from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vilg.errors import DataError
from megatron_vilg.evaluate.pairs import Kind, read_eval_set
from megatron_vilg.evaluate.retrieval import Label


def add(folder: Path, key: str, **fields: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (len(key) * 9 % 255, 40, 90)).save(buffer, format="PNG")
    (folder / f"{key}.png").write_bytes(buffer.getvalue())
    (folder / f"{key}.txt").write_text(f"{key}的说明", encoding="utf-8")
    if fields:
        (folder / f"{key}.json").write_text(json.dumps(fields), encoding="utf-8")


def test_fields_say_what_was_held_out(tmp_path: Path) -> None:
    add(
        tmp_path, "a", split="train", concept="1f43b", style="noto", label_zh="熊", label_en="bear", style_zh="卡通风格"
    )
    add(tmp_path, "b", split="heldout-pair", concept="1f43b", style="openmoji")
    add(tmp_path, "c", split="heldout-concept", concept="1f431", style="noto")
    pairs = read_eval_set(tmp_path, 8)
    assert [pair.kind for pair in pairs.pairs] == [Kind.TRAINED, Kind.UNSEEN, Kind.NEW_CONCEPT]
    assert pairs.pairs[0].label == Label("1f43b", "noto")
    assert pairs.pairs[0].note == "bear · noto"
    assert pairs.pixels([0, 2]).shape == (2, 3, 8, 8)
    assert pairs.counts() == {"trained": 1, "unseen": 1, "held_out_concepts": 1, "concepts": 2, "styles": 2}
    assert pairs.captions(pairs.of_kind(Kind.UNSEEN)) == ["b的说明"]


def test_parts_of_a_plain_data_set_say_it_too(tmp_path: Path) -> None:
    add(tmp_path / "train", "a")
    add(tmp_path / "val", "b")
    pairs = read_eval_set(tmp_path, 8)
    assert [pair.kind for pair in pairs.pairs] == [Kind.TRAINED, Kind.UNSEEN]
    assert pairs.labelled([0, 1]) == []


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    add(tmp_path, "a", split="secret")
    with pytest.raises(DataError, match="record 'a' has split='secret'; known are 'train', 'heldout-pair'"):
        read_eval_set(tmp_path, 8)


def test_a_set_without_training_pairs_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "a", split="val")
    with pytest.raises(DataError, match="has no training pairs"):
        read_eval_set(tmp_path, 8)
