"""G0, G1, G5, G6: what only a GPU can say. ``--dry-run`` takes them through the smallest sizes on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import OURS, Bench, Goal, Row
from benchmarks.sizes import random_pairs
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.config.schema import ImageTokenizerConfig, ModelConfig, SampleConfig
from megatron_vilg.errors import ConfigError
from megatron_vilg.generate.cache import kv_elements_read
from megatron_vilg.generate.decode import inference
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.models.channels_last import to_channels_last
from megatron_vilg.models.cost import num_parameters
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.models.vqgan import VQGAN
from megatron_vilg.ops.attention import Implementation, attend, choose_implementation, prepare
from megatron_vilg.ops.rules import AttentionRule, Pattern
from megatron_vilg.sequence import Direction

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SHARE_OF_DENSE: dict[Pattern, float] = {"row": 0.35, "column": 0.32, "conv": 0.65}
PAPER = ModelConfig(
    num_layers=24,
    width=1024,
    num_heads=16,
    num_text_slots=61,
    image_side=32,
    text_vocab_size=8000,
    image_vocab_size=8192,
)
"""The paper's small model."""
TINY = replace(PAPER, num_layers=4, width=32, num_heads=2, num_text_slots=4, image_side=4, image_vocab_size=32)


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device does at best: a copy, a large product, exponentials."""
    size = 256 if bench.tiny else 8192
    dtype = torch.bfloat16
    a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
    flat = torch.randn(1 << (16 if bench.tiny else 30), device=bench.device)
    target = torch.empty_like(flat)
    runs: dict[str, tuple[Callable[[], object], float, str]] = {
        "copy": (lambda: target.copy_(flat), 2e-12 * flat.nbytes, "TB/s"),
        "product of 8192 x 8192, bf16": (lambda: a @ b, 2e-12 * size**3, "TFLOP/s"),
        "exponentials, fp32": (lambda: torch.exp(flat, out=target), 1e-9 * flat.numel(), "billion/s"),
    }
    seconds = bench.interleave({name: run for name, (run, _, _) in runs.items()})
    for name, (_, amount, unit) in runs.items():
        yield Row("G0", name, amount / statistics.median(seconds[name]), unit)


def attention_kernels(bench: Bench) -> Iterator[Row]:
    """One layer of the paper's 10B model, 16 rows: each way to execute each pattern beside the best dense kernel."""
    heads, size, rows = (2, 16, 2) if bench.tiny else (64, 64, 16)
    model = TINY if bench.tiny else PAPER
    shape = (rows, model.spec.length, heads, size)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    q, k, v, grad = (torch.randn(shape, device=bench.device).to(dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    length = torch.full((rows,), model.num_text_slots, device=bench.device)
    for direction in Direction:
        for pattern in SHARE_OF_DENSE:
            yield from _one_pattern(bench, model, pattern, direction, inputs, grad, length)


def _one_pattern(
    bench: Bench,
    model: ModelConfig,
    pattern: Pattern,
    direction: Direction,
    inputs: list[Tensor],
    grad: Tensor,
    length: Tensor,
) -> Iterator[Row]:
    rule = AttentionRule(pattern, model.spec)
    dense = _dense_kernels(bench, inputs, causal=direction == Direction.TEXT_TO_IMAGE)
    sparse: dict[str, Callable[[], Tensor]] = {}
    for name in ("fold", "flex", "triton"):
        implementation: Implementation = name
        try:
            choose_implementation(implementation, model.image_side, bench.device, training=True)
        except ConfigError:  # this device has no such kernel: the row is left out
            continue
        ready = prepare(rule, length, implementation, direction, inputs[0].dtype)
        sparse[name] = partial(attend, inputs[0], inputs[1], inputs[2], ready)
    for backward in (False, True):

        def timed(run: Callable[[], Tensor], backward: bool = backward) -> Callable[[], object]:
            return (lambda: torch.autograd.grad(run(), inputs, grad)) if backward else run

        seconds = bench.interleave({name: timed(run) for name, run in (dense | sparse).items()}, 2 * bench.rounds)
        median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        best = min(dense, key=lambda name: median[name])
        words = "forward + backward" if backward else "forward"
        label = f"{pattern} layer, {direction.name.lower().replace('_', '-')}, {words}"
        goal = Goal("ratio", ">=", 1 / SHARE_OF_DENSE[pattern])
        for name in sparse:
            metric = f"{name}: {label}"
            yield Row("G1", metric, median[name], "ms", f"best dense: {best}", median[best], goal, less_is_better=True)
        for name in {"fold", "triton"} & set(sparse):
            if "flex" in sparse:
                peer, bound = median["flex"], Goal("ratio", ">=", 1.5)
                yield Row("G1", f"{name}: {label}", median[name], "ms", "flex", peer, bound, less_is_better=True)


def _dense_kernels(bench: Bench, inputs: list[Tensor], *, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """Dense attention by each fused kernel that runs here."""

    def attention() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    def by(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return attention()

        return run

    if bench.device.type == "cpu":
        return {"SDPA": attention}
    found = {}
    for name, backend in BACKENDS.items():
        try:
            by(backend)()
        except RuntimeError:  # "No available kernel": not on this device or for these sizes
            continue
        found[name] = by(backend)
    return found


def drawing(bench: Bench) -> Iterator[Row]:
    """Image tokens per second beside the bandwidth limits of a dense cache, of the patterns, and with shared text."""
    bandwidth = _copy_rate(bench)
    sizes = {"300M": PAPER, "10B": replace(PRESETS["paper-10b"]().model, text_vocab_size=8000)}
    for size, config in ({"tiny": TINY} if bench.tiny else sizes).items():
        model = _random_model(bench, config)
        weights = 2 * num_parameters(config)
        for batch in (1, 4) if bench.tiny else (1, 64):
            for samples in sorted({1, batch}):
                text = random_pairs(config, batch // samples, seed=3).to(bench.device)
                ids, length = text.text_ids[:, 0], text.text_len[:, 0]
                run = _drawing(model, ids, length, samples)
                seconds = statistics.median(bench.interleave({OURS: run}, max(1, bench.rounds // 2))[OURS])
                rate = batch * config.spec.num_image_tokens / seconds
                name = f"drawing, {size}, batch {batch}, {samples} of one prompt"
                for kind, goal in (("pattern", 0.6), ("dense", 1.0)):
                    shared = samples if kind == "pattern" else 1
                    read = 2 * kv_elements_read(config, num_targets=shared, kind=kind) / shared  # type: ignore[arg-type]
                    steps = config.spec.num_image_tokens
                    limit = batch * steps / ((steps * weights + batch * read) / bandwidth)
                    bound = Goal("ratio", ">=", goal) if batch >= 64 else None
                    yield Row("G5", name, rate, "tokens/s", f"limit of a {kind} cache", limit, bound, limit)


def _random_model(bench: Bench, config: ModelConfig) -> ViLG:
    """Weights drawn on the device: what a run starts from is drawn on the host, which takes minutes at 10B."""
    torch.set_default_dtype(torch.float32 if bench.tiny else torch.bfloat16)
    try:
        with bench.device:
            model = ViLG(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, config.init_std)
    return model


def _drawing(model: ViLG, ids: Tensor, length: Tensor, samples: int) -> Callable[[], object]:
    return lambda: draw_ids(model, Prompts(ids, length), SampleConfig(), num_images=samples, seed=0)


def _copy_rate(bench: Bench) -> float:
    """Bytes per second, read and written."""
    flat = torch.randn(1 << (16 if bench.tiny else 30), device=bench.device)
    target = torch.empty_like(flat)
    return 2 * flat.nbytes / min(bench.interleave({"copy": lambda: target.copy_(flat)})["copy"])


def image_tokenizer(bench: Bench) -> Iterator[Row]:
    """C14, G6: pictures per second through encoder and codebook, and back: bf16 channels-last beside fp32 as it is."""
    on_gpu = bench.device.type == "cuda"
    config = ImageTokenizerConfig(image_size=256) if on_gpu else ImageTokenizerConfig(image_size=64, channels=64)
    if bench.tiny:
        config = ImageTokenizerConfig(
            image_size=16, channels=8, norm_groups=2, channel_multipliers=(1, 2), codebook_size=32
        )
    plain, fast = (VQGAN(config).to(bench.device).eval() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fast = to_channels_last(fast)
    count = 64 if on_gpu else 2
    pixels = torch.rand(count, 3, config.image_size, config.image_size, device=bench.device) * 2 - 1
    codes = torch.randint(config.codebook_size, (count, config.grid_side**2), device=bench.device)

    def encode(tokenizer: VQGAN, bf16: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with inference(tokenizer), torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):  # type: ignore[arg-type]
                return tokenizer.encode(pixels)

        return run

    def decode(tokenizer: VQGAN, bf16: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with inference(tokenizer), torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):  # type: ignore[arg-type]
                return tokenizer.decode(tokenizer.lookup(codes))

        return run

    gpu_suite = on_gpu or bench.tiny  # a dry run is one of that suite
    id, bounds = ("G6", {"encode": 1800.0, "decode": 1000.0}) if gpu_suite else ("C14", {})
    for name, make in (("encode", encode), ("decode", decode)):
        seconds = bench.interleave({OURS: make(fast, True), "fp32": make(plain, False)})
        rates = {key: count / statistics.median(values) for key, values in seconds.items()}
        goal = Goal("value", ">=", bounds[name]) if on_gpu else Goal("ratio", ">=", 1.2)
        unit = f"pictures/{bench.unit}"
        yield Row(id, f"image tokenizer, {name}", rates[OURS], unit, "fp32", rates["fp32"], goal, rounds=seconds)
    same = (encode(fast, True)() == encode(plain, False)()).float().mean().item()
    yield Row(id, "codes equal to fp32's", same, "share", goal=Goal("value", ">=", 0.995))
