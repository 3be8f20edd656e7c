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
    config = RestylerConfig(num_layers=2, width=16, num_heads=2, num_references=2, num_targets=3)
    restyler = Restyler(config, torch.randn(CODES, 4), SIDE, MANNERS)
    for parameter in restyler.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return restyler.eval()


def drawn(rows: int = 2, references: int = 2, targets: int = 3) -> list[torch.Tensor]:
    codes = torch.randint(CODES, (rows, references + targets, SIDE**2))
    manners = torch.randint(MANNERS, (rows, references + targets))
    return [codes[:, :references], manners[:, :references], codes[:, references:], manners[:, references:]]


def test_shapes(model: Restyler) -> None:
    assert model(*drawn()).shape == (2, 3, SIDE**2, CODES)
    assert model.hidden_code == CODES and model.num_codes == SIDE**2


def test_a_target_sees_the_references_and_its_own_codes_so_far(model: Restyler) -> None:
    references, shown_in, targets, wanted_in = drawn()
    before = model(references, shown_in, targets, wanted_in)
    place = 4
    changed = targets.clone()
    changed[:, 1, place] = (changed[:, 1, place] + 1) % CODES
    after = model(references, shown_in, changed, wanted_in)
    differs = (before != after).any(dim=-1)
    assert not differs[:, [0, 2]].any() and not differs[:, 1, : place + 1].any() and differs[:, 1, place + 1 :].all()
    for changed_references, changed_manners in (
        ((references + 1) % CODES, shown_in),
        (references, (shown_in + 1) % MANNERS),
    ):
        assert (model(changed_references, changed_manners, targets, wanted_in) != before).any(dim=-1).all()
    assert (model(references, shown_in, targets, (wanted_in + 1) % MANNERS) != before).any(dim=-1).all()


def test_the_last_code_of_a_target_is_not_read(model: Restyler) -> None:
    references, shown_in, targets, wanted_in = drawn()
    changed = targets.clone()
    changed[:, :, -1] = (changed[:, :, -1] + 1) % CODES
    assert torch.equal(model(references, shown_in, targets, wanted_in), model(references, shown_in, changed, wanted_in))


def test_steps_agree_with_the_whole(model: Restyler) -> None:
    references, shown_in, targets, wanted_in = drawn(targets=1)
    with torch.no_grad():
        whole = model(references, shown_in, targets, wanted_in)[:, 0]
        seen = model.look(references, shown_in).of(torch.tensor([1, 0, 1]))
        rows = torch.tensor([1, 0, 1])
        before = torch.full((3,), model.hidden_code)
        for place in range(model.num_codes):
            logits = model.step(seen, place, before, wanted_in[rows, 0])
            torch.testing.assert_close(logits, whole[rows, place], rtol=1e-5, atol=1e-5)
            before = targets[rows, 0, place]


def test_a_new_one_starts_from_the_seed_and_predicts_about_evenly() -> None:
    config = RestylerConfig(num_layers=1, width=16, num_heads=2)
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Restyler(config, torch.eye(CODES), SIDE, MANNERS))
    for (name, one), (_, other) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert models[0](*drawn()).std() < 1.0
