"""``vilg generate``: files, record, and one message for everything that cannot work."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vilg.checkpoint.export import save_model_folder
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.cli.drawn import write_record
from megatron_vilg.cli.main import main
from megatron_vilg.config.load import dump_run_config, write_run_folder_config
from megatron_vilg.config.schema import ReconstructorConfig, SampleConfig
from megatron_vilg.evaluate import canvas
from megatron_vilg.generate.pipeline import Pipeline
from tests.tiny_run import CAPTIONS, write_tiny_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    write_tiny_run(folder, checkpoint=False)
    return folder


def generate(run_folder: Path, out: Path, *options: str) -> int:
    return main(["generate", "--load", str(run_folder), "--out", str(out), "--device", "cpu", *options])


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "generate.json").read_text(encoding="utf-8"))


def picture(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def test_pictures_grid_and_record(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"# styles\n{CAPTIONS[1]}\n\n {CAPTIONS[2]}\n", encoding="utf-8")
    options = ["--prompt", CAPTIONS[0], "--prompt-file", str(prompts), "-n", "2", "--seed", "7", "--top-k", "4"]
    assert generate(run_folder, tmp_path / "drawn", *options, "--cfg-scale", "1.5", "--max-batch", "3") == 0
    written = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    files = [f"{p:05d}-{i:02d}.png" for p in range(3) for i in range(2)]
    assert written == [*files, "generate.json", "grid.png"]
    assert picture(tmp_path / "drawn" / files[0]).shape == (16, 16, 3)
    facts = record(tmp_path / "drawn")
    assert [entry["prompt"] for entry in facts["prompts"]] == CAPTIONS[:3]
    assert [entry["files"] for entry in facts["prompts"]] == [files[0:2], files[2:4], files[4:6]]
    settings = SampleConfig(temperature=0.9, top_k=4, guidance=1.5)
    assert facts["sample"] == dataclasses.asdict(settings)
    assert (facts["seed"], facts["num_images"], facts["step"]) == (7, 2, 3)
    assert set(facts["versions"]) >= {"megatron_vilg", "torch"} and len(facts["ids_sha256"]) == 64
    assert "6 pictures" in capsys.readouterr().out
    # The same call draws the same pictures; fewer of them replace all of the earlier ones.
    assert generate(run_folder, tmp_path / "again", *options, "--cfg-scale", "1.5") == 0
    assert record(tmp_path / "again")["ids_sha256"] == facts["ids_sha256"]
    assert generate(run_folder, tmp_path / "drawn", "--prompt", "猫", "-n", "1") == 0
    left = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert left == ["00000-00.png", "generate.json", "grid.png"]


def test_a_grid_shows_the_first_prompts_only(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("drawn", "generate"):
        monkeypatch.setattr(f"megatron_vilg.cli.{module}.GRID_PROMPTS", 2)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:2]), encoding="utf-8")
    assert generate(run_folder, tmp_path / "two", "--prompt-file", str(tmp_path / "prompts.txt"), "-n", "1") == 0
    assert "all of them in" in capsys.readouterr().out
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS[:3]), encoding="utf-8")
    assert generate(run_folder, tmp_path / "three", "--prompt-file", str(tmp_path / "prompts.txt"), "-n", "1") == 0
    assert "up to 64 for each of the first 2 prompts in" in capsys.readouterr().out
    assert len(record(tmp_path / "three")["prompts"]) == 3
    assert np.array_equal(picture(tmp_path / "three" / "grid.png"), picture(tmp_path / "two" / "grid.png"))


def test_a_run_of_another_kernel_can_be_drawn_from(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results do not depend on the kernel, so one that does not run here gives way to one that does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    folder = tmp_path / "run"
    run = write_tiny_run(folder, checkpoint=False)
    trained = dataclasses.replace(run, ops=dataclasses.replace(run.ops, attention="triton"))
    shutil.rmtree(folder / "export")
    write_run_folder_config(trained, folder)
    model = Pipeline.load(run_folder).model
    manifest = Manifest(kind="pretrain", step=3, model=dataclasses.asdict(run.model))
    extra = {name: folder / name for name in ("text_tokenizer", "image_tokenizer")}
    save_model_folder(folder / "export", model.state_dict(), dump_run_config(trained), manifest, extra)
    for source, out in ((folder, "triton"), (run_folder, "auto")):
        assert generate(source, tmp_path / out, "--prompt", CAPTIONS[0], "-n", "1") == 0
    assert record(tmp_path / "triton")["ids_sha256"] == record(tmp_path / "auto")["ids_sha256"]


def test_grid_without_a_font_has_no_prompts(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(canvas, "_FONT_PACKAGE", "no_such_package")
    assert generate(run_folder, tmp_path, "--prompt", "猫", "-n", "2") == 0
    assert "the grid has no prompts written on it" in capsys.readouterr().err
    side = 96
    assert Image.open(tmp_path / "grid.png").size == (2 * side + 8 + 32, side + 33)


def test_a_grid_of_many_pictures_has_lines_and_an_end(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(canvas, "_FONT_PACKAGE", "no_such_package")
    assert generate(run_folder, tmp_path, "--prompt", "猫", "-n", "66") == 0
    assert "66 pictures in" in (said := capsys.readouterr().out) and "up to 64 for each of the first" in said
    assert Image.open(tmp_path / "grid.png").size == (16 * 104 - 8 + 32, 4 * 104 + 25)


def test_grid_with_a_font_has_room_for_prompts(run_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pylopdf_fonts_zh_cn")
    assert generate(run_folder, tmp_path, "--prompt", "猫", "-n", "2") == 0
    grid = picture(tmp_path / "grid.png")
    assert grid.shape[0] > 96 + 33 and (grid[16:40] < 128).any()


def test_rerank_keeps_the_best_captioned(run_folder: Path, tmp_path: Path) -> None:
    assert generate(run_folder, tmp_path / "all", "--prompt", CAPTIONS[0], "-n", "6", "--rerank", "6") == 0
    assert generate(run_folder, tmp_path / "best", "--prompt", CAPTIONS[0], "-n", "2", "--rerank", "6") == 0
    scores = record(tmp_path / "all")["prompts"][0]["scores"]
    assert scores == sorted(scores, reverse=True) and len(scores) == 6
    assert record(tmp_path / "best")["prompts"][0]["scores"] == scores[:2]
    for name in ("00000-00.png", "00000-01.png"):
        assert np.array_equal(picture(tmp_path / "all" / name), picture(tmp_path / "best" / name))


def test_completion_keeps_rows_of_the_picture(run_folder: Path, tmp_path: Path) -> None:
    assert generate(run_folder, tmp_path / "first", "--prompt", CAPTIONS[0], "-n", "1") == 0
    start = ["--image-prefix", str(tmp_path / "first" / "00000-00.png"), "--keep-rows"]
    assert generate(run_folder, tmp_path / "all", "--prompt", CAPTIONS[1], "-n", "2", *start, "4") == 0
    # Every row kept: nothing is left to draw, so that both are the same picture.
    assert np.array_equal(picture(tmp_path / "all" / "00000-00.png"), picture(tmp_path / "all" / "00000-01.png"))
    assert generate(run_folder, tmp_path / "half", "--prompt", CAPTIONS[1], "-n", "2", *start, "2") == 0
    assert record(tmp_path / "half")["keep_rows"] == 2
    assert not np.array_equal(picture(tmp_path / "half" / "00000-00.png"), picture(tmp_path / "half" / "00000-01.png"))


def test_cut_prompts_are_warned_about_once_and_recorded(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "，".join(CAPTIONS[:4])
    assert generate(run_folder, tmp_path, "--prompt", long, "-n", "1", "--rerank", "2") == 0
    (entry,) = record(tmp_path)["prompts"]
    assert entry["tokens_cut"] == entry["tokens"] - 6 > 0
    assert capsys.readouterr().err.count(f"the last {entry['tokens_cut']} are cut") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "猫", "--top-p", "1.5"], "--top-p=1.5: input should be less than or equal to 1"),
        (["--prompt", "猫", "--temperature", "-1"], "--temperature=-1.0: input should be greater than or equal to 0"),
        (["--prompt", "猫", "--cfg-scale", "-2"], "--cfg-scale=-2.0: input should be"),
        (["--prompt", "猫", "-n", "0"], "-n=0: must be at least 1"),
        (["--prompt", "猫", "--max-batch", "0"], "--max-batch=0: must be at least 1"),
        (["--prompt", "猫", "--rerank", "3"], "--rerank=3: must be at least -n=4"),
        (["--prompt", "猫", "--keep-rows", "3"], "--image-prefix and --keep-rows belong together"),
        ([], "no prompt given; works: --prompt"),
        (["--prompt-file", "absent.txt"], "--prompt-file=absent.txt: cannot be read as UTF-8 text"),
        (["--prompt", "猫", "--device", "abacus"], "--device=abacus: torch cannot use it"),
    ],
)
def test_what_cannot_work_is_said_in_one_message(
    run_folder: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--load", str(run_folder), "--out", str(tmp_path / "out"), *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_problems_are_reported_together(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(run_folder, tmp_path, "--prompt", "猫", "--top-k", "-1", "--top-p", "2", "-n", "0") == 2
    error = capsys.readouterr().err
    assert "3 problems" in error and "--top-k=-1" in error and "--top-p=2.0" in error and "-n=0" in error


def test_rows_that_are_not_there_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "start.png")
    start = ["--image-prefix", str(tmp_path / "start.png"), "--keep-rows", "5"]
    assert generate(run_folder, tmp_path / "out", "--prompt", "猫", *start) == 2
    assert "--keep-rows=5: this model has rows 0 to 4" in capsys.readouterr().err


def test_unknown_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "nowhere", tmp_path / "out", "--prompt", "猫") == 2
    assert "CheckpointError" in (error := capsys.readouterr().err) and "nowhere: no such folder" in error


def test_empty_prompt_file_is_named(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    assert generate(run_folder, tmp_path / "out", "--prompt-file", str(tmp_path / "prompts.txt")) == 2
    assert "prompts.txt holds no prompt" in capsys.readouterr().err


def test_foreign_and_unwritable_folders_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "generate.json").write_text("[]")
    assert generate(run_folder, tmp_path, "--prompt", "猫") == 2
    assert "its generate.json is not one of ours" in capsys.readouterr().err
    (tmp_path / "generate.json").write_text("{")
    assert generate(run_folder, tmp_path, "--prompt", "猫", "--worker", "0/2") == 2
    assert "its generate.json is not one of ours" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    # Before the model is looked for.
    assert generate(tmp_path / "no-run", tmp_path / "file" / "out", "--prompt", "猫") == 2
    assert f"cannot be written ({tmp_path / 'file'} is no folder); name another place" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--rerank", "2")], ids=["plain", "rerank"])
@pytest.mark.parametrize("worker", ["0/1", "0/2"])
def test_pictures_are_written_as_they_come(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], worker: str
) -> None:
    for name in ("draw_pixels", "draw_best_ids"):
        monkeypatch.setattr(Pipeline, name, once(getattr(Pipeline, name)))
    prompts = [word for caption in CAPTIONS * 2 for word in ("--prompt", caption)]
    (tmp_path / "00000-00.png").write_text("of an earlier call")
    (tmp_path / "00009-00.png").write_text("of an earlier call")
    (tmp_path / "generate.json").write_text('{"prompts": [{"files": ["00000-00.png", "00009-00.png"]}]}')
    command = [*prompts, "-n", "2", "--max-batch", "2", *options, "--worker", worker]
    assert generate(run_folder, tmp_path, *command) == 130
    # Four batches of two; what the record said is no longer true, so it is gone.
    written = {f"{p:05d}-{i:02d}.png" for p in range(4) for i in range(2)}
    assert {path.name for path in tmp_path.glob("*.png")} - {"00009-00.png"} == written
    assert picture(tmp_path / "00000-00.png").shape == (16, 16, 3)
    assert not (tmp_path / "generate.json").exists()


@pytest.mark.parametrize("options", [(), ("--rerank", "2"), ("--keep-rows", "1")], ids=["plain", "rerank", "prefix"])
def test_prompts_drawn_in_turn_are_those_drawn_at_once(
    run_folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "start.png")
    prompts = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    prefix = ("--image-prefix", str(tmp_path / "start.png")) if "--keep-rows" in options else ()
    command = [*prompts, "-n", "2", "--seed", "5", *options, *prefix]
    assert generate(run_folder, tmp_path / "once", *command) == 0
    assert generate(run_folder, tmp_path / "turns", *command, "--max-batch", "1") == 0
    once, turns = record(tmp_path / "once"), record(tmp_path / "turns")
    assert turns["ids_sha256"] == once["ids_sha256"]
    assert [entry["files"] for entry in turns["prompts"]] == [entry["files"] for entry in once["prompts"]]
    last = once["prompts"][-1]["files"][-1]
    assert np.abs(picture(tmp_path / "once" / last).astype(int) - picture(tmp_path / "turns" / last)).max() <= 1


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """The second call is interrupted."""
    calls: list[None] = []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return method(*args, **options)

    return called


def test_parsing_needs_no_torch() -> None:
    code = (
        "import sys, megatron_vilg.cli.generate, megatron_vilg.cli.caption;"
        "print(*({'torch', 'numpy', 'PIL', 'sentencepiece'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


def test_workers_draw_what_one_draws(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    options = [*prompts, "-n", "2", "--seed", "3", "--rerank", "3"]
    assert generate(run_folder, tmp_path / "one", *options) == 0
    out = tmp_path / "shared"
    for worker in ("2/3", "0/3"):
        assert generate(run_folder, out, *options, "--worker", worker) == 0
        assert not (out / "generate.json").exists()
    assert "other workers are not done" in capsys.readouterr().out
    assert generate(run_folder, out, *options, "--worker", "1/3") == 0
    assert "complete" in capsys.readouterr().out
    one, shared = record(tmp_path / "one"), record(out)
    assert shared["prompts"] == one["prompts"]
    for entry in one["prompts"]:
        for name in entry["files"]:
            assert np.array_equal(picture(out / name), picture(tmp_path / "one" / name))
    assert np.array_equal(picture(out / "grid.png"), picture(tmp_path / "one" / "grid.png"))


def test_workers_of_an_earlier_call_do_not_count(run_folder: Path, tmp_path: Path) -> None:
    three = [word for caption in CAPTIONS[:3] for word in ("--prompt", caption)]
    for worker in ("0/2", "1/2"):
        assert generate(run_folder, tmp_path, *three, "-n", "2", "--worker", worker) == 0
    assert len(record(tmp_path)["prompts"]) == 3
    # Another seed: the part of the other worker is an old one.
    assert generate(run_folder, tmp_path, *three, "-n", "1", "--seed", "1", "--worker", "1/2") == 0
    assert not (tmp_path / "generate.json").exists()
    assert generate(run_folder, tmp_path, *three, "-n", "1", "--seed", "1", "--worker", "0/2") == 0
    assert record(tmp_path)["seed"] == 1
    left = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert left == [f"{number:05d}-00.png" for number in range(3)]
    # More workers than prompts: the idle ones are part of the call all the same.
    for worker in range(4):
        assert generate(run_folder, tmp_path, "--prompt", "猫", "-n", "1", "--worker", f"{worker}/4") == 0
    assert [entry["prompt"] for entry in record(tmp_path)["prompts"]] == ["猫"]
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == ["00000-00.png"]


def test_last_workers_of_equal_process_number_on_two_nodes_write_different_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # both are still writing
    for node in ("n1", "n2"):
        monkeypatch.setattr(socket, "gethostname", lambda node=node: node)
        write_record(tmp_path / "generate.json", {"node": node})
    assert len(partials := list(tmp_path.iterdir())) == 2 and all(path.name.endswith(".partial") for path in partials)


def test_ranks_are_workers(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert generate(run_folder, tmp_path, "--prompt", "猫", "--prompt", "树", "-n", "1") == 0
    assert len(record(tmp_path)["prompts"]) == 2


def test_worker_that_is_none(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(run_folder, tmp_path, "--prompt", "猫", "--worker", "4/4") == 2
    assert "--worker=4/4: works auto, or INDEX/COUNT" in capsys.readouterr().err


def test_end_to_end_decoder_draws_the_same_codes_into_other_pictures(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "joint"
    write_tiny_run(folder, checkpoint=False, reconstructor=ReconstructorConfig(enabled=True))
    options = ["--prompt", CAPTIONS[0], "-n", "2", "--seed", "3"]
    assert generate(folder, tmp_path / "codebook", *options) == 0
    assert generate(folder, tmp_path / "joint-pictures", *options, "--decoder", "end-to-end") == 0
    codebook, joint = (record(tmp_path / name) for name in ("codebook", "joint-pictures"))
    assert codebook["ids_sha256"] == joint["ids_sha256"]
    assert (codebook["decoder"], joint["decoder"]) == ("codebook", "end-to-end")
    pictures = [picture(tmp_path / name / "00000-01.png") for name in ("codebook", "joint-pictures")]
    assert pictures[0].shape == pictures[1].shape and not np.array_equal(*pictures)


def test_end_to_end_decoder_needs_a_reconstructor(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(run_folder, tmp_path / "out", "--prompt", "猫", "--decoder", "end-to-end") == 2
    assert "was trained without a reconstructor. Works: codebook" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
