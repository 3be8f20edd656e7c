"""The DeepSpeed engine takes the same steps as one native process, and either goes on from the other's checkpoints."""

from __future__ import annotations

import dataclasses
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vilg.checkpoint.manager import Checkpointer
from megatron_vilg.checkpoint.manifest import Manifest
from megatron_vilg.config.schema import CheckpointConfig, LossConfig, OptimConfig, ParallelConfig, RunConfig
from megatron_vilg.data.batch import PairBatch
from megatron_vilg.parallel.mesh import build_mesh
from megatron_vilg.train.engine import Engine, StepResult
from megatron_vilg.train.pretrain import build_engine
from tests.helpers import run_distributed
from tests.tiny import tiny_batch, tiny_config, tiny_run

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

STEPS = 4
BATCH = 8
KEEP_NOTHING_WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed leaves small weights whole at stage 3; ours are all small."""


@pytest.fixture(scope="module", autouse=True)
def _imported_before_the_fork() -> None:
    """These imports, torch's compiler among them, take most of a short run; forked processes inherit them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def run_of(
    engine: str = "deepspeed", parallel: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """Sizes that 2 and 4 do not always divide, every part of the loss, and clipping at work."""
    sizes = {"width": 12, "num_heads": 2, "codebook_dim": 3}
    base = tiny_run(tiny_config(**(sizes | (model or {}))), batch_size=BATCH, engine=engine, **train)
    return dataclasses.replace(
        base,
        loss=LossConfig(image_to_text_weight=0.7, z_loss=1e-3, label_smoothing=0.1),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5),
        parallel=ParallelConfig(**(parallel or {})),
    )


def start(run: RunConfig) -> Engine:
    size = run.model.codebook_dim
    codebook = torch.randn(run.model.image_vocab_size, size, generator=torch.Generator().manual_seed(5))
    return build_engine(run, build_mesh(run.parallel, "cpu"), codebook)


def share(engine: Engine, step: int) -> PairBatch:
    each = BATCH // engine.mesh.data_size
    first = engine.mesh.data_rank * each
    return tiny_batch(engine.run.model, BATCH, seed=step).slice(first, first + each)  # type: ignore[attr-defined]


def train(engine: Engine, steps: range) -> list[tuple[float, ...]]:
    """(loss, image_ce, text_ce, grad_norm, skipped) of each step."""

    def numbers(result: StepResult) -> tuple[float, ...]:
        return tuple(float(x) for x in (result.loss, result.image_ce, result.text_ce, result.grad_norm, result.skipped))

    return [numbers(engine.train_step(share(engine, step))) for step in steps]


def weights(engine: Engine) -> dict[str, Tensor]:
    """Whole weights on the main rank."""
    return {name: tensor.clone() for name, tensor in engine.export()}


def whole_run(run: RunConfig) -> tuple[list[tuple[float, ...]], float, dict[str, Tensor]]:
    engine = start(run)
    steps = train(engine, range(STEPS))
    held_out = float(engine.eval_step(tiny_batch(run.model, 5, seed=99)).loss)
    return steps, held_out, weights(engine)


@pytest.fixture(scope="module")
def native() -> tuple[list[tuple[float, ...]], float, dict[str, Tensor]]:
    return whole_run(run_of("native"))


def assert_same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
    assert found[1] == pytest.approx(expected[1], abs=tolerance)
    assert found[2].keys() == expected[2].keys()
    for name, tensor in expected[2].items():
        torch.testing.assert_close(found[2][name], tensor, atol=tolerance, rtol=0, msg=name)


