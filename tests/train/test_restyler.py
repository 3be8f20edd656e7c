"""Training the restyler: what a step sees, that it learns, and that it goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.config.schema import DataConfig, LogConfig
from megatron_vilg.data.library import Library
from megatron_vilg.data.pair_pixels import write_pixel_cache
from megatron_vilg.data.records import find_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError, ConfigError, DataError, TrainingError
from megatron_vilg.train import restyler
from megatron_vilg.train.restyler import train_restyler
from megatron_vilg.train.restyler_batches import Batches, Rows, Source, colour_rotation, held_out
from tests.styled_run import Levels, write_styled_run

CONFIG = RestylerConfig(
    num_layers=1, width=16, num_heads=2, num_steps=6, batch_size=3, num_references=2, checkpoint_every=2, log_every=2
)
LOG = LogConfig(tensorboard=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path, TokenCache]:
    folder = tmp_path_factory.mktemp("restyler")
    cache = write_styled_run(folder / "run", folder / "pairs", Levels().encode)
    library, pairs = Library.of(cache.split("train"))
    pixels = write_pixel_cache(folder / "pixels", cache, find_records(folder / "pairs")).split("train")
    return Source(library, pixels, pairs, DataConfig()), folder / "run", cache


def batches(made: tuple[Source, Path, TokenCache], config: RestylerConfig = CONFIG) -> Batches:
    return Batches(config, made[0], Levels(), torch.device("cpu"))  # type: ignore[arg-type]


PLAIN = dataclasses.replace(CONFIG, view_fall=0.0, hidden_manners=0.0)


def test_a_step_sees_pictures_of_one_thing_per_row(
    made: tuple[Source, Path, TokenCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are, each has the codes of the token cache."""
    monkeypatch.setattr("megatron_vilg.train.restyler_batches._UNTOLD", 0.0)
    library = made[0].library
    codes = {tuple(library.codes[n]): (library.thing[n], library.manner[n]) for n in range(len(library))}
    found = batches(made, PLAIN)
    seen, firsts = set(), set()
    for step in range(8):
        rows = found.rows(step)
        assert rows.pictures.shape == (3, 3, 16) and torch.equal(rows.shown_in[:, 1:], rows.wanted_in[:, 1:])
        # Two pictures of each thing, for three places.
        assert not rows.drawn[:, 0].any() and rows.drawn[:, 1:].all()
        assert (rows.pictures[:, 0] == 11).all() and (rows.shown_in[:, 0] == 3).all()
        for row in range(3):
            shown = [codes[tuple(rows.pictures[row, picture].tolist())] for picture in (1, 2)]
            assert shown[0][0] == shown[1][0] and [manner for _, manner in shown] == rows.shown_in[row, 1:].tolist()
            assert shown[0][1] != shown[1][1]
            seen.add(int(shown[0][0]))
            firsts.add((int(shown[0][0]), int(shown[0][1])))
    assert seen == {0, 1, 2, 3}  # the moon is shown in one style only
    assert len(firsts) > 4  # orders differ


def test_a_row_has_no_more_pictures_than_places(made: tuple[Source, Path, TokenCache]) -> None:
    rows = batches(made, dataclasses.replace(PLAIN, num_references=1)).rows(0)
    assert rows.pictures.shape == (3, 2, 16) and rows.drawn.all()


