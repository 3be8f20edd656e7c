"""Drawing through the hidden states: they are what cached drawing saw, and one state more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vilg.config.schema import ReconstructorConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.sequence import Direction
from tests.tiny_run import CAPTIONS, write_tiny_run


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("joint") / "run"
    write_tiny_run(folder, reconstructor=ReconstructorConfig(enabled=True))
    return Pipeline.load(folder)


def test_states_are_those_of_cached_drawing_with_one_step_more(pipeline: Pipeline) -> None:
    model = pipeline.model
    text_ids, text_len = pipeline.encode_prompts(CAPTIONS[:2])
    ids = pipeline.draw_ids(CAPTIONS[:2], seed=5)[:, 0]
    seen: list[torch.Tensor] = []
    assert model.norm is not None
    with inference(model):
        decoder = Decoder(model, prefill(model, Direction.TEXT_TO_IMAGE, text_ids, text_len), 1)
        hook = model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for token in range(ids.shape[1]):  # drawing stops one earlier: nothing follows the last code
            decoder.step(ids[:, token])
        hook.remove()
        states = model.gold_states(text_ids, ids, text_len)
    assert torch.allclose(torch.stack(seen, dim=1), states, atol=1e-4)


def test_pictures_do_not_depend_on_their_neighbours(pipeline: Pipeline) -> None:
    ids = pipeline.draw_ids(CAPTIONS[:3], num_images=2, seed=1)
    pictures = pipeline.decode_end_to_end(ids, CAPTIONS[:3])
    assert pictures.shape == (3, 2, 3, 16, 16) and pictures.abs().max() <= 1.0
    one = pipeline.decode_end_to_end(ids[1:2, 1:], CAPTIONS[1:2])
    assert torch.allclose(one[0, 0], pictures[1, 1], atol=1e-4)
    other = pipeline.decode_end_to_end(ids[1:2, 1:], CAPTIONS[2:3])
    assert not torch.allclose(other[0, 0], pictures[1, 1], atol=1e-3), "the caption must matter"
    assert pipeline.decode_end_to_end(ids[:0], []).shape[0] == 0


def test_checkpoint_and_export_decode_the_same(pipeline: Pipeline, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "run", export=False, reconstructor=ReconstructorConfig(enabled=True))
    ids = pipeline.draw_ids(CAPTIONS[:1], seed=1)
    again = Pipeline.load(tmp_path / "run")
    assert again.model.reconstructor is not None
    assert again.decode_end_to_end(ids, CAPTIONS[:1]).shape == (1, 1, 3, 16, 16)


def test_runs_without_reconstructor_say_so(tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "run", checkpoint=False)
    plain = Pipeline.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="was trained without a reconstructor"):
        plain.decode_end_to_end(torch.zeros(1, 1, 16, dtype=torch.int64), CAPTIONS[:1])
