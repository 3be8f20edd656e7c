"""The joint engine: what moves when, resuming to the bit, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vilg.checkpoint.export import load_model_folder
from megatron_vilg.config.check import check
from megatron_vilg.config.schema import CheckpointConfig, DataConfig, LogConfig, ReconstructorConfig, RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.data.pair_pixels import PixelCache, write_pixel_cache
from megatron_vilg.data.records import find_records
from megatron_vilg.data.token_cache import TokenCache
from megatron_vilg.errors import CheckpointError
from megatron_vilg.models.tokenizers import AnyTokenizer, build_image_tokenizer
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.pretrain import pretrain
from tests.models.test_reconstructor import tokenizer_config
from tests.tiny import tiny_batch, tiny_config, tiny_run
from tests.train.token_caches import write_cache


def joint_run(kind: str = "dvae", **options: Any) -> RunConfig:
    run = tiny_run(num_steps=8)
    return dataclasses.replace(
        run,
        image_tokenizer=tokenizer_config(kind),
        reconstructor=ReconstructorConfig(enabled=True, **({"critic_channels": 4} | options)),
    )


def tokenizer_of(run: RunConfig) -> AnyTokenizer:
    torch.manual_seed(0)
    return build_image_tokenizer(run.image_tokenizer).requires_grad_(False).eval()


def batch_of(run: RunConfig, seed: int = 0) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    size = run.image_tokenizer.image_size
    pixels = torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    return dataclasses.replace(tiny_batch(run.model, seed=seed), pixels=pixels)


def weights(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], engine: NativeEngine) -> set[str]:
    """First path elements, two for the reconstructor, of the weights that changed."""
    names = [name for name, value in engine.model.state_dict().items() if not torch.equal(value, before[name])]
    return {".".join(name.split(".")[: 2 if name.startswith("rec") else 1]) for name in names}


@pytest.mark.parametrize("kind", ["dvae", "vqgan"])
def test_joint_training_lowers_both_losses(kind: str) -> None:
    run = joint_run(kind, edge_weight=0.5)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    found = [engine.train_step(batch_of(run)) for _ in range(15)]
    name = "loss/reconstruction(nats)" if kind == "dvae" else "loss/reconstruction(l1)"
    assert found[-1].extra[name] < found[0].extra[name] - 0.02
    assert found[-1].image_ce < found[0].image_ce and found[-1].text_ce < found[0].text_ce
    total = found[0].image_ce + found[0].text_ce + found[0].extra[name]
    assert found[0].loss == pytest.approx(float(total), rel=1e-5)


def test_detached_generator_learns_as_without_a_reconstructor() -> None:
    run = joint_run(detach=True)
    plain = NativeEngine(dataclasses.replace(run, reconstructor=ReconstructorConfig()))
    detached = EndToEndEngine(run, "cpu", tokenizer_of(run))
    joint = EndToEndEngine(joint_run(), "cpu", tokenizer_of(run))
    for step in range(3):
        for engine in (plain, detached, joint):
            engine.train_step(batch_of(run, step))
    mine = plain.model.state_dict()
    for name, value in mine.items():
        assert torch.allclose(value, detached.model.state_dict()[name], atol=1e-6), name
    name = "blocks.0.mlp.up.weight"
    assert not torch.allclose(mine[name], joint.model.state_dict()[name], atol=1e-4)


def test_warm_up_moves_the_mapping_alone() -> None:
    run = joint_run(warmup_steps=2)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    start = weights(engine)
    first = engine.train_step(batch_of(run))
    second = engine.train_step(batch_of(run))
    assert moved(start, engine) == {"reconstructor.mapping"}
    assert not any(state["step"] for state in engine.optimizer.state.values()), "its updates are not counted either"
    assert second.extra["reconstruction/code_distance"] < first.extra["reconstruction/code_distance"]
    engine.train_step(batch_of(run))
    assert {"embed", "blocks", "heads", "norm", "reconstructor.decoder"} <= moved(start, engine)


def test_parts_have_rates_and_clips_of_their_own() -> None:
    run = joint_run(lr_share=0.25, grad_clip=1e-3)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    engine.train_step(batch_of(run))
    rates = [group["lr"] for o in (engine.optimizer, engine.part_optimizer) for group in o.param_groups]
    assert rates[-1] == pytest.approx(0.25 * rates[0])
    state = engine.part_optimizer.state[engine.part.decoder.last_weight]
    assert 0 < state["exp_avg"].norm() < 1e-3


def test_decoder_starts_at_the_tokenizers_or_from_scratch() -> None:
    run = joint_run()
    tokenizer = tokenizer_of(run)
    started = EndToEndEngine(run, "cpu", tokenizer).part.decoder.last_weight
    assert torch.equal(started, tokenizer.decoder.last_weight)
    scratch = EndToEndEngine(joint_run(decoder_start="scratch"), "cpu", tokenizer).part.decoder.last_weight
    assert not torch.equal(scratch, started)


def test_not_finite_step_changes_neither_part() -> None:
    run = joint_run("vqgan", ema_decay=0.9, critic_weight=0.1, critic_start_step=0, critic_gate=10.0)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    engine.train_step(batch_of(run))
    state = {name: value.clone() for name, value in flat(engine.state_dict())}
    with torch.no_grad():
        engine.part.mapping.down.bias[0] = float("nan")
    assert engine.train_step(batch_of(run)).skipped == 1
    for name, value in flat(engine.state_dict()):
        if name != "model.reconstructor.mapping.down.bias":
            assert torch.equal(value, state[name]), name


def flat(state: dict[str, Any], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, value in state.items():
        found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def test_critic_opens_after_start_and_gate_and_learns() -> None:
    run = joint_run("vqgan", critic_weight=0.5, critic_start_step=2, critic_gate=10.0)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    found = [engine.train_step(batch_of(run)).extra for _ in range(5)]
    assert ["loss/critic" in extra for extra in found] == [False, False, False, True, True]
    assert not engine.helpers.pictures
    closed = joint_run("vqgan", critic_weight=0.5, critic_start_step=0, critic_gate=1e-6)
    engine = EndToEndEngine(closed, "cpu", tokenizer_of(run))
    assert all("loss/critic" not in engine.train_step(batch_of(run)).extra for _ in range(3))


def test_micro_batches_add_up() -> None:
    run = joint_run()
    halves = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, num_microbatches=2))
    whole, parts = (EndToEndEngine(r, "cpu", tokenizer_of(run)) for r in (run, halves))
    a, b = whole.train_step(batch_of(run)), parts.train_step(batch_of(run))
    assert a.loss == pytest.approx(float(b.loss), rel=1e-5)
    assert a.extra["grad_norm/reconstructor"] == pytest.approx(float(b.extra["grad_norm/reconstructor"]), rel=1e-4)
    assert a.grad_norm == pytest.approx(float(b.grad_norm), rel=1e-4)


@pytest.fixture
def caches(tmp_path: Path) -> tuple[TokenCache, PixelCache]:
    cache = write_cache(tmp_path / "tokens", {"train": 10, "val": 3})
    return cache, write_pixel_cache(tmp_path / "pixels", cache, find_records(tmp_path / "tokens-pairs"))


def loop_run(cache: TokenCache) -> RunConfig:
    run = joint_run("vqgan", ema_decay=0.8, critic_weight=0.2, critic_start_step=2, critic_gate=10.0, warmup_steps=1)
    tokenizer = dataclasses.replace(run.image_tokenizer, image_size=8, patch=1)
    return dataclasses.replace(
        run,
        model=tiny_config(text_vocab_size=cache.settings["text_vocab_size"]),
        image_tokenizer=tokenizer,
        data=DataConfig(caption_dropout=0.2, image_input_noise=0.1),
        train=dataclasses.replace(run.train, eval_every=4, num_steps=6),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def test_killed_run_goes_on_to_the_same_bits(tmp_path: Path, caches: tuple[TokenCache, PixelCache]) -> None:
    cache, pixels = caches
    run = loop_run(cache)
    # The critic needs larger pictures than 8 pixels.
    run = dataclasses.replace(run, reconstructor=dataclasses.replace(run.reconstructor, critic_weight=0.0))

    class KilledError(Exception):
        pass

    def die(model: object, step: int, writer: object) -> None:
        if step == 5:
            raise KilledError

    options: dict[str, Any] = {"image_tokenizer": tokenizer_of(run), "pixels": pixels}
    assert pretrain(run, cache, tmp_path / "a", **options)
    sampled = dataclasses.replace(run, train=dataclasses.replace(run.train, sample_every=1))
    with pytest.raises(KilledError):
        pretrain(sampled, cache, tmp_path / "b", on_sample=die, **options)
    assert pretrain(run, cache, tmp_path / "b", **options)
    straight, resumed = (load_model_folder(tmp_path / name / "export")[1] for name in "ab")
    assert straight.keys() == resumed.keys() and "reconstructor.mapping.up.weight" in straight
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert "val/loss/reconstruction(l1)" in lines[3] and "reconstruction/code_distance" in lines[5]
    bare = dataclasses.replace(run.reconstructor, ema_decay=0.0)
    with pytest.raises(CheckpointError, match=r"^reconstructor\.ema_decay=0: .* has averaged weights\."):
        pretrain(dataclasses.replace(run, reconstructor=bare), cache, tmp_path / "b", **options)


def test_export_holds_the_averaged_reconstructor() -> None:
    run = joint_run(ema_decay=0.5)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    for _ in range(3):
        engine.train_step(batch_of(run))
    exported, last = dict(engine.export()), engine.model.state_dict()
    name = "reconstructor.mapping.up.weight"
    assert not torch.equal(exported[name], last[name])
    assert torch.equal(exported["blocks.0.mlp.up.weight"], last["blocks.0.mlp.up.weight"])


def test_pictures_while_training_are_those_of_the_export() -> None:
    run = joint_run(ema_decay=0.5)
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    for step in range(3):
        engine.train_step(batch_of(run, step))
    model, live = engine.whole_model(), engine.model.reconstructor
    assert model is not None and model.reconstructor is not None and live is not None
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in engine.export())
    states = torch.randn(2, run.model.spec.num_image_tokens, run.model.width)
    assert (model.reconstructor.decode(states) - live.decode(states)).abs().max() > 1e-4, "not those of the last step"
    engine.train_step(batch_of(run, 3))
    assert all(parameter.requires_grad for parameter in engine.model.parameters()), "drawing leaves training alone"
    plain = EndToEndEngine(joint_run(), "cpu", tokenizer_of(run))
    assert plain.whole_model() is plain.model, "nothing is averaged"


def test_batches_without_pixels_are_refused() -> None:
    run = joint_run()
    engine = EndToEndEngine(run, "cpu", tokenizer_of(run))
    with pytest.raises(ValueError, match="needs batches with pixels"):
        engine.train_step(tiny_batch(run.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "logit_laplace"}, "reconstructor.loss=logit_laplace: needs the decoder of a dVAE"),
        ({"warmup_steps": 8}, "reconstructor.warmup_steps=8: must be below train.num_steps=8"),
        ({"critic_weight": 1.0}, "reconstructor.critic_start_step=20000: the critic would never start"),
        ({"ema_decay": 1.0}, "reconstructor.ema_decay=1.0: must be below 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    run = joint_run("vqgan", **options)
    assert any(message in problem for problem in check(run)), check(run)


def test_shifted_targets_are_refused() -> None:
    run = dataclasses.replace(joint_run(), data=DataConfig(num_views=2, target_view_probability=0.5))
    assert any("data.target_view_probability=0.5: a reconstructor learns" in problem for problem in check(run))


def test_deepspeed_is_refused() -> None:
    run = dataclasses.replace(joint_run(), train=dataclasses.replace(joint_run().train, engine="deepspeed"))
    assert any("train.engine=deepspeed: trains the generator alone" in problem for problem in check(run))
