"""C4, C7: drawing whole pictures beside the plain loop, Hugging Face's generate, x-transformers and dalle-pytorch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import peers
from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows
from benchmarks.plain_loop import generate
from benchmarks.sizes import SIZES, gpt2, joint_vocabulary, plain_model, random_pairs, random_rows
from megatron_vilg.config.schema import ModelConfig, SampleConfig
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import choose_implementation
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.sequence import Direction

NUM_PROMPTS, NUM_SAMPLES = 4, 16
GOALS = {"8x8": Goal("ratio", ">=", 1.0), "32x32": Goal("ratio", ">=", 1.5)}
DALLE_GOALS = {"8x8": GOALS["8x8"], "32x32": Goal("ratio", ">=", 3.0)}
GROWING = "GPT-2 generate"
UNCACHED_TOKENS = 4
"""Tokens that dalle-pytorch draws without a cache, spread over the picture; all would take a quarter of an hour."""


def decoding(bench: Bench) -> Iterator[Row]:
    """Image tokens per second, for 4 different prompts with one picture each, prompt included, no guidance."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for size, configure in SIZES.items():
        model = configure("fp32").model
        contenders = {OURS: _ours(model, bench.device, dtype, NUM_PROMPTS, 1)}
        contenders |= _loop_and_gpt2(model, bench.device, dtype, NUM_PROMPTS)
        contenders |= _packages(model, bench.device, dtype, NUM_PROMPTS)
        if size == "8x8":
            seconds = bench.interleave(contenders, 2 * bench.rounds)
        else:  # a picture is a thousand steps: the first few need no round of their own
            seconds = bench.interleave(contenders, max(1, bench.rounds // 2), warm_up=0)
        drawn = dict.fromkeys(contenders, NUM_PROMPTS * model.spec.num_image_tokens)
        name = f"decoding, {size} codes, batch {NUM_PROMPTS}, {str(dtype).removeprefix('torch.')}"
        goals = dict.fromkeys(contenders, GOALS[size]) | {peers.DALLE: DALLE_GOALS[size]}
        yield from rate_rows("C4", name, f"tokens/{bench.unit}", drawn, seconds, goals)
    if peers.has(peers.DALLE):
        yield _uncached(bench, model, statistics.median(seconds[OURS]))


def samples_of_one_prompt(bench: Bench) -> Iterator[Row]:
    """16 pictures of one prompt, beside as many rows of two peers, and beside our own single pictures.

    The peers are the plain loop, which is the quickest at four rows, and GPT-2 with a static cache.
    """
    model = SIZES["32x32"]("fp32").model
    codes = model.spec.num_image_tokens
    single = "megatron_vilg, one by one"
    for dtype in (torch.bfloat16,) if bench.device.type == "cuda" else (torch.float32, torch.bfloat16):
        contenders = {
            OURS: _ours(model, bench.device, dtype, 1, NUM_SAMPLES),
            single: _ours(model, bench.device, dtype, 1, 1),
            **_loop_and_gpt2(model, bench.device, dtype, NUM_SAMPLES),
        }
        del contenders[GROWING]  # about as quick as its static cache, and a round takes minutes
        seconds = bench.interleave(contenders, max(1, bench.rounds // 2), warm_up=0)
        drawn = dict.fromkeys(contenders, NUM_SAMPLES * codes) | {single: codes}
        name = f"decoding, 32x32 codes, {NUM_SAMPLES} samples of one prompt, {str(dtype).removeprefix('torch.')}"
        yield from rate_rows("C7", name, f"tokens/{bench.unit}", drawn, seconds, Goal("ratio", ">=", 3.0))


def _uncached(bench: Bench, model: ModelConfig, ours: float) -> Row:
    """dalle-pytorch as it comes: axial layers without a cache, so a token costs more the more stand before it.

    A few tokens, each in the middle of an equal stretch of the picture, stand for all.
    """
    generator = peers.dalle(model, axial=True).to(bench.device)
    pairs = random_pairs(model, NUM_PROMPTS, seed=3)
    text, codes = pairs.text_ids[:, 0].to(bench.device), pairs.target_image_ids.to(bench.device)
    stretch = model.spec.num_image_tokens // UNCACHED_TOKENS
    given = [codes[:, : stretch // 2 + place * stretch] for place in range(UNCACHED_TOKENS)]
    runs = {
        str(before.shape[1]): partial(peers.dalle_codes, generator, text, cached=False, given=before, count=1)
        for before in given
    }
    seconds = bench.interleave(runs, 1, warm_up=0)
    value = NUM_PROMPTS * model.spec.num_image_tokens / ours
    peer = NUM_PROMPTS / statistics.mean(once for (once,) in seconds.values())
    name = f"decoding, 32x32 codes, batch {NUM_PROMPTS}"
    goal = Goal("ratio", ">=", 60.0)
    return Row("C4", name, value, f"tokens/{bench.unit}", "dalle-pytorch, no cache", peer, goal)


def _loop_and_gpt2(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> dict[str, Callable[[], object]]:
    count, prompt = model.spec.num_image_tokens, _prompt(model, device, rows)
    plain = plain_model(model).to(device, dtype).eval()
    cache = (model.num_layers, 2, rows, model.num_heads, prompt.shape[1] + count, model.head_dim)
    peer_generate = partial(
        gpt2(model).to(device, dtype).eval().generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    return {
        "plain loop": lambda: generate(plain, prompt, torch.zeros(cache, device=device, dtype=dtype), count),
        GROWING: peer_generate,
        "GPT-2 generate, static": partial(peer_generate, cache_implementation="static"),
    }


def _packages(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    if peers.has(peers.X_TRANSFORMERS):
        decoder = peers.x_transformer(model, joint_vocabulary(model)).to(device, dtype).eval()
        count, prompt = model.spec.num_image_tokens, _prompt(model, device, rows)
        found[peers.X_TRANSFORMERS] = partial(peers.x_transformers_codes, decoder, prompt, count)
    if peers.has(peers.DALLE):
        generator = peers.dalle(model, axial=True, cached=True).to(device, dtype)
        text = random_pairs(model, rows, seed=3).text_ids[:, 0].to(device)
        found[peers.DALLE] = partial(peers.dalle_codes, generator, text, cached=True)
    return found


def _prompt(model: ModelConfig, device: torch.device, rows: int) -> torch.Tensor:
    """As many tokens as ours read before the first code."""
    length = model.spec.source_length(Direction.TEXT_TO_IMAGE) + 1
    return random_rows(model, rows, length, seed=3).to(device)


def _ours(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, num_prompts: int, num_images: int
) -> Callable[[], object]:
    model = ViLG(config, choose_implementation("auto", config.image_side)[0])
    init_weights(model, seed=0, std=config.init_std, num_layers=config.num_layers)
    model = model.to(device, dtype)
    pairs = random_pairs(config, num_prompts, seed=3).to(device)
    text, length = pairs.text_ids[:, 0], pairs.text_len[:, 0]
    return lambda: draw_ids(model, Prompts(text, length), SampleConfig(), num_images=num_images, seed=0)
