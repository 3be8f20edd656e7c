"""One GPU gives what one CPU gives: attention in every form, steps of every engine, drawing, captions, tokenizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.checkpoint.image_tokenizer import load_image_tokenizer
from megatron_vilg.config.schema import CheckpointConfig, OpsConfig, SampleConfig
from megatron_vilg.generate.caption import caption_ids
from megatron_vilg.generate.pipeline import Pipeline
from megatron_vilg.generate.text_to_image import Prompts, draw_ids
from megatron_vilg.models.vilg import ViLG
from megatron_vilg.ops.attention import attention
from megatron_vilg.ops.cross_entropy import linear_cross_entropy
from megatron_vilg.ops.rules import AttentionRule
from megatron_vilg.parallel.mesh import Mesh
from megatron_vilg.sequence import Direction, StreamSpec
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.metrics import MetricWriter
from megatron_vilg.train.pretrain import pretrain
from megatron_vilg.train.vqgan import train_image_tokenizer
from tests.tiny import tiny_batch, tiny_config, tiny_model, tiny_run
from tests.tiny_run import CAPTIONS, write_tiny_run
from tests.train.test_end_to_end import batch_of, joint_run, tokenizer_of
from tests.train.token_caches import write_cache
from tests.train.vqgan_case import discs
from tests.train.vqgan_case import tiny_run as tokenizer_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 means fp32 here: convolutions would use TF32 by themselves."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("implementation", ["sdpa", "fold", "flex", "triton"])
@pytest.mark.parametrize("direction", [None, *Direction])
@pytest.mark.parametrize("pattern", ["full", "row", "column", "conv"])
def test_attention(pattern: Any, direction: Direction | None, implementation: Any) -> None:
    rule = AttentionRule(pattern, StreamSpec(num_text_slots=7, image_side=16), conv_kernel=5)
    text_len = torch.tensor([7, 3, 0, 5])
    shape = (4, rule.spec.length, 2, 32)
    *qkv, grad = (torch.randn(shape) for _ in range(4))
    results = []
    for device, form in (("cpu", "dense"), ("cuda", implementation)):
        q, k, v = (x.to(device).requires_grad_() for x in qkv)
        out = attention(q, k, v, rule, text_len.to(device), form, direction)  # type: ignore[arg-type]
        results.append([x.cpu() for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(device)))])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_loss_head() -> None:
    x, weight, labels = torch.randn(300, 64), torch.randn(500, 64), torch.randint(500, (300,))
    labels[::7] = -100
    results = []
    for device in ("cpu", "cuda"):
        leaves = [value.to(device).requires_grad_() for value in (x, weight)]
        loss, _ = linear_cross_entropy(*leaves, labels.to(device), z_loss=1e-3, label_smoothing=0.1)
        results.append([loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, leaves))])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", ["dense", "fold", "triton"])
def test_training_steps(form: Any) -> None:
    config = tiny_config(width=32, image_side=8 if form == "triton" else 4)
    run = dataclasses.replace(tiny_run(config), ops=OpsConfig(attention=form))
    engines = [NativeEngine(run, "cuda"), NativeEngine(dataclasses.replace(run, ops=OpsConfig(attention="dense")))]
    for step in range(3):
        on_gpu, on_cpu = (engine.train_step(tiny_batch(config, seed=step)) for engine in engines)
        assert float(on_gpu.loss) == pytest.approx(float(on_cpu.loss), rel=1e-4)
        assert float(on_gpu.grad_norm) == pytest.approx(float(on_cpu.grad_norm), rel=1e-3)


def test_bf16_steps_are_finite_and_learn() -> None:
    run = tiny_run(tiny_config(dropout=0.1), precision="bf16", num_steps=20)
    engine = NativeEngine(run, "cuda")
    losses = [float(engine.train_step(tiny_batch(run.model)).loss) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ["dvae", "vqgan"])
def test_joint_steps_with_reconstructor_and_critic(kind: str) -> None:
    run = joint_run(kind, critic_weight=0.1, critic_start_step=1, critic_gate=10.0)
    engines = [EndToEndEngine(run, Mesh(torch.device(device)), tokenizer_of(run)) for device in ("cuda", "cpu")]
    for step in range(3):
        on_gpu, on_cpu = (engine.train_step(batch_of(run, seed=step)) for engine in engines)
        assert float(on_gpu.loss) == pytest.approx(float(on_cpu.loss), rel=2e-3)
        assert on_gpu.extra.keys() == on_cpu.extra.keys() and not float(on_gpu.skipped)


@pytest.mark.parametrize(
    "settings",
    [
        SampleConfig(temperature=0.8, top_k=7),
        SampleConfig(temperature=0.9, top_p=0.95, guidance=2.0),
        SampleConfig(temperature=0.9, min_p=0.05, guidance=3.0, guidance_schedule="cosine"),
    ],
)
def test_recorded_drawing(settings: SampleConfig) -> None:
    model = tiny_model(tiny_config(width=32, image_side=8))
    batch = tiny_batch(model.config, 3)
    text, length = batch.text_ids[:, 1], batch.text_len[:, 1]
    prefix = batch.target_image_ids[:, :5]
    for given in (None, prefix):
        on_cpu = draw_ids(model.cpu(), Prompts(text, length), settings, num_images=4, seed=1, image_prefix=given)
        moved = None if given is None else given.cuda()
        on_gpu = draw_ids(
            model.cuda(), Prompts(text.cuda(), length.cuda()), settings, num_images=4, seed=1, image_prefix=moved
        )
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_drawing_and_captions_in_small_precision(precision: Any, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "run")
    pipeline = Pipeline.load(tmp_path / "run", device="cuda", precision=precision)
    settings = SampleConfig(guidance=2.0)
    ids = pipeline.draw_ids(CAPTIONS[:2], num_images=2, settings=settings, seed=1)
    assert ids.shape == (2, 2, 16) and int(ids.min()) >= 0 and int(ids.max()) < 11
    assert torch.equal(ids, pipeline.draw_ids(CAPTIONS[:2], num_images=2, settings=settings, seed=1))
    assert len(pipeline.caption(ids[0], beam=2)) == 2


def test_captions() -> None:
    model: ViLG = tiny_model()
    codes = tiny_batch(model.config, 4).target_image_ids
    for beam in (1, 3):
        on_cpu = caption_ids(model.cpu(), codes, beam=beam)
        assert caption_ids(model.cuda(), codes.cuda(), beam=beam) == on_cpu


def test_a_resumed_run_repeats_the_straight_one(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "tokens", {"train": 10, "val": 3})
    run = dataclasses.replace(
        tiny_run(tiny_config(text_vocab_size=cache.settings["text_vocab_size"]), num_steps=8, sample_every=1),
        checkpoint=CheckpointConfig(every=3),
    )
    mesh = Mesh(torch.device("cuda"))

    def stop(model: ViLG, step: int, writer: MetricWriter) -> None:
        if step == 5:
            raise InterruptedError

    pretrain(run, cache, tmp_path / "straight", mesh=mesh)
    with pytest.raises(InterruptedError):
        pretrain(run, cache, tmp_path / "broken", mesh=mesh, on_sample=stop)
    pretrain(run, cache, tmp_path / "broken", mesh=mesh)
    expected, actual = (load_model_folder(tmp_path / name / "export")[1] for name in ("straight", "broken"))
    for name, tensor in expected.items():  # sums of gradients by atomic additions differ in their last bits
        torch.testing.assert_close(actual[name], tensor, rtol=1e-3, atol=1e-5)


def test_image_tokenizer_trains_and_codes_agree(tmp_path: Path) -> None:
    run = tokenizer_run(critic_weight=0.1)
    train_image_tokenizer(run, discs(), discs(seed=1), tmp_path / "tokenizer", device="cuda")
    tokenizer = load_image_tokenizer(tmp_path / "tokenizer")
    pixels = discs(4).float() / 127.5 - 1.0
    with torch.no_grad():
        codes = tokenizer.encode(pixels)
        assert torch.equal(tokenizer.cuda().encode(pixels.cuda()).cpu(), codes)
