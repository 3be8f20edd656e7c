from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_vilg.cli.main import EXIT_ERROR, main
from tests.evaluate.test_curves import metric_line
from tests.tiny_run import write_tiny_pairs, write_tiny_run
from tests.train.token_caches import write_cache


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, checkpoint=False)
    (folder / "seconds.json").write_text('{"train": 3.5}')
    (folder / "metrics.jsonl").write_text("".join(metric_line(step) for step in (10, 20)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pairs(tmp_path_factory.mktemp("data"))


def test_a_run_is_evaluated(run_folder: Path, data: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--load", str(run_folder), "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, "--max-prompts", "3", "--seed", "4", "sample.top_k=2"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png", "report.html"}
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["seed"] == 4
    assert report["seconds"]["train"] == 3.5
    assert report["seconds"]["evaluate"] > 0
    assert report["drawing_settings"]["top_k"] == 2
    assert report["drawing_settings"]["temperature"] == 0.9, "the run's own setting"
    assert report["config"]["sample"]["top_k"] == 2
    assert report["counts"]["trained"] == 6 and report["counts"]["unseen"] == 4
    assert report["num_prompts"] == {"trained": 3, "unseen": 3}
    assert report["retrieval"] is None, "these pairs name no concepts"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Instruments over training" in page and "Mean log Z of both heads" in page
    for direction in ("text_to_image", "image_to_text"):
        assert all(value > 0 for value in report["ce"][direction].values())


def test_how_much_is_drawn_at_a_time_changes_nothing(run_folder: Path, data: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--load", str(run_folder), "--data", str(data), "--max-prompts", "3", "sample.rerank=2"]
    assert main([*command, "--out", str(tmp_path / "all")]) == 0
    assert main([*command, "--out", str(tmp_path / "one"), "--max-batch", "1"]) == 0
    one, every = (json.loads((tmp_path / name / "report.json").read_text("utf-8")) for name in ("one", "all"))
    assert one | {"seconds": 0} == every | {"seconds": 0}


def test_negative_seeds_and_a_choice_among_drawings(run_folder: Path, data: Path, tmp_path: Path) -> None:
    """A seed of -1 is one that training, drawing and captioning take too."""
    command = ["evaluate", "--load", str(run_folder), "--data", str(data), "--out", str(tmp_path)]
    assert main([*command, "--max-prompts", "2", "--seed", "-1", "sample.rerank=5"]) == 0
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["seed"] == -1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the best 4 of 5 by the model&#x27;s own likelihoods" in page and "not chosen" not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json", "x.json"], "--json: `vilg evaluate` has no use for it. Works: --load, --data, --out"),
        (["--references", "r", "--candidates", "c"], "--candidates: `vilg evaluate` has no use for it"),
        (["table7", "--seed", "3"], "--seed: `vilg evaluate table7` has no use for it. Works: --load, --data"),
        (["table7", "--samples-per-prompt", "3"], "--samples-per-prompt: `vilg evaluate table7` has no use for it"),
        (["captions", "--out", "x"], "--out: `vilg evaluate captions` has no use for it. Works: --references"),
        (["captions", "sample.top_k=2"], "sample.top_k=2: `vilg evaluate captions` reads two files and draws nothing"),
        (
            ["table7", "--load", "x", "--data", "x", "--json", "x", "sample.rerank=4"],
            "sample.rerank=4: here one picture is drawn of each prompt and none captioned, so it has no effect. Works: "
            "sample.temperature",
        ),
    ],
)
def test_options_without_effect_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == EXIT_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["", "export"])
def test_other_pairs_than_those_of_the_run_are_refused(
    folder: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    write_cache(run / "tokens", {"train": 3})
    other = tmp_path / "other"
    other.mkdir()
    command = ["evaluate", "--load", str(run / folder), "--data", str(write_tiny_pairs(other))]
    assert main([*command, "--out", str(tmp_path / "report")]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert (
        f"--data={other}: 6 of 6 training pairs are not among the 3 pairs in {run / 'tokens'} that were train" in said
    )


def test_an_export_on_its_own_says_that_nobody_checks(
    run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = shutil.copytree(run_folder / "export", tmp_path / "alone")
    command = ["evaluate", "--load", str(alone), "--data", str(data), "--out", str(tmp_path / "report")]
    assert main([*command, "--max-prompts", "1"]) == 0
    assert f"--load={alone}: there is no {alone / 'tokens'}, so which pairs were trained" in capsys.readouterr().err


def test_only_drawing_can_be_changed(run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--load", str(run_folder), "--data", str(data), "--out", "nowhere"]
    assert main([*command, "model.width=3"]) == EXIT_ERROR
    message = capsys.readouterr().err
    assert "model.width=3: of a trained run only drawing can be changed. Works: sample.temperature" in message


@pytest.mark.parametrize("task", [[], ["table7", "--json", "scores.json"]], ids=["report", "table7"])
def test_settings_and_places_are_checked_before_a_run_is_loaded(
    task: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", *task, "--load", str(tmp_path / "no-run"), "--data", str(tmp_path)]
    assert main([*command, "--out", str(tmp_path), "sample.temperature=hot"]) == EXIT_ERROR
    assert "sample.temperature=hot: must be a number of at least 0, got the text 'hot'" in capsys.readouterr().err
    last = ["--data", str(tmp_path), "--out", str(tmp_path), "--load", str(tmp_path / "no-run")]
    assert main(["evaluate", *task, *last, "sample.temperature=hot"]) == EXIT_ERROR, "no further value of --load"
    assert "sample.temperature=hot" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*command, "--out", str(tmp_path / "file" / "report")]) == EXIT_ERROR
    assert f"--out={tmp_path / 'file' / 'report'}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["captions", "table7"])
def test_a_file_of_scores_that_cannot_be_written_is_named_first(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    missing = str(tmp_path / "missing")
    inputs = {
        "captions": ["--references", missing, "--candidates", missing],
        "table7": ["--load", missing, "--data", missing],
    }
    assert main(["evaluate", task, *inputs[task], "--json", str(tmp_path / "file" / "scores.json")]) == EXIT_ERROR
    assert "scores.json: cannot be written" in capsys.readouterr().err


def test_missing_options_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--load", "x"]) == EXIT_ERROR
    assert "vilg evaluate needs --data --out" in capsys.readouterr().err
    assert main(["evaluate", "captions", "--references", "x"]) == EXIT_ERROR
    assert "vilg evaluate captions needs --candidates" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-2", "many"])
def test_numbers_are_checked(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", f"--max-prompts={value}"])
    assert f"must be a whole number of at least 1, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "holds no object of seconds by stage but [1]; remove it to go on without the seconds of the stages"),
        ('{"train": null}', "train=None is no number of seconds; remove it to go on"),
        ('{"tokens": 1, "train": "long"}', "train='long' is no number of seconds; remove it to go on"),
        ('{"train": true}', "train=True is no number of seconds; remove it to go on"),
    ],
)
def test_broken_seconds_are_named(
    text: str, message: str, run_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "seconds.json"
    kept = path.read_text()
    path.write_text(text)
    try:
        assert main(["evaluate", "--load", str(run_folder), "--data", str(data), "--out", str(tmp_path)]) == EXIT_ERROR
    finally:
        path.write_text(kept)
    assert f"seconds.json: {message}" in capsys.readouterr().err


def test_caption_files_are_scored(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    (tmp_path / "r.jsonl").write_text('{"id": 1, "captions": ["红色的熊"]}\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"id": 1, "caption": "红色的猫"}\n', encoding="utf-8")
    out = tmp_path / "new" / "scores.json"
    files = ["--references", str(tmp_path / "r.jsonl"), "--candidates", str(tmp_path / "c.jsonl"), "--json", str(out)]
    assert main(["evaluate", "captions", *files]) == 0
    scores = json.loads(out.read_text())
    assert scores["char_f1"] == pytest.approx(0.75)
    assert set(scores) == {"count", "exact_match", "char_f1", "bleu_4_char", "rouge_l_char", "cider_char"}
