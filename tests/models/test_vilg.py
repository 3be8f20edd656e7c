"""What the model may know where: leaks, conditions, and the sizes of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from megatron_vilg.config.presets import PRESETS
from megatron_vilg.data.batch import build_targets
from megatron_vilg.models.layers import Block
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import Implementation, prepare
from megatron_vilg.parallel.recompute import Recompute, apply_recompute
from megatron_vilg.sequence import Direction, TextToken
from tests.tiny import tiny_batch, tiny_config, tiny_model

T2I, I2T = Direction.TEXT_TO_IMAGE, Direction.IMAGE_TO_TEXT
IMPLEMENTATIONS: tuple[Implementation, ...] = ("dense", "sdpa", "fold")


@pytest.fixture(params=IMPLEMENTATIONS)
def model(request: pytest.FixtureRequest) -> ViLG:
    return tiny_model(implementation=request.param).eval()


def row(model: ViLG, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One row with all text slots used: text ids [1, L], codes [1, N], text_len [1]."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, config.text_vocab_size, (1, config.num_text_slots), generator=generator)
    image = torch.randint(0, config.image_vocab_size, (1, config.spec.num_image_tokens), generator=generator)
    return text, image, torch.tensor([config.num_text_slots])


def changed(ids: Tensor, place: int, vocabulary: int, low: int = 0) -> Tensor:
    other = ids.clone()
    other[:, place] = low + (ids[:, place] - low + 1) % (vocabulary - low)
    return other


@torch.no_grad()
def moved(before: Tensor, after: Tensor) -> Tensor:
    """Which positions of [1, n, ...] differ by more than rounding."""
    return (before - after).abs().amax(-1)[0] > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("direction", [T2I, I2T])
def test_every_position_is_fed_what_the_layout_says(direction: Direction) -> None:
    config = tiny_config(image_side=3, codebook_dim=2)
    embed = tiny_model(config).embed
    assert embed is not None and embed.segment is not None and embed.code_projection is not None
    embed.codebook.normal_(generator=torch.Generator().manual_seed(0))
    text, image, _ = row(tiny_model(config))
    source, target = 2 * direction, 2 * direction + 1  # segments: text source, image target, image source, text target

    def word(token: int, place: int) -> Tensor:
        return embed.text.weight[token] + embed.position.weight[place]

    def code(number: int) -> Tensor:
        token = int(image[0, number])
        placed = embed.row.weight[number // 3] + embed.column.weight[number % 3]
        return embed.image.weight[token] + embed.code_projection.weight @ embed.codebook[token] + placed

    words = [word(int(token), 1 + place) for place, token in enumerate(text[0])]
    codes = [code(number) for number in range(9)]
    begin, end = embed.boundary.weight
    last = 1 + config.num_text_slots
    parts = {
        T2I: ([word(TextToken.CLS, 0), *words, word(TextToken.SEP, last)], [begin, *codes]),
        I2T: ([begin, *codes, end], [word(TextToken.BOS, 0), *words]),
    }[direction]
    rows = [x + embed.segment.weight[s] for part, s in zip(parts, (source, target), strict=True) for x in part]
    found = embed(text, image, direction)[0]
    torch.testing.assert_close(found[: len(rows)], torch.stack(rows))
    assert len(rows) == config.spec.num_used and not found[len(rows) :].any()


@torch.no_grad()
def test_a_block_with_a_sandwich_of_norms_written_out() -> None:
    model = tiny_model(tiny_config(num_layers=1, sandwich_norm=True))
    block = cast(Block, model.blocks["0"])
    norms = (block.norm1, block.post_norm1, block.norm2, block.post_norm2)
    for number, norm in enumerate(norms):
        cast(nn.LayerNorm, norm).bias.fill_(0.1 * (number + 1))
    before, behind, inner, outer = norms
    x = torch.randn(1, model.spec.length, model.config.width, generator=torch.Generator().manual_seed(0))
    ready = prepare(model.rule("conv"), torch.tensor([5]), "dense", T2I)
    between = x + behind(block.attention(before(x), ready))
    expected = between + outer(block.mlp(inner(between)))
    torch.testing.assert_close(block(x, ready), expected)


@torch.no_grad()
def test_no_code_is_predicted_from_itself_or_later_ones(model: ViLG) -> None:
    text, image, text_len = row(model)
    before = model.logits(text, image, text_len, T2I)
    for place in range(image.shape[1]):
        after = model.logits(text, changed(image, place, model.config.image_vocab_size), text_len, T2I)
        assert not moved(before, after)[: place + 1].any()
        assert moved(before, after)[place + 1 :].any() == (place + 1 < image.shape[1])


@torch.no_grad()
def test_no_text_token_is_predicted_from_itself_or_later_ones(model: ViLG) -> None:
    text, image, text_len = row(model)
    before = model.logits(text, image, text_len, I2T)
    for place in range(text.shape[1]):
        after = model.logits(changed(text, place, model.config.text_vocab_size, low=6), image, text_len, I2T)
        assert not moved(before, after)[: place + 1].any()
        assert moved(before, after)[place + 1 :].all()


@torch.no_grad()
@pytest.mark.parametrize("direction", [T2I, I2T])
def test_sources_know_nothing_of_targets(model: ViLG, direction: Direction) -> None:
    text, image, text_len = row(model)
    if direction == T2I:
        other_text, other_image = text, (image + 1) % model.config.image_vocab_size
    else:
        other_text, other_image = 6 + (text - 5) % (model.config.text_vocab_size - 6), image
    source = model.spec.source_slice(direction)
    before = model.hidden(text, image, text_len, direction)
    after = model.hidden(other_text, other_image, text_len, direction)
    assert not moved(before[:, source], after[:, source]).any()
    assert moved(before, after)[model.spec.target_slice(direction)].any()


@torch.no_grad()
@pytest.mark.parametrize("direction", [T2I, I2T])
def test_sources_see_both_ways_and_reach_every_prediction(model: ViLG, direction: Direction) -> None:
    text, image, text_len = row(model)
    before = model.hidden(text, image, text_len, direction)
    config = model.config
    if direction == T2I:
        inside = model.spec.text_slice(direction)
        after = model.hidden(changed(text, -1, config.text_vocab_size, low=6), image, text_len, direction)
    else:
        inside = model.spec.image_slice(direction)
        after = model.hidden(text, changed(image, -1, config.image_vocab_size), text_len, direction)
    assert moved(before, after)[inside.start], "the first source token depends on the last"
    assert moved(before, after)[model.spec.target_slice(direction)].all()


@torch.no_grad()
@pytest.mark.parametrize("direction", [T2I, I2T])
def test_what_lies_behind_a_short_caption_does_not_matter(model: ViLG, direction: Direction) -> None:
    text, image, _ = row(model)
    short = torch.tensor([2])
    filled = model.logits(text, image, short, direction)
    other = model.logits(changed(text, 3, model.config.text_vocab_size, low=6), image, short, direction)
    count = filled.shape[1] if direction == T2I else 3
    assert not moved(filled[:, :count], other[:, :count]).any()


@torch.no_grad()
def test_mixed_rows_equal_each_direction_alone(model: ViLG) -> None:
    batch = tiny_batch(model.config)
    text, image, text_len = batch.rows()
    image_logits, text_logits = model(text, image, text_len=text_len)
    torch.testing.assert_close(image_logits, model.logits(text[0::2], image[0::2], text_len[0::2], T2I))
    torch.testing.assert_close(text_logits, model.logits(text[1::2], image[1::2], text_len[1::2], I2T))


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("changes", [{}, {"sandwich_norm": True, "num_layers": 1}])
def test_leaving_out_what_nothing_reads_changes_no_gradient(
    model: ViLG, changes: dict[str, object], recompute: Recompute
) -> None:
    config = tiny_config(**changes)
    text, image, text_len = tiny_batch(config).rows()
    targets = build_targets(tiny_batch(config), config.spec)
    found = []
    for computes_all in (True, False):
        net = tiny_model(config, model.implementation)
        net.computes_all = computes_all
        apply_recompute(net, recompute)
        (image_loss, _), (text_loss, _) = net(text, image, text_len=text_len, targets=targets)
        (image_loss + text_loss).backward()
        found.append([image_loss, text_loss, *(p.grad for p in net.parameters())])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "full"},
        {"image_to_text_row": "window"},
        {"conv_wrap": False},
        {"qk_norm": False},
        {"sandwich_norm": True},
        {"segment_embedding": False},
        {"codebook_dim": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_each_switch_changes_the_result_and_keeps_the_shapes(changes: dict[str, object]) -> None:
    plain, switched = tiny_model().eval(), tiny_model(tiny_config(**changes)).eval()
    if "codebook_dim" in changes:
        assert switched.embed is not None
        switched.embed.get_buffer("codebook").normal_(generator=torch.Generator().manual_seed(0))
    text, image, text_len = tiny_batch(plain.config).rows()
    pairs = list(zip(plain(text, image, text_len=text_len), switched(text, image, text_len=text_len), strict=True))
    assert [before.shape for before, _ in pairs] == [after.shape for _, after in pairs]
    # Patterns of one direction leave the other as it is.
    assert max(float((before - after).abs().max()) for before, after in pairs) > 1e-3


def test_gradient_shrink_changes_gradients_of_tables_alone() -> None:
    plain, shrunk = tiny_model(), tiny_model(tiny_config(embedding_gradient_shrink=0.1))
    text, image, text_len = tiny_batch(plain.config).rows()
    for model in (plain, shrunk):
        sum(logits.square().mean() for logits in model(text, image, text_len=text_len)).backward()
    reduced = dict(shrunk.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        share = 0.1 if name.startswith("embed.") else 1.0
        torch.testing.assert_close(reduced[name].grad, share * parameter.grad, msg=name, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("preset", "billions"), [("paper-10b", 9.66), ("e2e-300m", 0.302)])
def test_sizes_of_the_paper(preset: str, billions: float) -> None:
    run = PRESETS[preset]().resolve(text_vocab_size=18_000)
    with torch.device("meta"):
        model = ViLG(run.model)
    stack = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("blocks."))
    assert stack / 1e9 == pytest.approx(billions, rel=2e-3)
    assert model.spec.length == model.spec.num_used == 1088


def test_unresolved_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="unresolved sizes"):
        ViLG(replace(tiny_config(), image_side=0))