LAYOUTS = {
    "zero 1, 2 processes": (2, {"zero": 1}),
    "zero 2, 2 processes": (2, {"zero": 2, "num_microbatches": 2}),
    "zero 3, 2 processes": (2, {"zero": 3, "num_microbatches": 2, "recompute": "block"}),
}
MORE_LAYOUTS = {
    "zero 1, 4 processes": (4, {"zero": 1, "num_microbatches": 2}),
    "zero 2, 4 processes": (4, {"zero": 2}),
    "zero 3, 4 processes": (4, {"zero": 3, "recompute": "selective"}),
    "zero 1, optimizer in main memory": (2, {"zero": 1, "offload_optimizer": "cpu"}),
    "zero 2, optimizer in main memory": (2, {"zero": 2, "offload_optimizer": "cpu", "num_microbatches": 2}),
    "zero 3, weights in main memory": (2, {"zero": 3, "offload_weights": "cpu"}),
    "zero 3, all in main memory": (2, {"zero": 3, "cpu_offload": True, "num_microbatches": 2}),
}


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS.values(), ids=LAYOUTS)
def test_steps_equal_one_native_process(world_size: int, parallel: dict[str, Any], native: Any, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(KEEP_NOTHING_WHOLE))
    run = run_of(parallel=parallel, deepspeed_config=str(tmp_path / "ds.json") if parallel["zero"] == 3 else "")
    assert_same(run_distributed(whole_run, world_size, run)[0], native)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), MORE_LAYOUTS.values(), ids=MORE_LAYOUTS)
def test_more_layouts_equal_one_native_process(world_size: int, parallel: dict[str, Any], native: Any) -> None:
    assert_same(run_distributed(whole_run, world_size, run_of(parallel=parallel))[0], native)


def test_one_process_without_a_launcher_is_a_group_of_one(native: Any) -> None:
    def alone(run: RunConfig) -> Any:
        torch.distributed.destroy_process_group()
        return whole_run(run)

    assert_same(run_distributed(alone, 1, run_of(parallel={"zero": 2}))[0], native)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_bf16_stays_close_to_fp32(zero: int, native: Any) -> None:
    found = run_distributed(whole_run, 2, run_of(parallel={"zero": zero}, precision="bf16"))[0]
    for ours, theirs in zip(found[0], native[0], strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in found[2].values())


def stores(run: RunConfig, folder: Path, engine: Engine) -> tuple[Checkpointer, Manifest]:
    manifest = Manifest(kind="pretrain", model=dataclasses.asdict(run.model), step=engine.step)
    return Checkpointer(folder, CheckpointConfig(), engine.mesh), manifest


