"""``--tensor``: several ranks draw and caption with one model, the first one writes; what cannot work is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vilg.cli.main import main
from megatron_vilg.config.schema import ReconstructorConfig
from megatron_vilg.generate.pipeline import Pipeline
from tests.helpers import run_distributed
from tests.tiny_run import CAPTIONS, write_tiny_run

PROMPTS = [word for caption in CAPTIONS[:3] for word in ("--prompt", caption)]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tensor") / "run"
    write_tiny_run(folder, reconstructor=ReconstructorConfig(enabled=True))
    return folder


@pytest.fixture(scope="module")
def pictures(run_folder: Path) -> list[str]:
    paths = [run_folder / f"{number}.png" for number in range(3)]
    for path, picture in zip(paths, Pipeline.load(run_folder).draw(CAPTIONS[:3]), strict=True):
        picture.save(path)
    return [str(path) for path in paths]


def commands(port: int, *calls: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each command, run one after the other by all ranks together."""
    dist.barrier()  # who is still connecting would miss those who have gone on
    dist.destroy_process_group()
    answers = []
    for number, words in enumerate(calls):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port + number))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
        answers.append((code, out.getvalue(), err.getvalue()))
    return answers


def generate(run_folder: Path, out: Path, *options: str) -> list[str]:
    return ["generate", "--load", str(run_folder), "--out", str(out), "--device", "cpu", *options]


def caption(run_folder: Path, *options: str) -> list[str]:
    return ["caption", "--load", str(run_folder), "--device", "cpu", *options]


