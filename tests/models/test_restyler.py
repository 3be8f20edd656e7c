"""The restyler: who sees whom, and steps that agree with the whole."""

from __future__ import annotations

import pytest
import torch

from megatron_vilg.config.restyler import RestylerConfig
from megatron_vilg.models.restyler import Restyler

SIDE, CODES, MANNERS = 3, 7, 4


@pytest.fixture
def model() -> Restyler:
    torch.manual_seed(0)
    config = RestylerConfig(num_layers=2, width=16, num_heads=2, num_references=2)
    restyler = Restyler(config, torch.randn(CODES, 4), SIDE, MANNERS)
    for parameter in restyler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return restyler.eval()


def drawn(rows: int = 2, pictures: int = 3) -> list[torch.Tensor]:
    """Arguments of ``forward``: what is read of a drawing need not be what it is as a reference."""
    codes = torch.randint(CODES, (2, rows, pictures, SIDE**2))
    manners = torch.randint(MANNERS, (2, rows, pictures))
    return [codes[0], manners[0], codes[1], manners[1]]


def differs(model: Restyler, arguments: list[torch.Tensor], number: int, at: object) -> torch.Tensor:
    """Which predictions [B, R + 1, N] change with one argument's value at a place."""
    changed = [argument.clone() for argument in arguments]
    count = CODES if number in (0, 2) else MANNERS
    changed[number][at] = (changed[number][at] + 1) % count  # type: ignore[index]
    return (model(*arguments) != model(*changed)).any(dim=-1)


def test_shapes(model: Restyler) -> None:
    assert model(*drawn()).shape == (2, 3, SIDE**2, CODES)
    assert model.hidden_code == CODES and model.num_codes == SIDE**2


def test_a_drawing_sees_its_own_codes_so_far_and_no_other_drawing(model: Restyler) -> None:
    place = 4
    found = differs(model, drawn(), 2, (slice(None), 1, place))
    assert not found[:, [0, 2]].any() and not found[:, 1, : place + 1].any() and found[:, 1, place + 1 :].all()
    manner = differs(model, drawn(), 3, (slice(None), 1))
    assert not manner[:, [0, 2]].any() and manner[:, 1].all()


@pytest.mark.parametrize("number", [0, 1])
def test_a_drawing_sees_the_pictures_before_it(model: Restyler, number: int) -> None:
    for picture in range(3):
        found = differs(model, drawn(), number, (slice(None), picture))
        assert not found[:, : picture + 1].any() and found[:, picture + 1 :].all()


def test_the_last_code_of_a_drawing_is_not_read(model: Restyler) -> None:
    assert not differs(model, drawn(), 2, (slice(None), slice(None), -1)).any()


def test_steps_agree_with_the_whole(model: Restyler) -> None:
    pictures, shown_in, read, wanted_in = drawn()
    with torch.no_grad():
        whole = model(pictures, shown_in, read, wanted_in)[:, -1]
        seen = model.look(pictures[:, :-1], shown_in[:, :-1]).of(torch.tensor([1, 0, 1]))
        rows = torch.tensor([1, 0, 1])
        before = torch.full((3,), model.hidden_code)
        for place in range(model.num_codes):
            logits = model.step(seen, place, before, wanted_in[rows, -1])
            torch.testing.assert_close(logits, whole[rows, place], rtol=1e-5, atol=1e-5)
            before = read[rows, -1, place]


def test_a_new_one_starts_from_the_seed_and_predicts_about_evenly() -> None:
    config = RestylerConfig(num_layers=1, width=16, num_heads=2)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Restyler(config, torch.eye(CODES), SIDE, MANNERS))
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert models[0](*drawn()).std() < 1.0
