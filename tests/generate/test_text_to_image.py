"""Drawing: equal to a sampler without any cache, and independent of how the work is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_vilg.config.schema import SampleConfig
from megatron_vilg.generate.caption import caption_ids
from megatron_vilg.generate.decode import Decoder, inference, prefill
from megatron_vilg.generate.static import StaticDecoder
from megatron_vilg.generate.text_to_image import Batch, Prompts, RecordedDrawing, batches, draw_batch, draw_ids
from megatron_vilg.generate.weights import use_bf16
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.sampling import guidance_scales, part_weights, sample, sample_uniforms
from megatron_vilg.sequence import Direction
from tests.tiny import tiny_batch, tiny_config, tiny_model

PLAIN = SampleConfig(temperature=0.8, top_k=7)
GUIDED = SampleConfig(temperature=0.9, top_p=0.95, guidance=2.0)
PARTS = SampleConfig(temperature=0.9, top_k=9, guidance=1.5, manner_guidance=0.25, thing_guidance=0.5)
GROWING = SampleConfig(temperature=0.9, min_p=0.05, guidance=3.0, guidance_schedule="cosine")


def prompts(model: ViLG, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch = tiny_batch(model.config, count, seed)
    return batch.text_ids[:, 1], batch.text_len[:, 1]


def draw_without_cache(
    model: ViLG,
    text: Tensor,
    length: Tensor,
    config: SampleConfig,
    seed: int,
    stream: Any,
    parts: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """One picture, every token from a forward pass over whole rows."""
    size = model.spec.num_image_tokens
    uniform = sample_uniforms(seed, [stream], size)
    codes = torch.zeros(1, size, dtype=torch.int64)
    with inference(model):
        for token in range(size):

            def after(ids: Tensor, count: Tensor, token: int = token) -> Tensor:
                return model.logits(ids[None], codes, count[None], Direction.TEXT_TO_IMAGE)[:, token]

            free, scale = after(0 * text, 0 * length), guidance_scales(config, size)[token]
            logits = free + scale * (after(text, length) - free)
            for (part, count), weight in zip(parts, part_weights(config), strict=False):
                logits = logits + weight * (after(part, count) - free)
            codes[:, token] = sample(logits, config, uniform[:, token])
    return codes[0]


def with_parts(model: ViLG, seed: int = 0) -> Prompts:
    """Three prompts: with manner and thing, with a manner alone, without either."""
    (text, length), (part, count) = prompts(model, 3, seed), prompts(model, 6, seed + 1)
    count = count.clamp(min=1) * torch.tensor([1, 1, 1, 0, 0, 0])
    part = part * (torch.arange(part.shape[1]) < count[:, None])
    return Prompts(text, length, part.unflatten(0, (3, 2)), count.unflatten(0, (3, 2)))


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_parts_pull_on_their_own_as_without_cache(guidance: float) -> None:
    model = tiny_model(tiny_config(num_layers=4, conv_kernel=3))
    config, asked = dataclasses.replace(PARTS, guidance=guidance), with_parts(model)
    drawn = draw_ids(model, asked, config, num_images=2, seed=4)
    for prompt in range(3):
        parts = list(zip(asked.part_ids[prompt], asked.part_length[prompt], strict=True))
        for image in range(2):
            place = (prompt, image)
            expected = draw_without_cache(model, asked.ids[prompt], asked.length[prompt], config, 4, place, parts)
            assert torch.equal(drawn[prompt, image], expected)
    off = dataclasses.replace(config, manner_guidance=0.0, thing_guidance=0.0)
    alone = draw_ids(model, Prompts(asked.ids, asked.length), off, num_images=2, seed=4)
    assert torch.equal(draw_ids(model, asked, off, num_images=2, seed=4), alone)
    assert not torch.equal(drawn[0], alone[0]) and torch.equal(drawn[2], alone[2])
    for max_batch in (1, 4):
        assert torch.equal(draw_ids(model, asked, config, num_images=2, seed=4, max_batch=max_batch), drawn)


def test_parts_need_no_rows_where_nothing_pulls() -> None:
    model = tiny_model(tiny_config())
    asked, chosen = with_parts(model), torch.tensor([2, 0])
    thing = dataclasses.replace(PLAIN, thing_guidance=0.5)
    for config, conditions in ((PLAIN, 1), (GUIDED, 2), (PARTS, 4), (thing, 3)):
        ids, length = asked.conditions(chosen, config)
        assert ids.shape == (2 * conditions, model.spec.num_text_slots) and length.shape == (2 * conditions,)
        assert torch.equal(ids[:2], asked.ids[chosen]) and (conditions == 1 or not length[-2:].any())


@settings(max_examples=15, deadline=None)
@given(
    pattern=st.sampled_from(["paper", "full"]),
    image_side=st.integers(2, 5),
    config=st.sampled_from([PLAIN, GUIDED, GROWING, SampleConfig(temperature=0.0)]),
    seed=st.integers(0, 99),
)
def test_same_seed_same_ids_as_without_cache(config: SampleConfig, seed: int, **sizes: Any) -> None:
    model = tiny_model(tiny_config(**sizes))
    text, length = prompts(model, 2, seed)
    drawn = draw_ids(model, Prompts(text, length), config, num_images=2, seed=seed)
    for prompt in range(2):
        for image in range(2):
            expected = draw_without_cache(model, text[prompt], length[prompt], config, seed, (prompt, image))
            assert torch.equal(drawn[prompt, image], expected)


@pytest.mark.parametrize("config", [PLAIN, GUIDED])
def test_max_batch_and_cache_change_nothing(config: SampleConfig) -> None:
    model = tiny_model()
    text, length = prompts(model, 3)
    whole = draw_ids(model, Prompts(text, length), config, num_images=3, seed=5)
    assert whole.shape == (3, 3, 16) and len(whole.flatten(0, 1).unique(dim=0)) == 9
    for max_batch in (1, 2, 3, 4, 7, 100):
        assert torch.equal(
            whole, draw_ids(model, Prompts(text, length), config, num_images=3, seed=5, max_batch=max_batch)
        )
    assert torch.equal(whole, draw_ids(model, Prompts(text, length), config, num_images=3, seed=5, cache="dense"))
    assert not torch.equal(whole, draw_ids(model, Prompts(text, length), config, num_images=3, seed=6))


def test_pictures_are_the_same_alone() -> None:
    """n pictures of a batch equal n single runs; fewer pictures are the first of more; lists can be cut."""
    model = tiny_model()
    text, length = prompts(model, 3)
    whole = draw_ids(model, Prompts(text, length), GUIDED, num_images=4, seed=1)
    assert torch.equal(whole[:, :2], draw_ids(model, Prompts(text, length), GUIDED, num_images=2, seed=1))
    for prompt in range(3):
        part = slice(prompt, prompt + 1)
        alone = draw_ids(model, Prompts(text[part], length[part]), GUIDED, num_images=4, seed=1, first_prompt=prompt)
        assert torch.equal(whole[part], alone)


def test_completion_keeps_the_given_codes() -> None:
    model = tiny_model()
    text, length = prompts(model, 2)
    whole = draw_ids(model, Prompts(text, length), GUIDED, num_images=2, seed=3)
    start = whole[:, 0, :6]
    completed = draw_ids(model, Prompts(text, length), GUIDED, num_images=2, seed=3, image_prefix=start)
    assert torch.equal(completed[:, :, :6], start[:, None].expand(-1, 2, -1))
    assert torch.equal(completed[:, 0], whole[:, 0])  # same beginning, same stream: same rest
    assert not torch.equal(completed[:, 1, 6:], completed[:, 0, 6:])
    assert torch.equal(
        draw_ids(model, Prompts(text, length), GUIDED, num_images=2, seed=3, image_prefix=whole[:, 0]),
        whole[:, :1].expand(-1, 2, -1),
    )


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vilg.generate import text_to_image

    read: list[int] = []
    original = text_to_image.prefill

    def counting(model: ViLG, direction: Direction, source: Tensor, *rest: Any) -> Any:
        read.append(len(source))
        return original(model, direction, source, *rest)

    monkeypatch.setattr(text_to_image, "prefill", counting)
    model = tiny_model()
    text, length = prompts(model, 1)
    draw_ids(model, Prompts(text.expand(3, -1), length.expand(3)), PLAIN, num_images=2, seed=0)
    draw_ids(model, Prompts(text.expand(3, -1), length.expand(3)), GUIDED, num_images=2, seed=0)
    assert read == [1, 2]  # guidance adds one row without text for all


def test_guidance_pulls_towards_the_text() -> None:
    model = tiny_model()
    text, length = prompts(model, 2)
    none = torch.zeros_like(length)
    config = SampleConfig(guidance=0.0)
    free = draw_ids(model, Prompts(torch.zeros_like(text), none), SampleConfig(), num_images=1, seed=0)
    assert torch.equal(draw_ids(model, Prompts(text, length), config, num_images=1, seed=0), free)
    assert not torch.equal(draw_ids(model, Prompts(text, length), SampleConfig(), num_images=1, seed=0), free)


def test_progress_counts_all_tokens() -> None:
    model = tiny_model()
    text, length = prompts(model, 2)
    seen: list[tuple[int, int]] = []
    draw_ids(model, Prompts(text, length), PLAIN, num_images=2, seed=0, max_batch=3, progress=lambda *x: seen.append(x))
    assert seen[-1] == (64, 64) and [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("num_prompts", "num_images", "max_batch", "sizes"),
    [
        (3, 4, 100, [12]),
        (3, 4, 8, [8, 4]),  # whole prompts
        (3, 4, 9, [8, 4]),  # nearly full with whole prompts
        (4, 3, 4, [3, 3, 3, 3]),
        (4, 3, 5, [5, 5, 2]),  # whole prompts would leave two of five slots empty
        (2, 10, 4, [4, 4, 4, 4, 4]),
    ],
)
def test_batches_are_filled_and_never_too_large(
    num_prompts: int, num_images: int, max_batch: int, sizes: list[int]
) -> None:
    cut = list(batches(num_prompts, num_images, max_batch))
    assert [len(batch.pictures) for batch in cut] == sizes
    assert [p for batch in cut for p in batch.pictures] == [
        (prompt, image) for prompt in range(num_prompts) for image in range(num_images)
    ]


def test_samples_of_a_prompt_share_as_much_as_the_batch_allows() -> None:
    assert (Batch(((0, 0), (0, 1), (1, 0), (1, 1))).shared_by, Batch(((0, 0), (0, 1), (1, 0))).shared_by) == (2, 1)
    assert Batch(((0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3))).sources == [0, 1, 1]


def test_the_valve_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vilg.generate import text_to_image

    rows: list[int] = []

    class Counting(text_to_image.Decoder):
        def step(self, ids: Tensor) -> Tensor:
            rows.append(len(ids))
            assert all(cache.keys.shape[0] * cache.keys.shape[2] == len(ids) for cache in self.caches)
            return super().step(ids)

    monkeypatch.setattr(text_to_image, "Decoder", Counting)
    model = tiny_model()
    text, length = prompts(model, 4)
    draw_ids(model, Prompts(text, length), PLAIN, num_images=3, seed=0, max_batch=5)
    assert set(rows) == {5, 2}
    rows.clear()
    draw_ids(model, Prompts(text, length), GUIDED, num_images=3, seed=0, max_batch=5)
    assert set(rows) == {10, 4}  # guidance continues each picture without text too


@pytest.mark.parametrize("config", [PLAIN, GROWING, PARTS, SampleConfig(temperature=0.0)])
@pytest.mark.parametrize("num_given", [0, 7])
@pytest.mark.parametrize("cache", ["pattern", "dense"])
def test_steps_for_a_recording_draw_the_same(config: SampleConfig, num_given: int, cache: Any) -> None:
    """What a GPU replays, step by step on the CPU."""
    model = tiny_model(tiny_config(num_layers=4, conv_kernel=3))
    asked = with_parts(model)
    batch = Batch(tuple((prompt, image) for prompt in range(2) for image in range(3)))
    start = torch.randint(model.config.image_vocab_size, (2, num_given))
    expected = draw_batch(model, asked, batch, config, seed=3, image_prefix=start)
    with inference(model):
        texts, lengths = asked.conditions(torch.arange(2), config)
        prefix = prefill(model, Direction.TEXT_TO_IMAGE, texts, lengths, start.repeat(len(texts) // 2, 1))
        prefix = prefix.select(torch.arange(len(texts)))
        uniforms = sample_uniforms(3, batch.pictures, model.spec.num_image_tokens)
        weights = asked.weights(config, model.spec.num_image_tokens)
        drawing = RecordedDrawing(StaticDecoder(model, prefix, 3, cache), prefix, config, weights, uniforms)
        places = [x.data_ptr() for x in drawing.state()]
        for _ in range(num_given, model.spec.num_image_tokens - 1):
            drawing.step()
        drawing.sample()
    assert places == [x.data_ptr() for x in drawing.state()]
    assert torch.equal(drawing.ids.T[:, num_given:], expected[:, num_given:])


@pytest.fixture
def autocast_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Autocast on the CPU that computes layer norms and softmax in fp32, as CUDA's does and the CPU's does not."""

    def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            return function(*(x.float() if isinstance(x, Tensor) else x for x in args), **options)

        return call

    monkeypatch.setattr(nn.functional, "layer_norm", in_fp32(nn.functional.layer_norm))
    monkeypatch.setattr(Tensor, "softmax", in_fp32(Tensor.softmax))
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.usefixtures("autocast_as_on_cuda")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"sandwich_norm": True}], ids=str)
@pytest.mark.parametrize("rounded", [True, False])
def test_steps_under_the_autocast_of_a_gpu(rounded: bool, changes: dict[str, object]) -> None:
    model = tiny_model(tiny_config(**changes))
    if rounded:
        use_bf16(model)
    text, length = prompts(model, 2)
    codes = tiny_batch(model.config, 2).target_image_ids
    with inference(model):
        prefix = prefill(model, Direction.TEXT_TO_IMAGE, text, length).select(torch.arange(2))
        decoders = [Decoder(model, prefix, 1, joint=False), StaticDecoder(model, prefix, 1)]
        for token in range(model.spec.num_image_tokens - 1):
            expected, actual = (decoder.step(codes[:, token]) for decoder in decoders)
            torch.testing.assert_close(actual, expected, atol=5e-2, rtol=5e-2)
    assert len(caption_ids(model, codes, beam=2)) == 2