def record(out: Path) -> dict[str, Any]:
    """Of a call, without what says how it was shared out."""
    facts = json.loads((out / "generate.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if key not in ("tensor", "device", "load", "prompts_sha256")}


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


DRAWINGS: dict[str, list[str]] = {
    "plain": ["-n", "2", "--seed", "3"],
    "guidance": ["-n", "2", "--cfg-scale", "2", "--top-p", "0.9", "--max-batch", "3"],
    "rerank": ["-n", "1", "--rerank", "3"],
    "end to end": ["-n", "1", "--decoder", "end-to-end"],
}
CAPTIONING: dict[str, list[str]] = {
    "greedy": [],
    "beam": ["--beam", "3"],
    "sampled": ["--temperature", "1.2", "--seed", "2"],
    "candidates": ["--candidates", "4"],
}


def test_two_ranks_draw_what_one_draws(
    run_folder: Path, pictures: list[str], tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    drawings = DRAWINGS | {"completion": ["-n", "2", "--image-prefix", pictures[0], "--keep-rows", "2"]}
    for name, options in drawings.items():
        assert main(generate(run_folder, tmp_path / name, *PROMPTS, *options)) == 0
    calls = [generate(run_folder, tmp_path / f"{n} x2", *PROMPTS, *o, "--tensor", "2") for n, o in drawings.items()]
    first, second = run_distributed(commands, 2, free_port, *calls)
    assert {code for code, _, _ in first + second} == {0}, (first, second)
    assert all("pictures in" in text for _, text, _ in first) and not any(text for _, text, _ in second)
    for name in drawings:
        one, two = record(tmp_path / name), record(tmp_path / f"{name} x2")
        for mine, theirs in zip(two["prompts"], one["prompts"], strict=True):
            assert mine.pop("scores", []) == pytest.approx(theirs.pop("scores", []), abs=1e-4)
        assert two == one
        assert files(tmp_path / f"{name} x2").keys() == files(tmp_path / name).keys()
    for name in drawings.keys() - {"end to end"}:  # whose decoder reads hidden states, equal but for rounding
        assert files(tmp_path / f"{name} x2") == files(tmp_path / name)


def test_two_ranks_caption_as_one_does(
    run_folder: Path, pictures: list[str], tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = []
    for options in CAPTIONING.values():
        assert main(caption(run_folder, *pictures, *options)) == 0
        alone.append(capsys.readouterr().out)
    target = tmp_path / "captions.json"
    calls = [caption(run_folder, *pictures, *o, "--tensor", "2", "--json", str(target)) for o in CAPTIONING.values()]
    first, second = run_distributed(commands, 2, free_port, *calls)
    assert [(code, out) for code, out, _ in first] == [(0, text) for text in alone], first
    assert [(code, out) for code, out, _ in second] == [(0, "")] * len(calls)
    assert [entry["id"] for entry in json.loads(target.read_text(encoding="utf-8"))] == pictures


def test_a_checkpoint_is_read_in_shares_too(tmp_path: Path, free_port: int) -> None:
    write_tiny_run(tmp_path / "run", export=False)
    options = [*PROMPTS, "-n", "2"]
    assert main(generate(tmp_path / "run", tmp_path / "one", *options)) == 0
    call = generate(tmp_path / "run", tmp_path / "two", *options, "--tensor", "2")
    answers = run_distributed(commands, 2, free_port, call)
    assert [answer[0][0] for answer in answers] == [0, 0], answers
    assert record(tmp_path / "two") == record(tmp_path / "one")
    assert "each of 2 ranks holds" in answers[0][0][2]


def test_groups_of_ranks_share_out_the_prompts(run_folder: Path, tmp_path: Path, free_port: int) -> None:
    options = [*PROMPTS, "-n", "2", "--seed", "5"]
    assert main(generate(run_folder, tmp_path / "one", *options)) == 0
    call = generate(run_folder, tmp_path / "four", *options, "--tensor", "2")
    answers = run_distributed(commands, 4, free_port, call)
    assert [answer[0][0] for answer in answers] == [0] * 4, answers
    assert [bool(answer[0][1]) for answer in answers] == [True, False, True, False]
    one, four = record(tmp_path / "one"), record(tmp_path / "four")
    assert four["prompts"] == one["prompts"] and len(four["ids_sha256"]) == 2
    assert files(tmp_path / "four") == files(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_starts_the_ranks(run_folder: Path, tmp_path: Path) -> None:
    assert main(generate(run_folder, tmp_path / "one", *PROMPTS)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = generate(run_folder, tmp_path / "two", *PROMPTS, "--tensor", "2")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "-m", "megatron_vilg", *words], check=True, env=environment, timeout=300)
    assert record(tmp_path / "two") == record(tmp_path / "one")


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (1, ["--tensor", "0"], "--tensor=0: must be at least 1"),
        (1, ["--tensor", "2"], "--tensor=2: needs 2 processes, there is one. Works: torchrun --nproc-per-node 2 -m"),
        (6, ["--tensor", "4"], "--tensor=4: must divide the number of processes, 6. Works: 1, 2, 3, 6"),
        (2, ["--tensor", "2", "--precision", "int8"], "--precision=int8: with --tensor=2 its scales"),
        (
            4,
            ["--tensor", "2", "--worker", "0/3"],
            "--worker=0/3: names one share, but 4 processes with --tensor=2 are 2",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(
    tmp_path: Path,
    size: int,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, str(value))
    assert main(generate(tmp_path / "nowhere", tmp_path / "out", "--prompt", "猫", *options)) == 2
    error = capsys.readouterr().err
    assert message in error and "1 problem" in error and not (tmp_path / "out").exists()


def test_captions_are_not_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert main(caption(tmp_path / "nowhere", "picture.png", "--tensor", "2")) == 2
    error = capsys.readouterr().err
    assert "--tensor=2: pictures are not shared out, so it must be the number of processes, 4. Works: 4" in error


def test_heads_must_divide_and_files_must_be_sound(run_folder: Path, tmp_path: Path, free_port: int) -> None:
    """Found out by all ranks: the first without reading weights, the second by one of them for all."""
    write_tiny_run(tmp_path / "run", checkpoint=False)
    weights = tmp_path / "run" / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    call = generate(run_folder, tmp_path / "out", "--prompt", "猫", "--tensor", "4")
    for answer in run_distributed(commands, 4, free_port, call):
        assert "--tensor=4: must divide the generator's 2 attention heads. Works: 1, 2" in answer[0][2]
        assert answer[0][0] == 2 and "attention over whole rows" not in answer[0][2]
    call = generate(tmp_path / "run", tmp_path / "out", "--prompt", "猫", "--tensor", "2")
    for answer in run_distributed(commands, 2, free_port + 1, call):
        assert answer[0][0] == 2 and "model.safetensors has the right size but its content changed" in answer[0][2]
    assert not (tmp_path / "out").exists()
