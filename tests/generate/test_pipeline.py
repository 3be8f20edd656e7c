"""From a folder to pictures and captions, and every way in which the folder can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vilg.checkpoint.dcp_folder import DcpSource
from megatron_vilg.checkpoint.export import save_model_folder
from megatron_vilg.checkpoint.manifest import TOKENIZERS, Manifest, read_manifest, write_manifest
from megatron_vilg.checkpoint.share import load_share
from megatron_vilg.config.load import dump_run_config
from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.errors import CheckpointError, DataError
from megatron_vilg.generate.load import load_parts
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.generate.weights import use_bf16
from megatron_vilg.sequence import TextToken
from tests.tiny_run import CAPTIONS, write_tiny_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    write_tiny_run(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(run_folder: Path) -> Pipeline:
    return Pipeline.load(run_folder)


def test_export_checkpoint_and_moved_export_draw_the_same(run_folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    expected = pipeline.draw_ids(CAPTIONS[:2], num_images=2, seed=1)
    assert expected.shape == (2, 2, 16)
    shutil.copytree(run_folder / "export", tmp_path / "moved")
    shutil.copytree(run_folder, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "export")
    for path in (run_folder / "export", tmp_path / "moved", tmp_path / "unfinished", str(tmp_path / "moved")):
        assert torch.equal(Pipeline.load(path).draw_ids(CAPTIONS[:2], num_images=2, seed=1), expected)


def test_an_outdated_export_is_used_with_a_warning(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.move(checkpoints / "step-00000003", checkpoints / "step-00000009")
    logging.getLogger("megatron_vilg").propagate = True
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        Pipeline.load(tmp_path / "run")
    assert "export holds step 3, but there is a checkpoint of step 9" in caplog.text


def test_draw_gives_pictures_in_prompt_order(pipeline: Pipeline) -> None:
    pictures = pipeline.draw(CAPTIONS[:2], num_images=2, seed=4)
    ids = pipeline.draw_ids(CAPTIONS[:2], num_images=2, seed=4)
    pixels = pipeline.decode(ids)
    assert pixels.shape == (2, 2, 3, 16, 16) and pixels.abs().max() <= 1
    assert [picture.size for picture in pictures] == [(16, 16)] * 4
    third = (pixels[1, 0].permute(1, 2, 0) + 1) * 127.5
    np.testing.assert_allclose(np.asarray(pictures[2]), third.numpy(), atol=0.51)


def test_settings_default_to_those_of_the_run(pipeline: Pipeline) -> None:
    default = pipeline.draw_ids(CAPTIONS[:1], num_images=2)
    assert torch.equal(
        default, pipeline.draw_ids(CAPTIONS[:1], num_images=2, settings=SampleConfig(temperature=0.9, top_k=6))
    )
    assert not torch.equal(
        default, pipeline.draw_ids(CAPTIONS[:1], num_images=2, settings=SampleConfig(temperature=2.0))
    )


def test_pictures_and_codes_get_the_same_captions(pipeline: Pipeline, tmp_path: Path) -> None:
    pictures = pipeline.draw(CAPTIONS[:3], seed=2)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    codes = pipeline.encode_images(pictures)
    assert codes.shape == (3, 16) and torch.equal(codes, pipeline.encode_images(paths))
    captions = pipeline.caption(codes, beam=2)
    assert captions == pipeline.caption(paths, beam=2) and all(isinstance(text, str) for text in captions)
    ids = pipeline.caption_ids(codes, beam=2)
    assert [" ".join(pipeline.text_tokenizer.decode(row).split()) for row in ids] == captions
    assert all(token >= len(TextToken) for row in ids for token in row)
    assert pipeline.caption([]) == []


def test_transparent_pictures_are_laid_on_white(pipeline: Pipeline) -> None:
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    white = Image.new("RGB", (20, 20), (255, 255, 255))
    assert torch.equal(pipeline.encode_images([clear]), pipeline.encode_images([white]))


def test_scores_belong_to_their_prompts(pipeline: Pipeline) -> None:
    ids = pipeline.draw_ids(CAPTIONS[:2], num_images=3)
    scores = pipeline.score(ids, CAPTIONS[:2], max_batch=4)
    for prompt in range(2):
        alone = pipeline.caption_log_likelihood(ids[prompt], [CAPTIONS[prompt]] * 3)
        torch.testing.assert_close(scores[prompt], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores, pipeline.score(ids, CAPTIONS[1::-1]))


def test_best_drawings_are_those_with_the_best_scores(pipeline: Pipeline) -> None:
    settings = SampleConfig(rerank=5, rerank_drawing_weight=0.5)
    every = pipeline.draw_ids(CAPTIONS[:2], num_images=5, settings=settings, seed=3)
    scores = pipeline.score(every, CAPTIONS[:2], drawing_weight=0.5)
    ids, kept = pipeline.draw_best_ids(CAPTIONS[:2], num_images=2, settings=settings, seed=3)
    assert kept is not None
    for row in range(2):
        order = scores[row].argsort(descending=True)[:2]
        assert torch.equal(ids[row], every[row, order])
        torch.testing.assert_close(kept[row], scores[row, order])


def test_all_drawings_are_kept_where_none_are_asked_for_in_addition(pipeline: Pipeline) -> None:
    ids, scores = pipeline.draw_best_ids(CAPTIONS[:1], num_images=2, settings=SampleConfig(), seed=3)
    assert scores is None
    assert torch.equal(ids, pipeline.draw_ids(CAPTIONS[:1], num_images=2, settings=SampleConfig(), seed=3))


def test_caption_of_candidates_is_the_one_both_directions_find_likeliest(
    pipeline: Pipeline,
) -> None:
    codes = pipeline.draw_ids(CAPTIONS[:3], seed=2)[:, 0]
    said = pipeline.caption_of_candidates(codes, 6, seed=2)
    assert said == pipeline.caption_of_candidates(codes, 6, seed=2) and len(said) == len(codes)
    drawn = pipeline.caption(codes.repeat_interleave(6, dim=0), settings=SampleConfig(), seed=2)
    for row, greedy in enumerate(pipeline.caption(codes)):
        options = [text for text in [greedy, *drawn[6 * row : 6 * row + 6]] if text]
        scores = pipeline.score(codes[row].expand(len(options), 1, -1), options, drawing_weight=1.0)[:, 0]
        chosen = pipeline.score(codes[row][None, None], [said[row]], drawing_weight=1.0).item()
        assert chosen == pytest.approx(scores.max().item(), abs=1e-3)


def test_bf16_draws_and_captions(run_folder: Path) -> None:
    pipeline = Pipeline.load(run_folder, precision="bf16")
    ids = pipeline.draw_ids(CAPTIONS[:1], num_images=2, settings=SampleConfig(guidance=2.0))
    assert ids.shape == (1, 2, 16) and len(pipeline.caption(ids[0], beam=2)) == 2


@pytest.mark.parametrize("with_export", [True, False], ids=["export", "checkpoint"])
def test_weights_are_rounded_as_they_are_read(with_export: bool, run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    if not with_export:
        shutil.rmtree(tmp_path / "run" / "export")
    exact = load_parts(tmp_path / "run", torch.device("cpu")).model
    use_bf16(exact)
    rounded = load_parts(tmp_path / "run", torch.device("cpu"), in_bf16=True).model.state_dict()
    for name, value in exact.state_dict().items():
        assert rounded[name].dtype == value.dtype and torch.equal(rounded[name], value), name


def test_long_prompts_are_cut_with_a_warning(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = "水彩画的红苹果，扁平风格的猫，线描的树"
    tokens = pipeline.text_tokenizer.encode(long)
    logging.getLogger("megatron_vilg").propagate = True
    with caplog.at_level(logging.WARNING, logger="megatron_vilg"):
        ids, lengths = pipeline.encode_prompts([long, "猫"])
    assert ids[0].tolist() == tokens[:6] and lengths[0] == 6 and lengths[1] < 6
    assert f"has {len(tokens)} tokens" in caplog.text and f"the last {len(tokens) - 6} are cut" in caplog.text
    assert caplog.text.count("cut") == 1


def test_missing_and_foreign_folders_are_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"Looked for model.safetensors, export/model.safetensors and .*step-\*"):
        Pipeline.load(tmp_path)
    with pytest.raises(CheckpointError, match="holds 'image-tokenizer', not a generator"):
        Pipeline.load(run_folder / "image_tokenizer")
    step = next((run_folder / "checkpoints").iterdir())
    with pytest.raises(
        CheckpointError, match=f"is one checkpoint of a run. Works: the run folder, {run_folder}, whose"
    ):
        Pipeline.load(step)


@pytest.mark.parametrize("name", ["text_tokenizer", "image_tokenizer"])
def test_missing_tokenizer_is_named(run_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run_folder / "export", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / name)
    with pytest.raises(CheckpointError, match=f"{name} is missing; looked for .*moved/{name}"):
        Pipeline.load(tmp_path / "moved")


def test_tokenizers_of_another_model_are_refused(run_folder: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    model = dataclasses.replace(pipeline.config.model, text_vocab_size=99, image_vocab_size=12)
    config = dataclasses.replace(pipeline.config, model=model)
    extra = {name: run_folder / name for name in ("text_tokenizer", "image_tokenizer")}
    manifest = Manifest(kind="pretrain", model=dataclasses.asdict(model))
    save_model_folder(tmp_path / "other", pipeline.model.state_dict(), dump_run_config(config), manifest, extra)
    with pytest.raises(CheckpointError, match="text tokens: the model has 99.*image codes: the model has 12"):
        Pipeline.load(tmp_path / "other")


@pytest.mark.parametrize("name", ["text_tokenizer", "image_tokenizer"])
def test_another_tokenizer_of_the_same_size_is_refused(run_folder: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(run_folder / "export", tmp_path / "export")
    files = {name: hashlib.sha256((folder / name / file).read_bytes()) for name, file in TOKENIZERS.items()}
    named = dataclasses.replace(read_manifest(folder), tokenizers={n: file.hexdigest() for n, file in files.items()})
    write_manifest(folder, named)
    Pipeline.load(folder)
    write_manifest(folder, dataclasses.replace(named, tokenizers={**named.tokenizers, name: "0" * 64}))
    with pytest.raises(CheckpointError, match=f"(?s){name}/.*: is not the tokenizer of these weights .*0000"):
        Pipeline.load(folder)


def test_weights_that_do_not_fit_are_named(run_folder: Path, pipeline: Pipeline) -> None:
    state = dict(pipeline.model.state_dict())
    with DcpSource(run_folder / "checkpoints" / "step-00000003") as source:
        load_share(source, state, ranks=1, rank=0)
        state["norm.weight"], state["extra"] = torch.zeros(5), torch.zeros(2)
        words = r"(?s)norm.weight: has shape \[16\]; the model wants \[5\].*extra: is missing"
        with pytest.raises(CheckpointError, match=words):
            load_share(source, state, ranks=1, rank=0)


def test_the_pickle_of_a_checkpoint_is_not_executed(run_folder: Path, tmp_path: Path) -> None:
    class Command:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    run = tmp_path / "run"
    shutil.copytree(run_folder, run, ignore=shutil.ignore_patterns("export"))
    step = run / "checkpoints" / "step-00000003"
    manifest = read_manifest(step)
    (step / ".metadata").write_bytes(pickle.dumps(Command()))
    write_manifest(step, manifest)  # who can change one file can change the other
    with pytest.raises(CheckpointError, match="is not what torch.distributed.checkpoint writes"):
        load_parts(run, torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_bad_pictures_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png: not a readable picture"):
        pipeline.caption([tmp_path / "text.png"])
    with pytest.raises(DataError, match=r"absent.png: cannot be read \(No such file"):
        pipeline.caption([tmp_path / "absent.png"])


def test_pixels_of_a_long_list_are_those_of_its_codes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = pipeline.decode

    def counting(ids: torch.Tensor) -> torch.Tensor:
        decoded.append(len(ids))
        return original(ids)

    monkeypatch.setattr(pipeline, "decode", counting)
    seen: list[tuple[int, int]] = []
    ids, pixels = pipeline.draw_pixels(
        CAPTIONS[:2], num_images=3, seed=4, max_batch=4, progress=lambda *x: seen.append(x)
    )
    assert decoded == [3, 3] and seen[-1] == (96, 96)
    assert torch.equal(ids, pipeline.draw_ids(CAPTIONS[:2], num_images=3, seed=4))
    torch.testing.assert_close(pixels, original(ids), atol=1e-5, rtol=1e-5)


def test_int8_draws_and_captions(run_folder: Path) -> None:
    pipeline = Pipeline.load(run_folder, precision="int8")
    ids, pixels = pipeline.draw_pixels(CAPTIONS[:1], num_images=2, seed=0)
    assert pixels.isfinite().all() and len(pipeline.caption(ids[0])) == 2