def test_pictures_are_moved_less_and_less(
    made: tuple[Source, Path, TokenCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_vilg.train.restyler_batches._PLAIN", 0.0)
    known = {tuple(row) for row in made[0].library.codes.tolist()}
    config = dataclasses.replace(CONFIG, num_steps=40, view_fall=0.5, batch_size=100)
    found = batches(made, config)

    def plain(step: int) -> float:
        rows = found.rows(step)
        return float(np.mean([tuple(row) in known for row in rows.pictures[rows.drawn].tolist()]))

    shares = [plain(step) for step in (0, 10, 20, 39)]
    assert shares[0] < shares[1] < 1.0 and shares[2:] == [1.0, 1.0]


def test_a_step_is_a_function_of_seed_and_number(made: tuple[Source, Path, TokenCache]) -> None:
    one, other = batches(made).rows(5), batches(made).rows(5)
    for name in ("pictures", "shown_in", "wanted_in", "drawn"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    differs = batches(made, dataclasses.replace(CONFIG, seed=1)).rows(5)
    assert not torch.equal(one.pictures, differs.pictures)


def test_manners_are_hidden_as_often_as_asked(made: tuple[Source, Path, TokenCache]) -> None:
    rows = batches(made, dataclasses.replace(CONFIG, hidden_manners=0.25, batch_size=100)).rows(0)
    assert 0.15 < (rows.wanted_in[rows.drawn] == 3).float().mean() < 0.35
    assert 0.03 < (rows.shown_in[rows.drawn] == 3).float().mean() < 0.2
    assert (rows.shown_in[~rows.drawn] == 3).all() and (rows.pictures[~rows.drawn] == 11).all()


def test_colours_turn_around_grey() -> None:
    turned = colour_rotation(torch.tensor([0.0, 1.0, 2 * np.pi / 3]))
    torch.testing.assert_close(turned[0], torch.eye(3))
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(turned @ torch.ones(3), torch.ones(3, 3))
    torch.testing.assert_close(turned[2] @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]))


def test_things_in_one_style_teach_nothing(made: tuple[Source, Path, TokenCache]) -> None:
    source, run, cache = made
    library = source.library
    few = library.pictures(4)
    alone = dataclasses.replace(library, thing=library.thing[few], manner=library.manner[few], codes=library.codes[few])
    with pytest.raises(DataError, match=r"in two styles at least, and no two pairs .* \(1 pairs have both fields\)"):
        batches((dataclasses.replace(source, library=alone), run, cache))


def test_held_out_pairs_stand_behind_their_things_pictures(made: tuple[Source, Path, TokenCache]) -> None:
    library, cache = made[0].library, made[2]
    rows = held_out(CONFIG, library, cache.split("val-pairs"), 11)
    assert rows is not None and len(rows.pictures) == len(cache.split("val-pairs")) == 4
    assert rows.drawn[:, -1].all() and rows.drawn.sum() == 4
    for row, record in enumerate(cache.split("val-pairs").records()):
        thing, manner = library.find(record.caption) or (-1, -1)
        assert rows.wanted_in[row, -1] == manner
        shown = library.pictures(thing)
        np.testing.assert_array_equal(rows.pictures[row, :-1].numpy(), library.codes[shown].astype(np.int64))
        np.testing.assert_array_equal(rows.shown_in[row, :-1].numpy(), library.manner[shown])
    unknown = dataclasses.replace(library, things=tuple("abcde"))
    assert held_out(CONFIG, unknown, cache.split("val-pairs"), 11) is None


def trained(
    made: tuple[Source, Path, TokenCache], out: Path, config: RestylerConfig = CONFIG
) -> dict[str, torch.Tensor]:
    found = train_restyler(config, batches(made, config), made[2], out=out, log_options=LOG)
    assert found is not None and set(found[1]) == {"val-pairs"} and not found[0].training
    return found[0].state_dict()


def test_it_learns(made: tuple[Source, Path, TokenCache], tmp_path: Path) -> None:
    config = dataclasses.replace(
        PLAIN,
        num_steps=150,
        batch_size=12,
        width=32,
        turned_colours=0.0,
        input_noise=0.0,
        last_input_noise=0.0,
        checkpoint_every=150,
    )
    found = train_restyler(config, batches(made, config), made[2], out=tmp_path / "restyler", log_options=LOG)
    assert found is not None
    rows = batches(made, config).rows(1000)
    logits = found[0](rows.pictures, rows.shown_in, rows.pictures, rows.wanted_in)[:, -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.pictures[:, -1].flatten())
    assert loss < 0.7 * np.log(11)


@pytest.mark.parametrize("stop_after", [2, 3])
def test_a_resumed_training_equals_a_straight_one(
    made: tuple[Source, Path, TokenCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    straight = trained(made, tmp_path / "straight" / "restyler")

    class Stop(restyler.StopSignals):
        @property
        def requested(self) -> bool:
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked >= stop_after

    with monkeypatch.context() as patch:
        patch.setattr(restyler, "StopSignals", Stop)
        out = tmp_path / "stopped" / "restyler"
        assert train_restyler(CONFIG, batches(made), made[2], out=out, log_options=LOG) is None
    resumed = trained(made, out)
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


def test_checkpoints_of_other_pictures_or_more_steps_are_refused(
    made: tuple[Source, Path, TokenCache], tmp_path: Path
) -> None:
    source, run, cache = made
    out = tmp_path / "restyler"
    trained(made, out)
    fewer = dataclasses.replace(CONFIG, num_steps=4)
    with pytest.raises(ConfigError, match=r"restyler\.num_steps=4: .*more steps behind it.*Works: 6, to keep it"):
        trained(made, out, fewer)
    other = dataclasses.replace(source, library=dataclasses.replace(source.library, codes=source.library.codes[::-1]))
    with pytest.raises(CheckpointError, match="was trained on other pictures"):
        trained((other, run, cache), out)
    with pytest.raises(CheckpointError, match="width"):
        trained(made, out, dataclasses.replace(CONFIG, width=32))


def test_steps_that_are_not_finite_are_left_out_and_too_many_end_it(
    made: tuple[Source, Path, TokenCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = trained(made, tmp_path / "straight" / "restyler")
    loss = restyler.Engine.loss
    spoilt = {2, 3}

    def sometimes(engine: restyler.Engine, rows: Rows, read: torch.Tensor) -> torch.Tensor:
        found = loss(engine, rows, read)
        if not engine.model.training:
            return found
        engine.calls = getattr(engine, "calls", 0) + 1  # type: ignore[attr-defined]
        return found * float("nan") if engine.calls in spoilt else found  # type: ignore[attr-defined]

    monkeypatch.setattr(restyler.Engine, "loss", sometimes)
    fewer = trained(made, tmp_path / "spoilt" / "restyler")
    assert all(tensor.isfinite().all() for tensor in fewer.values())
    assert not torch.equal(fewer["head.weight"], straight["head.weight"])
    spoilt.update(range(100))
    monkeypatch.setattr(restyler, "_MOST_SKIPPED", 3)
    with pytest.raises(
        TrainingError, match=r"3 steps in a row, up to step 3, were not finite. Lower restyler.lr=0.003"
    ):
        trained(made, tmp_path / "lost" / "restyler")


def test_going_on_with_other_settings_is_said(
    made: tuple[Source, Path, TokenCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(made, tmp_path / "restyler")
    with caplog.at_level("WARNING"):
        trained(made, tmp_path / "restyler", dataclasses.replace(CONFIG, num_steps=8, lr=1e-3))
    assert "going on with restyler.lr=0.001; the run so far used 0.003" in caplog.text


def test_lines_of_saved_steps_say_how_well_pairs_are_drawn_that_are_not_learnt(
    made: tuple[Source, Path, TokenCache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = train_restyler(CONFIG, batches(made), made[2], out=tmp_path / "restyler", log_options=LOG)
    assert found is not None
    (last,) = (line for line in caplog.text.splitlines() if "step 6/6 " in line)
    assert f"val-pairs {found[1]['val-pairs']:.3f}" in last


def test_fewer_and_fewer_codes_are_read_wrongly(
    made: tuple[Source, Path, TokenCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, shares = restyler.Engine.loss, []

    def seen(engine: restyler.Engine, rows: Rows, read: torch.Tensor) -> torch.Tensor:
        if engine.model.training:
            shares.append((read != rows.pictures).float().mean().item())
        return loss(engine, rows, read)

    monkeypatch.setattr(restyler.Engine, "loss", seen)
    config = dataclasses.replace(
        CONFIG, batch_size=50, num_steps=4, checkpoint_every=4, input_noise=0.8, last_input_noise=0.0
    )
    trained(made, tmp_path / "restyler", config)
    # One code in eleven is replaced by itself, but for the hidden ones (a third), which are no picture's.
    for share, noise in zip(shares, (0.8, 0.6, 0.4, 0.2), strict=True):
        assert abs(share - noise * (1 / 3 + 2 / 3 * 10 / 11)) < 0.05
