"""Other pairs than those of a run are refused before its token cache is touched."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vilg.checkpoint.manifest import Manifest, write_manifest
from megatron_vilg.config.schema import RunConfig
from megatron_vilg.data.records import find_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.train.same_pairs import pairs_of, require_own_tokens, require_same_sources
from megatron_vilg.train.stages import prepare
from tests.train.test_run_tokenizers import config, image_folder
from tests.train.test_stages import pairs  # noqa: F401 - a fixture
from tests.train.token_caches import write_cache


def checkpoint(run: Path, cache: TokenCache, step: int = 3, **facts: object) -> Path:
    """A checkpoint of which only the manifest is there."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    counters = pairs_of(cache, Mesh(torch.device("cpu")))
    write_manifest(folder, Manifest(kind="pretrain", step=step, counters=counters, **facts))  # type: ignore[arg-type]
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_refused_start_leaves_the_tokens_alone(
    tmp_path: Path,
    pairs: Path,  # noqa: F811
) -> None:
    out, image = tmp_path / "run", image_folder(tmp_path / "image")

    def start(run: RunConfig, data: Path) -> None:
        assert prepare(run, data, out, image_tokenizer=image) is not None

    start(config(), pairs)
    found = checkpoint(out, TokenCache.open(out / "tokens"))
    start(config(), pairs)
    before = contents(out / "tokens")

    other = shutil.copytree(pairs, tmp_path / "other")
    Image.new("RGB", (16, 16), "white").save(other / "00.png")
    split = dataclasses.replace(config(), data=dataclasses.replace(config().data, val_share=0.3))
    for run, data in ((config(), other), (split, pairs)):
        with pytest.raises(CheckpointError, match="this run has other files [0-9a-f]{16}") as caught:
            start(run, data)
        assert f"{found}: was trained on other pairs than those of --data, data.val_share and" in str(caught.value)
        assert "train: checkpoint has 12 pairs " in str(caught.value) and f"--load-dir {out} " in str(caught.value)
        assert contents(out / "tokens") == before


def test_files_that_were_copied_are_the_same(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 4, "val": 2})
    checkpoint(tmp_path, cache)
    moved = shutil.copytree(tmp_path / "tokens-pairs", tmp_path / "moved", copy_function=shutil.copy)
    parts = find_records(moved)["train"]
    require_same_sources(tmp_path, parts, cache.folder)
    require_same_sources(tmp_path, parts, tmp_path / "no-tokens-yet")
    with pytest.raises(CheckpointError, match="was trained on other pairs"):
        require_same_sources(tmp_path, [], cache.folder)


def test_runs_that_may_go_on_with_any_pairs(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 4})
    require_same_sources(tmp_path / "new", [], cache.folder)
    checkpoint(tmp_path / "made", cache, source={"path": "elsewhere"})
    require_same_sources(tmp_path / "made", [], cache.folder)
    checkpoint(tmp_path / "damaged", cache)
    checkpoint(tmp_path / "damaged", cache, step=6).joinpath("manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"step-00000003: was trained on other pairs"):
        require_same_sources(tmp_path / "damaged", [], cache.folder)


def test_tokens_of_other_pairs_than_the_model_learnt_are_named(tmp_path: Path) -> None:
    cache, run = write_cache(tmp_path / "tokens", {"train": 4}), tmp_path / "run"
    other = write_cache(tmp_path / "other" / "tokens", {"train": 3})
    require_own_tokens(run, other)
    step = checkpoint(run, cache)
    require_own_tokens(run, cache)
    for model, named in ((run, step), (step, step)):
        with pytest.raises(CheckpointError, match=r"train: trained on 4 pairs [0-9a-f]{16}, there 3 pairs ") as caught:
            require_own_tokens(model, other)
        assert f"{other.folder}: holds other pairs than {named} was trained on" in str(caught.value)
        assert "Works: `vilg train` again with the data and options of before" in str(caught.value)
