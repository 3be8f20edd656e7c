from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_vilg.errors import DataError, MissingPackageError
from megatron_vilg.evaluate.caption_files import compare_captions, read_candidates, read_references


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_files_are_read(tmp_path: Path) -> None:
    references = write(
        tmp_path / "r.jsonl", {"id": 1, "captions": ["红色的熊", "一只熊"]}, "", {"id": "b", "captions": ["猫"]}
    )
    candidates = write(tmp_path / "c.jsonl", {"id": "b", "caption": "猫"}, {"id": 1, "caption": "熊"})
    assert read_references(references) == {"1": ["红色的熊", "一只熊"], "b": ["猫"]}
    assert read_candidates(candidates) == {"b": "猫", "1": "熊"}


def test_a_list_is_read_like_lines(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps([{"id": "a", "caption": "熊"}, {"id": "b", "caption": "猫"}], indent=1))
    assert read_candidates(tmp_path / "c.json") == {"a": "熊", "b": "猫"}
    (tmp_path / "c.json").write_text('[{"id": "a", "caption": "熊"}, 1]')
    with pytest.raises(DataError, match=r'c\.json:2: needs an object with "id".*got \'1\''):
        read_candidates(tmp_path / "c.json")


def test_marks_and_separators_of_other_programs_are_read(tmp_path: Path) -> None:
    """A byte order mark before, lines that end as on Windows, and line separators inside a caption."""
    line = json.dumps({"id": 1, "caption": "红\u2028苹果\u0085"}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_bytes(f"\ufeff{line}\r\n".encode())
    assert read_candidates(tmp_path / "c.jsonl") == {"1": "红\u2028苹果\u0085"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "c.jsonl:1: not JSON"),
        ("[1]", 'c.jsonl:1: needs an object with "id"'),
        ('{"caption": "熊"}', 'c.jsonl:1: needs an object with "id"'),
        ('{"id": 1, "captions": ["熊"]}', 'c.jsonl:1: needs "caption", a text, got None'),
        ('{"id": 1, "caption": "熊"}\n{"id": "1", "caption": "猫"}', "c.jsonl:2: id '1' stands here a second time"),
        ("", "c.jsonl: no captions in it"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_candidates(write(tmp_path / "c.jsonl", line))
    assert message in str(caught.value)


def test_references_need_captions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'r.jsonl:1: needs "captions", a list with at least one text, got \[\]'):
        read_references(write(tmp_path / "r.jsonl", {"id": 1, "captions": []}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        read_candidates(tmp_path / "none.jsonl")


def test_ids_must_agree() -> None:
    with pytest.raises(DataError, match=r"1 without a candidate \['a'\], 1 without a reference \['b'\]"):
        compare_captions({"a": ["熊"]}, {"b": "熊"})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(MissingPackageError, match=r"megatron_vilg\[eval\]"):
        compare_captions({"a": ["熊"]}, {"a": "熊"})


def test_scores_with_the_library() -> None:
    pytest.importorskip("pycocoevalcap")
    references = {"a": ["推特扁平风格的熊", "一只熊"], "b": ["立体三维风格的猫"], "c": ["黑色描边风格的船"]}
    perfect = compare_captions(references, {key: texts[0] for key, texts in references.items()})
    assert perfect["exact_match"] == perfect["char_f1"] == perfect["count"] / 3 == 1.0
    assert perfect["bleu_4_char"] == pytest.approx(1.0, abs=1e-6)
    assert perfect["rouge_l_char"] == pytest.approx(1.0)
    mixed = compare_captions(references, {"a": "一只熊", "b": "立体三维风格的狗", "c": "鱼"})
    assert mixed["exact_match"] == pytest.approx(1 / 3)
    assert mixed["char_f1"] == pytest.approx((1 + 7 / 8 + 0) / 3)
    assert 0.0 < mixed["rouge_l_char"] < perfect["rouge_l_char"]
    assert 0.0 < mixed["bleu_4_char"] < 1.0
    assert mixed["cider_char"] < perfect["cider_char"]
