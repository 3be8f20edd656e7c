"""C4: drawing whole pictures beside the plain loop's static cache and Hugging Face's generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import OURS, Bench, Goal, Row, rate_rows
from benchmarks.plain_loop import generate
from benchmarks.sizes import SIZES, gpt2, plain_model, random_pairs, random_rows
from megatron_vilg.config.schema import ModelConfig, SampleConfig
from megatron_vilg.generate.text_to_image import draw_ids
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import choose_implementation
from megatron_vilg.parallel.init import init_weights
from megatron_vilg.sequence import Direction

NUM_PROMPTS = 4
GOALS = {"8x8": Goal("ratio", ">=", 1.0), "32x32": Goal("ratio", ">=", 1.5)}


def decoding(bench: Bench) -> Iterator[Row]:
    """Image tokens per second, for 4 different prompts with one picture each, prompt included, no guidance."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for size, configure in SIZES.items():
        run = configure("fp32")
        model = run.model
        contenders = _contenders(model, bench.device, dtype)
        if size == "8x8":
            seconds = bench.interleave(contenders, 2 * bench.rounds)
        else:  # a picture is a thousand steps: the first few need no round of their own
            seconds = bench.interleave(contenders, max(1, bench.rounds // 2), warm_up=0)
        drawn = dict.fromkeys(contenders, NUM_PROMPTS * model.spec.num_image_tokens)
        name = f"decoding, {size} codes, batch {NUM_PROMPTS}, {str(dtype).removeprefix('torch.')}"
        yield from rate_rows("C4", name, f"tokens/{bench.unit}", drawn, seconds, GOALS[size])


def _contenders(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    count = model.spec.num_image_tokens
    prompt = random_rows(model, NUM_PROMPTS, model.spec.source_length(Direction.TEXT_TO_IMAGE) + 1, seed=3).to(device)
    plain = plain_model(model).to(device, dtype).eval()
    cache = (model.num_layers, 2, NUM_PROMPTS, model.num_heads, prompt.shape[1] + count, model.head_dim)
    peer = gpt2(model).to(device, dtype).eval()
    peer_generate = partial(
        peer.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )
    return {
        OURS: _ours(model, device, dtype),
        "plain loop": lambda: generate(plain, prompt, torch.zeros(cache, device=device, dtype=dtype), count),
        "GPT-2 generate": peer_generate,
        "GPT-2 generate, static": partial(peer_generate, cache_implementation="static"),
    }


def _ours(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    model = ViLG(config, choose_implementation("auto", config.image_side)[0])
    init_weights(model, seed=0, std=config.init_std, num_layers=config.num_layers)
    model = model.to(device, dtype)
    pairs = random_pairs(config, NUM_PROMPTS, seed=3).to(device)
    text, length = pairs.text_ids[:, 0], pairs.text_len[:, 0]
    return lambda: draw_ids(model, text, length, SampleConfig(), num_images=1, seed=0)
