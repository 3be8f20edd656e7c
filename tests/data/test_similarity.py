from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vilg.data.similarity import ScoreFile, call_scorer, load_scorer
from megatron_vilg.errors import ConfigError, DataError

PAIRS = [(Image.new("RGB", (2, 2)), "一"), (Image.new("RGB", (2, 2)), "二")]


def scores(path: Path, text: str) -> ScoreFile:
    path = path / "s.jsonl"
    path.write_text(text, encoding="utf-8")
    return ScoreFile(path)


def test_scores_by_key_and_by_split(tmp_path: Path) -> None:
    lines = ['{"id": "a", "score": 0.5}', "", '{"key": 7, "score": 1}', '{"id": "a", "split": "val", "score": 0.25}']
    found = scores(tmp_path, "\ufeff" + "\n".join(lines))
    assert [found.get("train", "a"), found.get("val", "a"), found.get("val", "7")] == [0.5, 0.25, 1.0]
    assert found.get("train", "b") is None and found.example() == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no scores; needs lines like"),
        ("{", r"line 1: no JSON \(.*\); needs lines like \{\"id\""),
        ("[" * 100_000, r"line 1: no JSON \(.*\); needs lines like \{\"id\""),
        ("\n[1]", "line 2: has no id"),
        ('{"id": true, "score": 1}', "line 1: has no id"),
        ('{"id": "a"}', "score = None is no finite number"),
        ('{"id": "a", "score": "0.5"}', "score = '0.5' is no finite number"),
        ('{"id": "a", "score": NaN}', "score = nan is no finite number"),
        ('{"id": "a", "score": 1}\n{"id": "a", "score": 0.5}', "line 2: 'a' has the score 1 already.*\"split\""),
    ],
)
def test_wrong_score_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scores(tmp_path, text)


def test_a_score_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--scores=.*none: cannot be read"):
        ScoreFile(tmp_path / "none")
    (tmp_path / "wide").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=r"wide: cannot be read"):
        ScoreFile(tmp_path / "wide")


def test_a_scorer_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_scorer.py").write_text("def score(pairs):\n    return [len(c) for _, c in pairs]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert call_scorer(load_scorer("my_own_scorer:score"), "x", PAIRS) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", "--scorer=math: works MODULE:FUNCTION"),
        (":f", "works MODULE:FUNCTION"),
        ("no_such_module_here:f", "no_such_module_here cannot be imported"),
        ("math:none", "math has no function none"),
        ("math:pi", "math has no function pi"),
    ],
)
def test_wrong_scorers(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scorer(name)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([0.5], "1 answers for 2 pairs; needs one finite number for each pair"),
        ([0.5, float("nan")], "2 answers for 2 pairs, nan among them"),
        ([0.5, "1"], "'1' among them"),
        (None, "no list of numbers came back"),
    ],
)
def test_wrong_answers(answers: list[float], message: str) -> None:
    with pytest.raises(DataError, match=f"--scorer=m:f: .*{message}"):
        call_scorer(lambda _: answers, "m:f", PAIRS)


def test_answers_of_numpy_and_errors_of_the_scorer_itself() -> None:
    assert call_scorer(lambda pairs: np.arange(len(pairs), dtype=np.float32), "m:f", PAIRS) == [0.0, 1.0]

    def broken(pairs: Sequence[object]) -> list[float]:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        call_scorer(broken, "m:f", PAIRS)