def steps_then_save(run: RunConfig, folder: Path, steps: range) -> list[tuple[float, ...]]:
    """Go on from the newest checkpoint if there is one, take steps, save."""
    engine = start(run)
    checkpointer, _ = stores(run, folder, engine)
    path = checkpointer.latest()
    if path is not None:
        engine.resume(checkpointer.load(path, engine.state_dict()).step)
    assert engine.step == steps.start
    results = train(engine, steps)
    checkpointer, manifest = stores(run, folder, engine)
    checkpointer.save(engine.step, engine.state_dict(), manifest)
    return results


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_resumed_run_repeats_a_straight_one_bit_for_bit(zero: int, tmp_path: Path) -> None:
    def both(run: RunConfig) -> tuple[Any, Any]:
        straight = train(start(run), range(STEPS))
        return straight, [
            *steps_then_save(run, tmp_path, range(2)),
            *steps_then_save(run, tmp_path, range(2, STEPS)),
        ]

    straight, resumed = run_distributed(both, 2, run_of(parallel={"zero": zero}))[0]
    assert resumed == straight


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_checkpoints_cross_between_engines_with_adam_s_moments(zero: int, native: Any, tmp_path: Path) -> None:
    theirs, ours = run_of("native"), run_of(parallel={"zero": zero})
    found = [
        *steps_then_save(theirs, tmp_path, range(1)),
        *run_distributed(steps_then_save, 2, ours, tmp_path, range(1, 3))[0],
        *steps_then_save(theirs, tmp_path, range(3, STEPS)),
    ]
    for step, expected in zip(found, native[0], strict=True):
        assert step == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_stage_and_number_of_processes(native: Any, tmp_path: Path) -> None:
    found = []
    for step, (size, zero) in enumerate([(4, 3), (2, 1), (4, 2), (2, 3)]):
        run = run_of(parallel={"zero": zero})
        found += run_distributed(steps_then_save, size, run, tmp_path, range(step, step + 1))[0]
    for step, expected in zip(found, native[0], strict=True):
        assert step == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("zero", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_step_that_is_not_finite_changes_nothing(zero: int) -> None:
    def poisoned(run: RunConfig) -> Any:
        engine = start(run)
        train(engine, range(2))
        before = weights(engine)
        bad = share(engine, 2)
        engine._put_weight("norm.bias", torch.full((run.model.width,), float("inf")))  # type: ignore[attr-defined]
        result = engine.train_step(bad)
        engine._put_weight("norm.bias", before.get("norm.bias", torch.zeros(run.model.width)))  # type: ignore[attr-defined]
        after = weights(engine)
        same = {name: torch.equal(before[name], after[name]) for name in before if name != "norm.bias"}
        return float(result.skipped), engine.step, same

    skipped, step, same = run_distributed(poisoned, 2, run_of(parallel={"zero": zero}))[0]
    assert skipped == 1.0 and step == 3
    assert all(same.values()), same


def test_the_whole_model_for_samples_is_the_trained_one() -> None:
    def both(run: RunConfig) -> Any:
        engine = start(run)
        train(engine, range(2))
        model = engine.whole_model()
        batch = tiny_batch(run.model, BATCH, seed=7)
        expected = engine.eval_step(batch)
        if model is None:
            return None
        text, image, length = batch.rows()
        return float(expected.image_ce), model(text, image, text_len=length), batch.target_image_ids

    answers = run_distributed(both, 2, run_of(parallel={"zero": 3}))
    assert answers[1] is None
    image_ce, (image_logits, _), target = answers[0]
    found = torch.nn.functional.cross_entropy(image_logits.flatten(0, 1), target.flatten())
    assert float(found) == pytest.approx(image_ce, abs=1e-5)


def copies_left(run: RunConfig) -> list[bool]:
    """Whether copies of the weights are still held: once written, after the next copies, after a step."""
    engine = start(run)
    first = weakref.ref(engine.state_dict()["optimizer"]["exp_avg"]["norm.weight"])
    held = [first() is not None]
    second = weakref.ref(engine.state_dict()["optimizer"]["exp_avg"]["norm.weight"])
    held += [first() is not None, second() is not None]
    train(engine, range(1))
    return [*held, second() is not None]


def test_copies_for_a_checkpoint_do_not_stay_in_memory() -> None:
    assert run_distributed(copies_left, 2, run_of(parallel={"zero": 2})) == [[True, False, True, False]] * 2


def test_calls_that_torch_deprecates_are_not_announced() -> None:
    """They are DeepSpeed's, and nobody who trains can change them."""

    def warned(run: RunConfig) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train(start(run), range(1))
        return [str(warning.message) for warning in seen if issubclass(warning.category, FutureWarning)]

    for zero in (2, 3):
        assert run_distributed(warned, 2, run_of(parallel={"zero": zero})) == [[]] * 2


def test_held_out_pairs_are_cut_like_a_training_step() -> None:
    def passes(run: RunConfig) -> list[int]:
        engine: Any = start(run)
        pairs: list[int] = []
        engine._engine.module.register_forward_pre_hook(lambda _, inputs: pairs.append(len(inputs[0]) // 2))
        engine.eval_step(tiny_batch(run.model, BATCH + 1))
        return pairs

    assert run_distributed(passes, 2, run_of(parallel={"zero": 2, "num_microbatches": 2})) == [[2] * 3] * 2


def test_attention_without_a_backward_pass_here_is_refused() -> None:
    run = run_of()
    with pytest.raises(AssertionError, match="ops.attention=flex: .*no backward pass on a CPU. Works here: fold"):
        run_distributed(start, 1, dataclasses.replace(run, ops=dataclasses.replace(run.ops, attention="flex")))


def test_every_seed_draws_dropout_masks() -> None:
    def seeded(run: RunConfig) -> tuple[float, int]:
        return train(start(run), range(1))[0][4], torch.initial_seed()

    run = run_of(model={"dropout": 0.2}, seed=20_261_129_123_456)
    assert run_distributed(seeded, 1, run) == [(0.0, 20_261_129_123_456 * 1_000_003 % 2**64)]


def test_dropout_masks_are_repeated_after_resuming(tmp_path: Path) -> None:
    def both(run: RunConfig) -> tuple[Any, Any]:
        straight = train(start(run), range(3))
        return straight, [*steps_then_save(run, tmp_path, range(2)), *steps_then_save(run, tmp_path, range(2, 3))]

    straight, resumed = run_distributed(both, 2, run_of(parallel={"zero": 2}, model={"dropout": 0.2}))[0]
    assert resumed == straight
