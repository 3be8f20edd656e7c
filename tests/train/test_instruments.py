"""The instruments: right numbers, and a model that is none the wiser."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_vilg.config.schema import LossConfig, RunConfig
from megatron_vilg.data.batch import PairBatch, build_targets
from megatron_vilg.ops.cross_entropy import IGNORE
from megatron_vilg.sequence import Direction
from megatron_vilg.train.end_to_end import EndToEndEngine
from megatron_vilg.train.engine import NativeEngine
from megatron_vilg.train.instruments import Instruments
from tests.tiny import tiny_batch, tiny_config, tiny_run
from tests.train.test_end_to_end import batch_of, flat, joint_run, tokenizer_of


def joint_engine(run: RunConfig) -> EndToEndEngine:
    return EndToEndEngine(run, "cpu", tokenizer_of(run))


def before(engine: NativeEngine, batch: PairBatch) -> dict[str, float]:
    return Instruments(engine).before(batch)


def test_metrics_of_a_joint_model() -> None:
    run = joint_run()
    engine, batch = joint_engine(run), batch_of(run)
    engine.train_step(batch)
    model = engine.model.train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = before(engine, batch)
    assert {f"attention/max_logit(layer {i})" for i in range(4)} <= found.keys()
    for name in ("text_to_image", "image_to_text", "reconstruction"):
        assert found[f"gradient({name})"] > 0
    assert -1 <= found["gradient/cosine(generation, reconstruction)"] <= 1
    assert found["hidden/last_rms"] > 0 and all(math.isfinite(value) for value in found.values())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert before(engine, batch) == found, "the same numbers again"


def test_the_warm_up_is_seen_as_the_next_step_has_it() -> None:
    """Whatever was done with the engine before: trained, measured, resumed."""
    run = joint_run(warmup_steps=2)
    straight, measured = joint_engine(run), joint_engine(run)
    for step in range(3):
        resumed = joint_engine(run)
        state = dict(flat(straight.state_dict()))
        for name, tensor in flat(resumed.state_dict()):
            tensor.copy_(state[name])
        resumed.resume(step)
        measured.eval_step(batch_of(run, 9))
        batch = batch_of(run, step)
        found = [before(engine, batch) for engine in (straight, measured, resumed)]
        assert found[0] == found[1] == found[2], f"step {step}"
        assert (found[0]["gradient(reconstruction)"] > 0) == (step == 2), "the warm-up detaches the generator"
        assert straight.train_step(batch).loss == measured.train_step(batch).loss


@pytest.mark.parametrize("computes_all", [False, True])
def test_size_of_the_last_states_is_that_of_those_with_a_label(computes_all: bool) -> None:
    run = tiny_run()
    engine, batch = NativeEngine(run, "cpu"), tiny_batch(run.model)
    engine.model.computes_all = computes_all
    found = before(engine, batch)["hidden/last_rms"]
    text, image, text_len = batch.rows()
    targets = build_targets(batch, run.model.spec)
    with torch.no_grad():
        assert engine.model.embed is not None
        rows = [engine.model.embed(text[d::2], image[d::2], d) for d in Direction]
        states = engine.model.eval().run_blocks(torch.stack(rows, dim=1).flatten(0, 1), text_len)
    spec = run.model.spec
    labels = targets.split([spec.num_image_tokens, spec.num_text_slots + 1], dim=1)
    counted = [states[d::2, spec.target_slice(d)][labels[d] != IGNORE] for d in Direction]
    assert found == pytest.approx(float(torch.cat(counted).square().mean().sqrt()), rel=1e-5)


def test_gradients_are_those_of_bare_terms_on_the_first_pairs() -> None:
    run = dataclasses.replace(joint_run(weight=7.0), loss=LossConfig(image_to_text_weight=0.1, z_loss=0.1))
    engine, batch = joint_engine(run), batch_of(run)
    found = before(engine, batch)
    bare = dataclasses.replace(joint_run(weight=0.0), loss=LossConfig(image_to_text_weight=0.0))
    reference = joint_engine(bare)
    assert found["gradient(text_to_image)"] == pytest.approx(float(reference.train_step(batch).grad_norm), rel=1e-5)
    more = dataclasses.replace(
        batch, **{f.name: torch.cat([getattr(batch, f.name)] * 2) for f in dataclasses.fields(batch)}
    )
    assert before(engine, more) == found, "only the first four count"


def test_watching_leaves_training_and_a_working_critic_alone() -> None:
    run = joint_run("vqgan", critic_weight=0.5, critic_start_step=0, critic_gate=10.0)
    plain, watched = joint_engine(run), joint_engine(run)
    instruments = Instruments(watched)
    for step in range(3):
        batch = batch_of(run, step)
        instruments.before(batch)
        numbers = [engine.train_step(batch) for engine in (plain, watched)]
        assert {"update/weight(blocks)", "update/weight(reconstructor)"} <= instruments.after().keys()
        assert numbers[0].loss == numbers[1].loss
        assert numbers[0].extra == numbers[1].extra
    assert "loss/critic" in numbers[0].extra


def test_recomputation_does_not_change_what_is_seen() -> None:
    run = tiny_run()
    again = dataclasses.replace(run, parallel=dataclasses.replace(run.parallel, recompute="block"))
    batch = tiny_batch(run.model)
    assert before(NativeEngine(again), batch) == pytest.approx(before(NativeEngine(run), batch), rel=1e-6)


def test_detached_reconstruction_has_no_gradient_in_the_generator() -> None:
    run = joint_run(detach=True)
    assert before(joint_engine(run), batch_of(run))["gradient(reconstruction)"] == 0.0


def test_attention_logits_follow_the_queries() -> None:
    run = tiny_run(tiny_config(qk_norm=False))
    engine, batch = NativeEngine(run), tiny_batch(run.model)
    first = before(engine, batch)
    with torch.no_grad():
        engine.model.blocks["0"].attention.q.weight.mul_(3.0)  # type: ignore[union-attr,operator]
        engine.model.blocks["0"].attention.q.bias.mul_(3.0)  # type: ignore[union-attr,operator]
    second = before(engine, batch)
    name = "attention/max_logit(layer 0)"
    assert second[name] == pytest.approx(3.0 * first[name], rel=1e-4)
    assert "gradient(reconstruction)" not in first


def test_log_z_grows_with_the_output_layer() -> None:
    run = tiny_run()
    engine = NativeEngine(run)
    with torch.no_grad():
        engine.model.heads["image"].weight.zero_()  # type: ignore[index,union-attr,operator]
    found = before(engine, tiny_batch(run.model))
    assert found["log_z(text_to_image)"] == pytest.approx(math.log(11), rel=1e-5)


def test_update_ratio() -> None:
    run = tiny_run()
    engine = NativeEngine(run)
    instruments = Instruments(engine)
    instruments.before(tiny_batch(run.model))
    with torch.no_grad():
        for parameter in engine.model.blocks.parameters():
            parameter.mul_(1.01)
    found = instruments.after()
    assert found["update/weight(blocks)"] == pytest.approx(0.01, rel=1e-3)
    assert found["update/weight(embed)"] == 0.0
